"""Plain XLA for short rows: every row with a copy of its prompt's keys, one softmax over both, the weights kept."""
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from kernels_pallas.prefix_attention.operands import Operands
from kernels_pallas.prefix_attention.reference import NEVER
from kernels_pallas.prefix_attention.visibility import Intervals, Options


class Kept(NamedTuple):
    """weight * shrink are the attention weights of the M = R T queries to the U = S + T positions of prompt and row."""

    weight: Float32[Array, "P K G M U"]
    shrink: Float32[Array, "P K G M 1"]


def attend(operands: Operands, intervals: Intervals, options: Options) -> tuple[Float[Array, "P K G R T E"], Kept]:
    """(out, what the backward pass needs beside it), for scores without a bound."""
    key, value = _keys_and_values(operands)
    products = _product("pkgme,pkgue->pkgmu", _rows(operands.query), key)
    score = products * _scale(operands, options) + _bias(operands, intervals)
    weight = jnp.exp(score - score.max(axis=-1, keepdims=True))
    shrink = 1 / weight.sum(axis=-1, keepdims=True)
    out = _product("pkgmu,pkgue->pkgme", weight.astype(value.dtype), value) * shrink
    return out.astype(value.dtype).reshape(operands.query.shape), Kept(weight, shrink)


def cotangents(operands: Operands, options: Options, out: Float[Array, "P K G R T E"], kept: Kept,
               d_out: Float[Array, "P K G R T E"]) -> Operands:
    """Cotangents of the operands.

    Args:
      operands, options: as in `attend`.
      out, kept: its results.
      d_out: cotangent of out.
    """
    key, value = _keys_and_values(operands)
    query, positions = _rows(operands.query), operands.prompt_key.shape[2]
    d_mixed = _rows(d_out).astype(jnp.float32) * kept.shrink
    delta = (d_mixed * _rows(out)).sum(axis=-1, keepdims=True)
    d_mixed = d_mixed.astype(value.dtype)
    d_score = kept.weight * (_product("pkgme,pkgue->pkgmu", d_mixed, value) - delta) * _scale(operands, options)
    d_score = d_score.astype(query.dtype)
    d_query = _product("pkgmu,pkgue->pkgme", d_score, key).reshape(operands.query.shape)
    d_key = _product("pkgmu,pkgme->pkgue", d_score, query)
    d_value = _product("pkgmu,pkgme->pkgue", kept.weight.astype(value.dtype), d_mixed)
    found = (d_query, d_key[..., positions:, :], d_value[..., positions:, :],
             d_key[..., :positions, :].sum(axis=2), d_value[..., :positions, :].sum(axis=2))
    return Operands(*(x.astype(y.dtype) for x, y in zip(found, operands, strict=True)))


def between(first: Array | None, last: Array, size: int) -> Bool[Array, "P 1 G 1 t U"]:
    """first <= position <= last, for the positions 0 .. size - 1.

    Args:
      first, last: broadcast to [P, G, t]; first None: 0.
    """
    position = jnp.arange(size)[None, None, None, None, None, :]
    wide = lambda x: x[:, None, :, None, :, None]
    inside = position <= wide(last)
    return inside if first is None else inside & (position >= wide(first))


def _bias(operands: Operands, intervals: Intervals) -> Float32[Array, "p 1 g M U"]:
    """0 where a position is seen, NEVER elsewhere."""
    r, tokens = operands.query.shape[3:5]
    now = jnp.arange(tokens)[None, None, :]
    parts = (between(intervals.far_from, intervals.far_to - 1, operands.prompt_key.shape[2]),
             between(intervals.near_from, now, tokens))
    lead = jnp.broadcast_shapes(*(part.shape[:-1] for part in parts))
    seen = jnp.concatenate([jnp.broadcast_to(part, (*lead, part.shape[-1])) for part in parts], axis=-1)
    bias = jnp.where(seen, 0.0, NEVER)
    p, _, g, _, t, u = bias.shape
    return jnp.broadcast_to(bias, (p, 1, g, r, t, u)).reshape(p, 1, g, r * t, u)


def _keys_and_values(operands: Operands) -> tuple[Float[Array, "P K G U E"], Float[Array, "P K G U E"]]:
    group = operands.key.shape[2]

    def joined(prompt, own):
        copies = jnp.broadcast_to(prompt[:, :, None], (*prompt.shape[:2], group, *prompt.shape[2:]))
        return jnp.concatenate([copies, own], axis=3)

    return joined(operands.prompt_key, operands.key), joined(operands.prompt_value, operands.value)


def _rows(x: Float[Array, "P K G R T E"]) -> Float[Array, "P K G M E"]:
    p, k, g, r, t, e = x.shape
    return x.reshape(p, k, g, r * t, e)


def _scale(operands: Operands, options: Options) -> float:
    return operands.query.shape[-1]**-0.5 if options.scale is None else options.scale


def _product(axes: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float32[Array, "..."]:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)
