"""Block sizes from the shape and the device, and the loops over blocks."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Int

from kernels_pallas import dispatch

# Measured on 2 CPU cores, jax 0.10, gradient with 16,384 rows against log_softmax on all logits: blocks
# of 2^20 logits take 0.65 to 1.1 of its time for V = 64 to 2,048 (2^19 to 2^21 differ little), and
# 0.4 of it for V = 32,768 with 2,048 rows, where tiles of 8,192 take 0.6.
ONE_TILE = 2048
TILE = 1024
LOGITS = 1 << 20

# (rows, tokens) of a kernel's program, the best first; their speed is not measured on a GPU or a TPU yet.
# GPU: 128 x 256 float32 logits are 128 registers for each thread of 8 warps. Steps of 128 bytes of D, three in
# flight, are 144 KiB of shared memory where Triton compiles them for an H100, 96 KiB for an A100 or an L4.
# TPU: the largest that fit VMEM. The row block stays while the vocabulary passes, so every number of
# the vocabulary read from HBM serves `rows` products: 256 or more keep a v5e's matrix unit busy.
GPU_SHAPES = (128, 256), (128, 128), (128, 64), (128, 32)
TPU_SHAPES = (512, 256), (256, 256), (128, 256), (256, 128), (128, 128), (128, 64), (128, 32)
DEPTH_BYTES = 128
TOKEN_AXIS = {"cpu": 1, "gpu": 1, "tpu": 0}
WARPS = 8
STAGES = 3
# Bytes of the 16 MiB of VMEM of a v5e that blocks may take: hidden and vocabulary twice, as the next
# arrive while these are used, and six float32 values a logit.
VMEM = 14 << 20
# The cotangents of logits in memory at a time: a share of the bytes of all float32 logits, and bounds.
CHUNK_SHARE = 0.015
CHUNK_TOKENS = 8192
CHUNK_BYTES = 1 << 28


class Blocks(NamedTuple):
    """`row_blocks` equal shares of the rows, tiles of `tile` tokens (a multiple of 32, or all)."""

    row_blocks: int
    tile: int


class Kernel(NamedTuple):
    """A program's block of `rows` rows and `tile` tokens; `depth` of D per product; warps and stages are Triton's.

    Tokens are down (`token_axis` 0) or across (1) a tile of logits.
    """

    rows: int
    tile: int
    depth: int
    token_axis: int
    warps: int
    stages: int


def best(size: int = 1 << 17, width: int = 4096, itemsize: int = 2) -> str:
    """The implementation for where this runs: kernels on GPU and TPU, unless none of their blocks fits.

    Not measured there yet; on a CPU, where kernels are interpreted, "xla" is. Without arguments: for
    a language model's output embedding in bfloat16.

    Args:
      size, width: of the vocabulary, V and D.
      itemsize: bytes of a number in the products.
    """
    return "pallas" if dispatch.platform() != "cpu" and _fitting(size, width, itemsize) else "xla"


def kernel(rows: int, size: int, width: int, itemsize: int) -> Kernel:
    """The best block that fits and pads the rows by no more than an eighth beyond what the smallest does.

    Args:
      rows: M.
      size, width, itemsize: as in `best`.

    Raises:
      ValueError: no block fits.
    """
    fitting = _fitting(size, width, itemsize)
    if not fitting:
        raise ValueError(f"No kernel of linear_logprob fits V = {size}, D = {width} with {itemsize} bytes a number on "
                         f'{dispatch.platform()}: it needs V >= 32, on a TPU blocks in VMEM; use implementation="xla".')
    padded = lambda block: -(-rows // block) * block
    least = padded(min(one.rows for one in fitting))
    return next(one for one in fitting if 8 * padded(one.rows) <= 9 * least)


def _fitting(size: int, width: int, itemsize: int) -> list[Kernel]:
    where = dispatch.platform()
    depth = width if where == "tpu" else DEPTH_BYTES // itemsize
    taken = lambda rows, tile: 2 * (rows + tile) * width * itemsize + 24 * rows * tile
    fits = lambda rows, tile: tile <= size and (where != "tpu" or taken(rows, tile) <= VMEM)
    shapes = TPU_SHAPES if where == "tpu" else GPU_SHAPES
    return [Kernel(*shape, depth, TOKEN_AXIS[where], WARPS, STAGES) for shape in shapes if fits(*shape)]


def chunks(rows: int, size: int, tile: int, itemsize: int) -> Blocks:
    """How the kernel of the gradient cuts its work: chunks of whole tiles, shares of the rows where they are many.

    Args:
      rows, size: M and V.
      tile: tokens of the kernel's block.
      itemsize: bytes of a cotangent.
    """
    wish = min(CHUNK_TOKENS, int(CHUNK_SHARE * size * 4) // itemsize)
    tokens = max(1, wish // tile) * tile
    return Blocks(-(-rows * tokens * itemsize // CHUNK_BYTES), tokens)


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
