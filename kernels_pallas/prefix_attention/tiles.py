"""Which tiles meet: so that a kernel's loops run over no tile of which nothing is seen."""
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as mosaic_tpu
from jaxtyping import Array, Bool, Int32

from kernels_pallas import dispatch
from kernels_pallas.prefix_attention import blocks
from kernels_pallas.prefix_attention.operands import Operands
from kernels_pallas.prefix_attention.visibility import Intervals


class Plan(NamedTuple):
    """What the kernels know beside the operands.

    Attributes:
      tile: positions per tile.
      sees: [P, G, 3, T] int32: near_from, far_from and far_to of every token.
      near, far: [P, G, query tiles, key tiles]: some token of the one sees some of the other.
    """

    tile: blocks.Tiles
    sees: Array
    near: Array
    far: Array


def padded(operands: Operands, tile: blocks.Tiles) -> Operands:
    """The operands with zeros behind T, S and E, up to whole tiles and a power of two."""
    size = blocks.power_of_two(operands.query.shape[-1])

    def to(x, tile):
        behind = blocks.up_to(max(x.shape[-2], 1), tile) - x.shape[-2], size - x.shape[-1]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more) for more in behind])

    return Operands(*(to(x, tile.own) for x in operands[:3]), *(to(x, tile.prompt) for x in operands[3:]))


def plan(operands: Operands, intervals: Intervals) -> Plan:
    """The plan of a call; the tokens that fill the last tile see nothing."""
    p, _, g, _, t, e = operands.query.shape
    s = operands.prompt_key.shape[2]
    tile = blocks.tiles(t, s, e)
    behind = blocks.up_to(t, tile.own) - t
    given = (jnp.broadcast_to(jnp.int32(0) if x is None else x, (p, g, t)) for x in intervals)
    near_from, far_from, far_to = (jnp.pad(x, [(0, 0), (0, 0), (0, behind)], constant_values=last)
                                   for x, last in zip(given, (t + behind, 0, 0), strict=True))
    now = jnp.broadcast_to(jnp.arange(t + behind)[None, None, :], near_from.shape)
    return Plan(tile, jnp.stack([near_from, far_from, far_to], axis=2),
                _meet(near_from, now + 1, tile.own, tile.own), _meet(far_from, far_to, tile.own, tile.prompt, s))


def _meet(first: Int32[Array, "P G T"], stop: Int32[Array, "P G T"], query_tile: int, key_tile: int,
          keys: int | None = None) -> Bool[Array, "P G I J"]:
    p, g, t = first.shape
    count = blocks.up_to(max(t if keys is None else keys, 1), key_tile) // key_tile
    some = first < stop
    by_tile = lambda x: x.reshape(p, g, t // query_tile, query_tile)
    low = by_tile(jnp.where(some, first, t + (keys or 0))).min(axis=3)
    high = by_tile(jnp.where(some, stop, 0)).max(axis=3)
    start = jnp.arange(count)[None, None, None, :] * key_tile
    return (low[..., None] < start + key_tile) & (start < high[..., None])


def ranges(meet: Bool[Array, "P G I J"]) -> Int32[Array, "1 M"]:
    """From the first to behind the last j that meets each i: two numbers at 2 ((p G + g) I + i).

    The axis of length 1 keeps a `vmap` over the kernel legal on a TPU.
    """
    low = jnp.argmax(meet, axis=3)
    high = meet.shape[3] - jnp.argmax(meet[..., ::-1], axis=3)
    both = jnp.stack([low, high], axis=3)
    return jnp.where(meet.any(axis=3)[..., None], both, 0).astype(jnp.int32).reshape(1, -1)


def table() -> pl.BlockSpec:
    """A whole array of numbers that steer loops: a TPU reads those from its scalar memory."""
    return pl.BlockSpec(memory_space=mosaic_tpu.SMEM) if dispatch.platform() == "tpu" else pl.BlockSpec()


def at(i: int | Int32[Array, ""], size: int) -> pl.Slice:
    """Positions of tile i."""
    return pl.ds(pl.multiple_of(i * size, size), size)
