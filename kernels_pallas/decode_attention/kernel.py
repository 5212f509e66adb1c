"""The sums as a Pallas kernel: the cache is read once, for all rows that ask it."""
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as mosaic_tpu
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas import dispatch
from kernels_pallas.decode_attention import blocks, forward
from kernels_pallas.decode_attention.blocks import Blocks
from kernels_pallas.decode_attention.reference import NEVER, Cache
from kernels_pallas.prefix_attention.reference import scores
from kernels_pallas.prefix_attention.visibility import Options


class Window(NamedTuple):
    """Which positions the rows of the queries [B, K, M, E] see, where the sequence's length does not say it all.

    Attributes:
      tiles: for block m of the rows of sequence b, at 2 (b M / rows + m), its first tile and that behind its last.
      first: the first position of each row.
    """

    tiles: Int32[Array, " N"]
    first: Int32[Array, "B M 1"]


def sums(query: Float[Array, "*B K M E"], cache: Cache, first: forward.First = None,
         options: Options = Options()) -> forward.Sums:
    """`forward.tiled` by a kernel over sequences, key heads and stretches of positions."""
    *batch, heads, rows, size = query.shape
    positions = cache.key.shape[-2]
    key, value = (_padded(a, max(positions, blocks.FEWEST)) for a in (cache.key, cache.value))
    flat = query.reshape(-1, heads, rows, size)
    lengths = cache.lengths.reshape(-1).astype(jnp.int32)
    if positions < blocks.FEWEST:
        lengths = jnp.minimum(lengths, positions)
    plan = blocks.choose(flat.shape[0], heads, rows, key.shape[-2], size, key.dtype.itemsize,
                         None if first is None else options.window)
    options = options._replace(scale=size**-0.5 if options.scale is None else options.scale)
    window = None if first is None else _window(plan, lengths, first.reshape(-1, rows), key.shape[-2])
    call = _walk if plan.walk else _split
    given = _padded(flat, -(-rows // plan.rows) * plan.rows), key, value
    mixed, top, total = call(plan, options, lengths, window, *given)
    # From [B, K, splits, M, .] to one split, without the padding.
    highest = top.max(axis=2)
    shrink = jnp.exp(top - highest[:, :, None])
    add = lambda a: (a * shrink).sum(axis=2)
    whole = lambda a: a[:, :, :rows].reshape(*batch, heads, rows, a.shape[-1])
    return jax.tree.map(whole, forward.Sums(add(mixed), highest, add(total)))


def _padded(a: Array, rows: int) -> Array:
    missing = rows - a.shape[-2]
    return jnp.pad(a, [*[(0, 0)] * (a.ndim - 2), (0, missing), (0, 0)]) if missing else a


def _window(plan: Blocks, lengths: Int32[Array, " B"], first: Int32[Array, "B M"], positions: int) -> Window:
    # A padded row sees nothing.
    first = jnp.pad(jnp.maximum(first, 0), ((0, 0), (0, -first.shape[1] % plan.rows)), constant_values=positions)
    length = jnp.minimum(lengths, positions)[:, None]
    lowest = first.reshape(first.shape[0], -1, plan.rows).min(axis=2)
    some = lowest < length
    tiles = [jnp.where(some, tile, 0) for tile in (lowest // plan.tile, (length + plan.tile - 1) // plan.tile)]
    return Window(jnp.stack(tiles, axis=2).reshape(-1), first[:, :, None])


def _caches(a: Array, heads: int | None, positions: int, index: Callable[..., tuple]) -> pl.BlockSpec:
    """Blocks of a cache [*B, K, T, E] for a grid that counts the sequences in one axis.

    The cache keeps its axes: a reshape of what a loop updates in place can make XLA copy all of it.

    Args:
      index: from the grid's axes to the blocks of key heads and positions.
    """
    *batch, _, _, size = a.shape

    def at(b, *grid):
        sequence, rest = [], b
        for length in reversed(batch):
            sequence.insert(0, rest % length)
            rest = rest // length
        return (*sequence, *index(b, *grid), 0)

    return pl.BlockSpec((*[None] * len(batch), heads, positions, size), at)


def _split(plan: Blocks, options: Options, lengths: Array, window: Window | None, query: Array, key: Array,
           value: Array) -> tuple:
    """Every program loops over the tiles of its own stretch. For GPUs: programs run in any order."""
    sequences, heads, rows, size = query.shape
    positions = key.shape[-2]
    span = -(-positions // (plan.splits * plan.tile)) * plan.tile
    splits = -(-positions // span)
    table = lambda a: pl.BlockSpec(a.shape, lambda b, h, m, s: (0,))
    row = lambda width: pl.BlockSpec((None, None, plan.rows, width), lambda b, h, m, s: (b, h, m, 0))
    first = pl.BlockSpec((None, plan.rows, 1), lambda b, h, m, s: (b, m, 0))
    whole = _caches(key, None, positions, lambda b, h, m, s: (h, 0))
    return dispatch.pallas_call(
        functools.partial(_split_body, plan.tile, span, options),
        grid=(sequences, heads, rows // plan.rows, splits),
        in_specs=[table(lengths), *([] if window is None else [table(window.tiles), first]), row(size), whole, whole],
        out_specs=[pl.BlockSpec((None, None, None, plan.rows, width), lambda b, h, m, s: (b, h, s, m, 0))
                   for width in (size, 1, 1)],
        out_shape=_results(sequences, heads, splits, size, rows),
        name="decode_attention_split")(lengths, *(window or ()), query, key, value)


def _split_body(tile: int, span: int, options: Options, lengths: Any, *arrays: Any) -> None:
    *window, query, key, value, mixed, top, total = arrays
    positions, length, split = key.shape[0], lengths[pl.program_id(0)], pl.program_id(3)
    rows = query[...]
    if window:
        low, high = _bounds(window[0], _row_block())
        share = pl.cdiv(high - low, pl.num_programs(3))
        first, begin = window[1][...], (low + split * share) * tile
        tiles = jnp.clip(high - low - split * share, 0, share)
    else:
        first, begin = None, split * span
        visible = jnp.minimum(length, positions) - begin
        tiles = jnp.clip((visible + tile - 1) // tile, 0, span // tile)

    def add(i, carry):
        fresh = begin + i * tile
        start = jnp.minimum(fresh, positions - tile)  # the last tile ends with the cache
        at = pl.ds(start, tile)
        unseen = fresh if first is None else jnp.maximum(fresh, first)
        return _with_tile(carry, rows, key[at, :], value[at, :], (start, unseen, length), options)

    mixed[...], top[...], total[...] = jax.lax.fori_loop(0, tiles, add, _nothing(*rows.shape))


def _walk(plan: Blocks, options: Options, lengths: Array, window: Window | None, query: Array, key: Array,
          value: Array) -> tuple:
    """The last grid axis goes from tile to tile and adds to one output block. For TPUs: it runs in order.

    It is only as long as the longest sequence, because a block costs its copy to VMEM also where nothing is to do.
    With a window it is as long as the most tiles of any block of rows; each block begins at its own first tile.
    """
    sequences, heads, rows, size = query.shape
    positions, row_blocks = key.shape[-2], rows // plan.rows
    grid = sequences, heads // plan.heads, row_blocks
    asked = pl.BlockSpec((None, plan.heads, plan.rows, size), lambda b, h, m, i, *_: (b, h, m, 0))
    out_specs = [pl.BlockSpec((None, plan.heads, None, plan.rows, width), lambda b, h, m, i, *_: (b, h, 0, m, 0))
                 for width in (size, 1, 1)]
    body = functools.partial(_walk_body, positions, options)
    named = {"out_shape": _results(sequences, heads, 1, size, rows), "name": "decode_attention_walk"}
    if window is None:
        tiles = jnp.maximum(1, (jnp.minimum(lengths.max(), positions) + plan.tile - 1) // plan.tile)
        tile = _caches(key, plan.heads, plan.tile, lambda b, h, m, i: (h, i))
        scalars = pl.BlockSpec(memory_space=mosaic_tpu.SMEM) if dispatch.platform() == "tpu" else (
            pl.BlockSpec((sequences,), lambda b, h, m, i: (0,)))
        return dispatch.pallas_call(body, sequential=1, grid=(*grid, tiles), in_specs=[scalars, asked, tile, tile],
                                    out_specs=out_specs, **named)(lengths, query, key, value)

    def tile_at(b, h, m, i, _, tiles):
        low, high = _bounds(tiles, b * row_blocks + m)
        return h, jnp.minimum(low + i, jnp.maximum(high - 1, 0))  # the same block again is not copied again

    tile = _caches(key, plan.heads, plan.tile, tile_at)
    tiles = jnp.maximum(1, (window.tiles[1::2] - window.tiles[::2]).max())
    first = pl.BlockSpec((None, plan.rows, 1), lambda b, h, m, i, *_: (b, m, 0))
    scalars_first = mosaic_tpu.PrefetchScalarGridSpec(2, grid=(*grid, tiles), in_specs=[first, asked, tile, tile],
                                                      out_specs=out_specs)
    return dispatch.pallas_call(body, sequential=1, grid_spec=scalars_first, **named)(lengths, *window, query, key, value)


def _walk_body(positions: int, options: Options, lengths: Any, *arrays: Any) -> None:
    *window, query, key, value, mixed, top, total = arrays
    heads, tile, size = key.shape
    length, step = jnp.minimum(lengths[pl.program_id(0)], positions), pl.program_id(3)
    if window:
        low, high = _bounds(window[0], _row_block())
        start, unfinished = (low + step) * tile, low + step < high
    else:
        start = step * tile
        unfinished = start < length

    @pl.when(step == 0)
    def _():
        for head in range(heads):
            mixed[head], top[head], total[head] = _nothing(query.shape[1], size)

    @pl.when(unfinished)
    def _():
        fresh = window[1][...] if window else start
        for head in range(heads):
            v = value[head]
            if positions % tile:  # the last block holds garbage behind the cache, and 0 * garbage may be NaN
                row = start + jax.lax.broadcasted_iota(jnp.int32, v.shape, 0)
                v = jnp.where(row < positions, v, jnp.zeros_like(v))
            carry = mixed[head], top[head], total[head]
            mixed[head], top[head], total[head] = _with_tile(
                carry, query[head], key[head], v, (start, fresh, length), options)


def _row_block() -> Array:
    """Which block of query rows a program has, of those of all sequences; the grid is (sequences, heads, blocks, _)."""
    return pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)


def _bounds(tiles: Any, block: int | Array) -> tuple[Array, Array]:
    """The first tile of a block of rows and that behind its last."""
    return tiles[2 * block], tiles[2 * block + 1]


def _results(sequences: int, heads: int, splits: int, size: int, rows: int) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((sequences, heads, splits, rows, width), jnp.float32) for width in (size, 1, 1)]


def _nothing(rows: int, size: int) -> tuple[Array, Array, Array]:
    return (jnp.zeros((rows, size), jnp.float32), jnp.full((rows, 1), NEVER / 2, jnp.float32),
            jnp.zeros((rows, 1), jnp.float32))


def _with_tile(carry: tuple[Array, Array, Array], query: Float[Array, "M E"], key: Float[Array, "t E"],
               value: Float[Array, "t E"], place: tuple, options: Options) -> tuple[Array, Array, Array]:
    """The sums [M, E], [M, 1], [M, 1] with the positions of one tile.

    Args:
      place: position of the tile's first row, the first position that is to be added (one for all, or of each query
        [M, 1]), and the first that may not be seen.
    """
    mixed, top, total = carry
    start, fresh, length = place
    score = scores(_product(query, key, 1), query.shape[1], options)
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
