"""Block sizes from the shape, and the loops over blocks."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Int

# Measured on 2 CPU cores, jax 0.10, gradient with 16,384 rows against log_softmax on all logits: blocks
# of 2^20 logits take 0.65 to 1.1 of its time for V = 64 to 2,048 (2^19 to 2^21 differ little), and
# 0.4 of it for V = 32,768 with 2,048 rows, where tiles of 8,192 take 0.6.
ONE_TILE = 2048
TILE = 1024
LOGITS = 1 << 20


class Blocks(NamedTuple):
    """`row_blocks` equal shares of the rows, tiles of `tile` tokens (a multiple of 32, or all)."""

    row_blocks: int
    tile: int


def best() -> str:
    """The implementation that was measured fastest where this runs."""
    return "xla"


def choose(rows: int, vocabulary_size: int) -> Blocks:
    """Blocks of about 2^20 logits; the vocabulary is cut only when it is longer than 2,048 tokens.

    Row blocks are equal, so rows that have no divisor close to the wish stay in one block.
    """
    tile = vocabulary_size if vocabulary_size <= ONE_TILE else TILE
    wish = max(1, rows * tile // LOGITS)
    divisors = (count for count in range(wish, 2 * wish) if rows % count == 0)
    return Blocks(next(divisors, 1), tile)


def over_tiles(body: Callable[[Any, Any, int], Any], carry: Any, size: int, tile: int) -> Any:
    """carry = body(start, carry, width) over the full tiles, then once, narrower, over what is left."""
    full = size // tile
    if full == 1:
        carry = body(0, carry, tile)
    else:
        carry = jax.lax.fori_loop(0, full, lambda i, carry: body(i * tile, carry, tile), carry)
    return body(full * tile, carry, size % tile) if size % tile else carry


def over_rows(body: Callable[[Any, tuple], tuple[Any, Any]], carry: Any, arrays: tuple,
              count: int) -> tuple[Any, Any]:
    """(carry, outputs): body(carry, block of every array) -> (carry, outputs of the block), in turn.

    Rows are dealt to blocks like cards (block i has rows i, i + count, ...): a row axis that is
    sharded over devices stays sharded inside every block.

    Args:
      body: outputs are arrays with the block's rows in front.
      carry: passed from block to block.
      arrays: pytrees of arrays with the rows in front.
      count: number of blocks, a divisor of the number of rows.
    """
    if count == 1:
        return body(carry, arrays)
    dealt = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]), arrays)

    def block(i: int | Int[Array, ""]) -> tuple:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False), dealt)

    def step(i, state):
        carry, outputs = state
        carry, new = body(carry, block(i))
        put = lambda old, x: jax.lax.dynamic_update_index_in_dim(old, x, i, 1)
        return carry, jax.tree.map(put, outputs, new)

    like = jax.tree.leaves(dealt)[0]
    shapes = jax.eval_shape(lambda carry: body(carry, block(0))[1], carry)
    empty = jax.tree.map(lambda x: jax.lax.full_like(like, 0, x.dtype, (x.shape[0], count, *x.shape[1:])), shapes)
    carry, outputs = jax.lax.fori_loop(0, count, step, (carry, empty))
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
