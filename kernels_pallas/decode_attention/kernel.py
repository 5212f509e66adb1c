"""The sums as a Pallas kernel: the cache is read once, for all rows that ask it."""
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as mosaic_tpu
from jaxtyping import Array, Float, Float32

from kernels_pallas import dispatch
from kernels_pallas.decode_attention import blocks, forward
from kernels_pallas.decode_attention.blocks import Blocks
from kernels_pallas.decode_attention.reference import NEVER, Cache


def sums(query: Float[Array, "*B K M E"], cache: Cache) -> forward.Sums:
    """`forward.tiled` by a kernel over sequences, key heads and stretches of positions."""
    *batch, heads, rows, size = query.shape
    key, value = (_padded(a, max(a.shape[-2], blocks.FEWEST)) for a in (cache.key, cache.value))
    flat = query.reshape(-1, heads, rows, size)
    lengths = cache.lengths.reshape(-1).astype(jnp.int32)
    plan = blocks.choose(flat.shape[0], heads, rows, key.shape[-2], size, key.dtype.itemsize)
    call = _walk if plan.walk else _split
    mixed, top, total = call(plan, lengths, _padded(flat, -(-rows // plan.rows) * plan.rows), key, value)
    # From [B, K, splits, M, .] to one split, without the padding.
    highest = top.max(axis=2)
    shrink = jnp.exp(top - highest[:, :, None])
    add = lambda a: (a * shrink).sum(axis=2)
    whole = lambda a: a[:, :, :rows].reshape(*batch, heads, rows, a.shape[-1])
    return jax.tree.map(whole, forward.Sums(add(mixed), highest, add(total)))


def _padded(a: Array, rows: int) -> Array:
    missing = rows - a.shape[-2]
    return jnp.pad(a, [*[(0, 0)] * (a.ndim - 2), (0, missing), (0, 0)]) if missing else a


def _caches(a: Array, heads: int | None, positions: int, index: Callable[..., tuple]) -> pl.BlockSpec:
    """Blocks of a cache [*B, K, T, E] for a grid that counts the sequences in one axis.

    The cache keeps its axes: a reshape of what a loop updates in place can make XLA copy all of it.

    Args:
      index: from the other grid axes to the blocks of key heads and positions.
    """
    *batch, _, _, size = a.shape

    def at(b, *grid):
        sequence = []
        for length in reversed(batch):
            sequence.insert(0, b % length)
            b = b // length
        return (*sequence, *index(*grid), 0)

    return pl.BlockSpec((*[None] * len(batch), heads, positions, size), at)


def _split(plan: Blocks, lengths: Array, query: Array, key: Array, value: Array) -> tuple:
    """Every program loops over the tiles of its own stretch. For GPUs: programs run in any order."""
    sequences, heads, rows, size = query.shape
    positions = key.shape[-2]
    span = -(-positions // (plan.splits * plan.tile)) * plan.tile
    splits = -(-positions // span)
    whole = _caches(key, None, positions, lambda h, m, s: (h, 0))
    return dispatch.pallas_call(
        functools.partial(_split_body, plan.tile, span, size**-0.5),
        grid=(sequences, heads, rows // plan.rows, splits),
        in_specs=[pl.BlockSpec((sequences,), lambda b, h, m, s: (0,)),
                  pl.BlockSpec((None, None, plan.rows, size), lambda b, h, m, s: (b, h, m, 0)), whole, whole],
        out_specs=[pl.BlockSpec((None, None, None, plan.rows, width), lambda b, h, m, s: (b, h, s, m, 0))
                   for width in (size, 1, 1)],
        out_shape=_results(sequences, heads, splits, size, rows),
        name="decode_attention_split")(lengths, query, key, value)


def _split_body(tile: int, span: int, scale: float, lengths: Any, query: Any, key: Any, value: Any, mixed: Any,
                top: Any, total: Any) -> None:
    positions, length, begin = key.shape[0], lengths[pl.program_id(0)], pl.program_id(3) * span
    rows = query[...]

    def add(i, carry):
        fresh = begin + i * tile
        start = jnp.minimum(fresh, positions - tile)  # the last tile ends with the cache
        at = pl.ds(start, tile)
        return _with_tile(carry, rows, key[at, :], value[at, :], (start, fresh, length), scale)

    visible = jnp.minimum(length, positions) - begin
    tiles = jnp.clip((visible + tile - 1) // tile, 0, span // tile)
    mixed[...], top[...], total[...] = jax.lax.fori_loop(0, tiles, add, _nothing(*rows.shape))


def _walk(plan: Blocks, lengths: Array, query: Array, key: Array, value: Array) -> tuple:
    """The last grid axis goes from tile to tile and adds to one output block. For TPUs: it runs in order.

    It is only as long as the longest sequence, because a block costs its copy to VMEM also where nothing is to do.
    """
    sequences, heads, rows, size = query.shape
    positions = key.shape[-2]
    tiles = jnp.maximum(1, (jnp.minimum(lengths.max(), positions) + plan.tile - 1) // plan.tile)
    tile = _caches(key, plan.heads, plan.tile, lambda h, m, i: (h, i))
    scalars = pl.BlockSpec(memory_space=mosaic_tpu.SMEM) if dispatch.platform() == "tpu" else (
        pl.BlockSpec((sequences,), lambda b, h, m, i: (0,)))
    return dispatch.pallas_call(
        functools.partial(_walk_body, positions, size**-0.5), sequential=1,
        grid=(sequences, heads // plan.heads, rows // plan.rows, tiles),
        in_specs=[scalars, pl.BlockSpec((None, plan.heads, plan.rows, size), lambda b, h, m, i: (b, h, m, 0)),
                  tile, tile],
        out_specs=[pl.BlockSpec((None, plan.heads, None, plan.rows, width), lambda b, h, m, i: (b, h, 0, m, 0))
                   for width in (size, 1, 1)],
        out_shape=_results(sequences, heads, 1, size, rows),
        name="decode_attention_walk")(lengths, query, key, value)


def _walk_body(positions: int, scale: float, lengths: Any, query: Any, key: Any, value: Any, mixed: Any, top: Any,
               total: Any) -> None:
    heads, tile, size = key.shape
    length, start = jnp.minimum(lengths[pl.program_id(0)], positions), pl.program_id(3) * tile

    @pl.when(pl.program_id(3) == 0)
    def _():
        for head in range(heads):
            mixed[head], top[head], total[head] = _nothing(query.shape[1], size)

    @pl.when(start < length)
    def _():
        for head in range(heads):
            v = value[head]
            if positions % tile:  # the last block holds garbage behind the cache, and 0 * garbage may be NaN
                row = start + jax.lax.broadcasted_iota(jnp.int32, v.shape, 0)
                v = jnp.where(row < positions, v, jnp.zeros_like(v))
            carry = mixed[head], top[head], total[head]
            mixed[head], top[head], total[head] = _with_tile(
                carry, query[head], key[head], v, (start, start, length), scale)


def _results(sequences: int, heads: int, splits: int, size: int, rows: int) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((sequences, heads, splits, rows, width), jnp.float32) for width in (size, 1, 1)]


def _nothing(rows: int, size: int) -> tuple[Array, Array, Array]:
    return (jnp.zeros((rows, size), jnp.float32), jnp.full((rows, 1), NEVER / 2, jnp.float32),
            jnp.zeros((rows, 1), jnp.float32))


def _with_tile(carry: tuple[Array, Array, Array], query: Float[Array, "M E"], key: Float[Array, "t E"],
               value: Float[Array, "t E"], place: tuple, scale: float) -> tuple[Array, Array, Array]:
    """The sums [M, E], [M, 1], [M, 1] with the positions of one tile.

    Args:
      place: position of the tile's first row, the first position that is not yet in the sums, and the first that may
        not be seen.
    """
    mixed, top, total = carry
    start, fresh, length = place
    score = _product(query, key, 1) * scale
    position = start + jax.lax.broadcasted_iota(jnp.int32, score.shape, 1)
    score = jnp.where((position >= fresh) & (position < length), score, NEVER)
    highest = jnp.maximum(top, score.max(axis=1, keepdims=True))
    weight, shrink = jnp.exp(score - highest), jnp.exp(top - highest)
    mixed = mixed * shrink + _product(weight.astype(value.dtype), value, 0)
    return mixed, highest, total * shrink + weight.sum(axis=1, keepdims=True)


def _product(a: Float[Array, "M J"], b: Float[Array, "..."], b_axis: int) -> Float32[Array, "..."]:
    """The product summed over the columns of a and `b_axis` of b, in float32; float32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (((1,), (b_axis,)), ((), ())), precision=precision,
                               preferred_element_type=jnp.float32)
