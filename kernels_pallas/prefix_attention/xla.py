"""Plain XLA: all scores of one tile of queries at a time, and none of the keys behind it."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from kernels_pallas.prefix_attention import blocks, joint
from kernels_pallas.prefix_attention.operands import Operands
from kernels_pallas.prefix_attention.reference import NEVER, scores
from kernels_pallas.prefix_attention.visibility import Intervals, Options

FAR = "pkgrte,pkse->pkgrts"
NEAR = "pkgrte,pkgue->pkgrtu"


class Weights(NamedTuple):
    """The attention weights of one tile."""

    far: Float32[Array, "P K G R t S"]
    near: Float32[Array, "P K G R t u"]


def attend(operands: Operands, intervals: Intervals, options: Options) -> tuple[Float[Array, "P K G R T E"], Any]:
    """(out, what the backward pass needs beside it): the weights where they are few, else each row's log-sum-exp."""
    tokens = operands.query.shape[4]
    tile = blocks.query_tile(tokens)
    if tile == tokens and blocks.keeps_weights(operands, options):
        return joint.attend(operands, intervals, options)
    parts = [_attend_tile(operands, intervals, options, start, min(start + tile, tokens))
             for start in range(0, tokens, tile)]
    out, log_total = zip(*parts, strict=True)
    return jnp.concatenate(out, axis=4), jnp.concatenate(log_total, axis=4)


def cotangents(operands: Operands, intervals: Intervals, options: Options, results: tuple,
               d_out: Float[Array, "P K G R T E"]) -> Operands:
    """Cotangents of the operands.

    Args:
      operands, intervals, options: as in `attend`.
      results: of `attend`.
      d_out: cotangent of out.
    """
    out, kept = results
    if isinstance(kept, joint.Kept):
        return joint.cotangents(operands, options, out, kept, d_out)
    # Where forward and backward pass stand in one program, XLA would else keep the scores of the one for the other.
    # (The CPU compiler of jax 0.10 drops the barrier and does so; that of 0.12 keeps it.)
    operands, d_out = jax.lax.optimization_barrier((operands, d_out))
    tokens = operands.query.shape[4]
    tile = blocks.query_tile(tokens)
    d_query = []
    total = [jnp.zeros(x.shape, jnp.float32) for x in operands[1:]] if tile < tokens else None
    for start in range(0, tokens, tile):
        stop = min(start + tile, tokens)
        rows = (..., slice(start, stop), slice(None))
        weights = _weights(operands, intervals, options, start, stop, kept[..., start:stop])
        new, *parts = _tile_cotangents(operands, options, weights, out[rows], d_out[rows], (start, stop))
        d_query.append(new)
        if total is None:
            return Operands(*(x.astype(y.dtype) for x, y in zip((new, *parts), operands, strict=True)))
        d_key, d_value, d_prompt_key, d_prompt_value = parts
        total = [total[0].at[..., :stop, :].add(d_key), total[1].at[..., :stop, :].add(d_value),
                 total[2] + d_prompt_key, total[3] + d_prompt_value]
    d_query = jnp.concatenate(d_query, axis=4)
    return Operands(*(x.astype(y.dtype) for x, y in zip((d_query, *total), operands, strict=True)))


def _attend_tile(operands, intervals, options, start: int, stop: int):
    """out and log-sum-exp of the queries start .. stop - 1."""
    far, near = _scores(operands, intervals, options, start, stop)
    top = jnp.maximum(far.max(axis=-1, initial=NEVER), near.max(axis=-1))
    far, near = jnp.exp(far - top[..., None]), jnp.exp(near - top[..., None])
    total = far.sum(axis=-1) + near.sum(axis=-1)
    prompt_value, value = operands.prompt_value, operands.value[..., :stop, :]
    mixed = (_product("pkgrts,pkse->pkgrte", far.astype(value.dtype), prompt_value)
             + _product("pkgrtu,pkgue->pkgrte", near.astype(value.dtype), value))
    out = (mixed / total[..., None]).astype(operands.query.dtype)
    return out, top + jnp.log(total)


def _weights(operands, intervals, options, start: int, stop: int, log_total: Float32[Array, "P K G R t"]) -> Weights:
    far, near = _scores(operands, intervals, options, start, stop)
    far, near = jnp.exp(far - log_total[..., None]), jnp.exp(near - log_total[..., None])
    return Weights(far, near)


def _scores(operands, intervals, options, start: int, stop: int):
    far, near = _products(operands, start, stop)
    size = operands.query.shape[-1]
    now = jnp.arange(start, stop)[None, None, :]
    parts = Intervals(*(x if x is None or x.shape[2] == 1 else x[:, :, start:stop] for x in intervals))
    return (jnp.where(joint.between(parts.far_from, parts.far_to - 1, far.shape[-1]), scores(far, size, options), NEVER),
            jnp.where(joint.between(parts.near_from, now, stop), scores(near, size, options), NEVER))


def _products(operands, start: int, stop: int):
    query = operands.query[..., start:stop, :]
    return _product(FAR, query, operands.prompt_key), _product(NEAR, query, operands.key[..., :stop, :])


def _tile_cotangents(operands, options, weights: Weights, out, d_out, tile: tuple[int, int]):
    """Of the tile's queries, of the keys and values that it sees, of the prompt's keys and values."""
    start, stop = tile
    query, key, value = operands.query[..., start:stop, :], operands.key[..., :stop, :], operands.value[..., :stop, :]
    d_mixed = d_out.astype(jnp.float32)
    delta = (d_mixed * out).sum(axis=-1, keepdims=True)
    d_mixed = d_mixed.astype(value.dtype)
    d_far = weights.far * (_product(FAR, d_mixed, operands.prompt_value) - delta)
    d_near = weights.near * (_product(NEAR, d_mixed, value) - delta)
    if options.soft_cap is not None:
        d_far, d_near = (x * _slope(z, query.shape[-1], options)
                         for x, z in zip((d_far, d_near), _products(operands, start, stop), strict=True))
    scale = query.shape[-1]**-0.5 if options.scale is None else options.scale
    d_far, d_near = (d_far * scale).astype(query.dtype), (d_near * scale).astype(query.dtype)
    d_query = (_product("pkgrts,pkse->pkgrte", d_far, operands.prompt_key)
               + _product("pkgrtu,pkgue->pkgrte", d_near, key))
    return (d_query, _product("pkgrtu,pkgrte->pkgue", d_near, query),
            _product("pkgrtu,pkgrte->pkgue", weights.near.astype(value.dtype), d_mixed),
            _product("pkgrts,pkgrte->pkse", d_far, query),
            _product("pkgrts,pkgrte->pkse", weights.far.astype(value.dtype), d_mixed))


def _slope(products, size: int, options: Options):
    """d score / d (scale q k) under the cap."""
    return 1 - (scores(products, size, options) / options.soft_cap) ** 2


def _product(axes: str, a, b):
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)
