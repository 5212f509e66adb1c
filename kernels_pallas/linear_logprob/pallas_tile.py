"""What the Pallas kernels share: the grid over tiles, and a tile of logits.

On a TPU tokens go down and rows across, so that a sum over tokens is a row [1, rows], which it stores without
turning it. On a GPU rows go down: a thread then holds logits of few rows, and the numbers of a row few registers.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Float32, Int, UInt32

from kernels_pallas import dispatch
from kernels_pallas.linear_logprob import blocks, reference, support as support_bits
from kernels_pallas.linear_logprob.reference import Scalar


class Operands(NamedTuple):
    """What a kernel reads: rows in whole blocks, at least one whole tile of tokens."""

    hidden: Float[Array, "M D"]
    vocabulary: Float[Array, "V D"]
    targets: Int[Array, "1 M"]
    numbers: Float32[Array, "R M"]
    support: Int[Array, "tiles words M"] | None


def operands(chosen: blocks.Kernel, hidden: Float[Array, "M D"], vocabulary: Float[Array, "V D"],
             targets: Int[Array, " M"], numbers: Float32[Array, "R M"],
             support: UInt32[Array, "M W"] | None) -> Operands:
    """Laid out for a kernel: D in whole steps of `depth`, the words of a tile together.

    Language models have a D that is a multiple of the depth: only toys pay for the padded copies.
    """
    missing = -hidden.shape[1] % chosen.depth
    if missing:
        hidden, vocabulary = (jnp.pad(x, ((0, 0), (0, missing))) for x in (hidden, vocabulary))
    if support is not None:
        words = chosen.tile // support_bits.WORD
        tiles = vocabulary.shape[0] // chosen.tile
        support = support[:, :tiles * words].T.reshape(tiles, words, -1).astype(jnp.int32)
    return Operands(hidden, vocabulary, targets[None], numbers, support)


def run(body: Callable[..., None], chosen: blocks.Kernel, read: Operands, out: pl.BlockSpec, shape: tuple[int, ...],
        dtype: Any, name: str) -> Array:
    """The body's output for every block of rows and every whole tile of tokens; what is left of V is not read.

    A GPU counts the first grid axis fastest: the row blocks that want one tile of the vocabulary run
    together and find it in the L2 cache. A TPU counts the last fastest: a block of hidden states stays
    in VMEM while the vocabulary passes by.

    Args:
      body: takes references to the fields of `Operands`, then to the output.
      out: block of the output at grid point (block of rows, tile).
      shape, dtype: of the output.
    """
    rows, tile, width = chosen.rows, chosen.tile, read.hidden.shape[1]
    by_row = lambda height: pl.BlockSpec((height, rows), lambda i, j: (0, i))
    specs = Operands(
        hidden=pl.BlockSpec((rows, width), lambda i, j: (i, 0)),
        vocabulary=pl.BlockSpec((tile, width), lambda i, j: (j, 0)),
        targets=by_row(1),
        numbers=by_row(read.numbers.shape[0]),
        support=None if read.support is None else pl.BlockSpec((None, *read.support.shape[1:2], rows),
                                                               lambda i, j: (j, 0, i)))
    # Inside shard_map the output says over which mesh axes it varies: those of what is read.
    varying = jax.typeof(read.hidden).manual_axis_type
    call = dispatch.pallas_call(
        _without_absent(body, read), warps=chosen.warps, stages=chosen.stages, name=name,
        grid=(read.hidden.shape[0] // rows, read.vocabulary.shape[0] // tile),
        in_specs=[x for x in specs if x is not None], out_specs=out,
        out_shape=jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying))
    return call(*(x for x in read if x is not None))


def _without_absent(body, read):
    if read.support is not None:
        return body
    return lambda *references: body(*references[:-1], None, references[-1])


def per_row(chosen: blocks.Kernel, numbers: Array) -> Array:
    """A number for every row of a tile, from a row [1, rows]."""
    return numbers.reshape(-1, 1) if chosen.token_axis else numbers


def logits(chosen: blocks.Kernel, hidden: Any, vocabulary: Any, temperature: Float32[Array, "_ _"], support: Any,
           soft_cap: int | float | None) -> Float32[Array, "_ _"]:
    """cap tanh(w h / cap) / temperature of a tile; `reference.EXCLUDED` for tokens that are not kept.

    Args:
      hidden, vocabulary, support: references to the blocks; support may be None.
      temperature: of every row (`per_row`), dimensionless.
      soft_cap: in nats, or None.
    """
    down, across = (hidden, vocabulary) if chosen.token_axis else (vocabulary, hidden)

    def product(start):
        part = pl.ds(start, chosen.depth)
        return reference.product(down[:, part], across[:, part], 1, 1)

    steps = hidden.shape[1] // chosen.depth
    z = product(0) if steps == 1 else jax.lax.fori_loop(
        0, steps, lambda i, z: z + product(i * chosen.depth),
        jnp.zeros((down.shape[0], across.shape[0]), jnp.float32))
    # A division is many instructions: rows and constants are inverted, not tiles.
    u = (z if soft_cap is None else soft_cap * jnp.tanh(z * (1.0 / soft_cap))) * (1.0 / temperature)
    return u if support is None else jnp.where(_kept(chosen, support, u.shape), u, reference.EXCLUDED)


def _kept(chosen: blocks.Kernel, support: Any, shape: tuple[int, int]) -> Bool[Array, "_ _"]:
    """A select per word, 32 tokens, of the tile: neither backend can gather, and both can broadcast a row."""
    token = jax.lax.broadcasted_iota(jnp.int32, shape, chosen.token_axis)
    words = jnp.zeros(shape, jnp.int32)
    for i in range(support.shape[0]):
        words = jnp.where(token >> 5 == i, per_row(chosen, support[i:i + 1, :]), words)
    return (words >> (token & 31)) & 1 == 1


def is_target(chosen: blocks.Kernel, targets: Any, shape: tuple[int, int]) -> Bool[Array, "_ _"]:
    """Where the tile of this program holds the row's target, counted from the first tile."""
    token = pl.program_id(1) * chosen.tile + jax.lax.broadcasted_iota(jnp.int32, shape, chosen.token_axis)
    return token == per_row(chosen, targets[...])


def whole_rows(x: Array, multiple: int) -> Array:
    """Rows of zeros added until they are a multiple."""
    missing = -x.shape[0] % multiple
    return jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1)) if missing else x
