"""Three kernels, each computing its scores a second time: of the queries, of a row's keys, of a prompt's keys.

The two of keys add over everything that sees them: the programs that add to one block follow each other on a TPU,
and are one program on a GPU. So the sum has one order, and is the same every time.
"""
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels_pallas import dispatch
from kernels_pallas.prefix_attention import blocks, forward, tiles
from kernels_pallas.prefix_attention.forward import product
from kernels_pallas.prefix_attention.operands import Operands
from kernels_pallas.prefix_attention.reference import scores
from kernels_pallas.prefix_attention.visibility import Intervals, Options


class Source(NamedTuple):
    """Keys and values that queries see, and which do.

    Attributes:
      key, value: [P, K, U, J tile, E]: U is G for a row's own, 1 for a prompt's.
      meet: [P, G, query tiles, J], of `tiles.Plan`.
      visible: `forward.sees_own` or `forward.sees_prompt`.
    """

    key: Array
    value: Array
    meet: Array
    visible: Callable[..., Array]


def cotangents(operands: Operands, intervals: Intervals, options: Options, results: tuple,
               d_out: Float[Array, "P K G R T E"]) -> Operands:
    """Cotangents of the operands.

    Args:
      operands, intervals, options: as in `forward.attend`.
      results: of `forward.attend`.
      d_out: cotangent of out.
    """
    out, log_total = results
    e = operands.query.shape[5]
    options = options._replace(scale=e**-0.5 if options.scale is None else options.scale)
    plan = tiles.plan(operands, intervals)
    given = tiles.padded(operands, plan.tile)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)[..., None, :]
    delta = jnp.pad(delta, [(0, 0)] * 5 + [(0, log_total.shape[5] - delta.shape[5])])
    d_out = jnp.pad(d_out, [(0, y - x) if i > 3 else (0, 0)
                            for i, (x, y) in enumerate(zip(d_out.shape, given.query.shape, strict=True))])
    rows = d_out, log_total, delta
    with_axis = lambda x: x[:, :, None]
    own = Source(given.key, given.value, plan.near, forward.sees_own)
    prompt = Source(with_axis(given.prompt_key), with_axis(given.prompt_value), plan.far, forward.sees_prompt)
    found = (_of_queries(given, plan, rows, options), *_of_keys(given.query, own, plan.sees, rows, options),
             *(x[:, :, 0] for x in _of_keys(given.query, prompt, plan.sees, rows, options)))
    return Operands(*(x[..., :y.shape[-2], :e].astype(y.dtype) for x, y in zip(found, operands, strict=True)))


def _of_queries(given: Operands, plan: tiles.Plan, rows: tuple, options: Options):
    (p, k, g, r, t, size), tile = given.query.shape, plan.tile.own
    s = given.prompt_key.shape[2]
    own, own_t = forward.own(t, size), forward.own(size, t)
    prompt, prompt_t = forward.prompt(s, size), forward.prompt(size, s)
    query, row = forward.query_tile(tile, size), forward.query_row(1, tile)
    return dispatch.pallas_call(
        functools.partial(_queries_body, options=options, tile=plan.tile), name="prefix_attention_queries",
        warps=blocks.warps(size), grid=(p, k, g, r, t // tile),
        in_specs=[tiles.table(), tiles.table(), query, own, own_t, own, prompt, prompt_t, prompt,
                  pl.BlockSpec((None, None, 3, tile), lambda p, k, g, r, i: (p, g, 0, i)), query, row, row],
        out_specs=forward.query_row(size, tile),
        out_shape=jax.ShapeDtypeStruct((p, k, g, r, size, t), given.query.dtype),
    )(tiles.ranges(plan.near), tiles.ranges(plan.far), given.query, given.key, given.key.mT, given.value,
      given.prompt_key, given.prompt_key.mT, given.prompt_value, plan.sees, *rows).mT


def _queries_body(near, far, query, key, key_t, value, prompt_key, prompt_key_t, prompt_value, sees, d_out, log_total,
                  delta, d_query, *, options, tile):
    i = pl.program_id(4)
    row = (pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)) * pl.num_programs(4) + i
    q, d, known, row_of = query[...], d_out[...], (log_total[...], delta[...]), lambda n: sees[n:n + 1, :]

    def add_prompt(j, total):
        at = tiles.at(j, tile.prompt)
        visible = forward.sees_prompt(row_of, j * tile.prompt, 0, (tile.prompt, tile.own))
        _, d_score = _weights(prompt_key[at, :], prompt_value[at, :], q, d, known, visible, options)
        return total + product(prompt_key_t[:, at], d_score, 1, 0)

    def add_own(j, total):
        at = tiles.at(j, tile.own)
        visible = forward.sees_own(row_of, j * tile.own, i * tile.own, (tile.own, tile.own))
        _, d_score = _weights(key[at, :], value[at, :], q, d, known, visible, options)
        return total + product(key_t[:, at], d_score, 1, 0)

    total = jnp.zeros((q.shape[1], tile.own), jnp.float32)
    total = jax.lax.fori_loop(*forward.loop_bounds(far, row), add_prompt, total)
    total = jax.lax.fori_loop(*forward.loop_bounds(near, row), add_own, total)
    d_query[...] = total.astype(d_query.dtype)


def _of_keys(query: Array, source: Source, sees: Array, rows: tuple, options: Options) -> tuple[Array, Array]:
    """Cotangents of a source's keys and values, in float32.

    The grid is (P, K, U, J, G / U / A, R / B): a program adds over A rows of the group and B heads.
    """
    (p, k, g, r, t, size), (u, length) = query.shape, source.key.shape[2:4]
    count, tile = source.meet.shape[3], length // source.meet.shape[3]
    group, heads = blocks.at_once(g // u), blocks.at_once(r)
    steps = g // u // group
    whole = lambda *rows: pl.BlockSpec((None, None, group, heads, *rows),
                                       lambda p, k, u, j, g, r: (p, k, u * steps + g, r, 0, 0))
    part = pl.BlockSpec((None, None, None, tile, size), lambda p, k, u, j, g, r: (p, k, u, j, 0))
    return dispatch.pallas_call(
        functools.partial(_keys_body, options=options, query_tile=t // source.meet.shape[2], visible=source.visible),
        name="prefix_attention_keys", warps=blocks.warps(size), sequential=2,
        grid=(p, k, u, count, steps, r // heads),
        in_specs=[tiles.table(), part, part, whole(t, size),
                  pl.BlockSpec((None, group, 3, t), lambda p, k, u, j, g, r: (p, u * steps + g, 0, 0)),
                  whole(t, size), whole(1, t), whole(1, t)],
        out_specs=(part, part),
        out_shape=(jax.ShapeDtypeStruct(source.key.shape, jnp.float32),) * 2,
    )(tiles.ranges(source.meet.mT), source.key, source.value, query, sees, *rows)


def _keys_body(table, key, value, query, sees, d_out, log_total, delta, d_key, d_value, *, options, query_tile,
               visible):
    group, heads = query.shape[:2]
    j, tiles_of_keys, keys, values = pl.program_id(3), pl.num_programs(3), key[...], value[...]
    steps, is_first = pl.num_programs(4), (pl.program_id(4) == 0) & (pl.program_id(5) == 0)
    first_row = ((pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)) * steps + pl.program_id(4)) * group

    def add_tile(g, r, i, total):
        at = tiles.at(i, query_tile)
        q, d = query[g, r, at, :], d_out[g, r, at, :]
        seen = visible(lambda n: sees[g, n:n + 1, at], j * keys.shape[0], i * query_tile, (keys.shape[0], query_tile))
        weight, d_score = _weights(keys, values, q, d, (log_total[g, r, :, at], delta[g, r, :, at]), seen, options)
        return total[0] + product(d_score, q, 1, 0), total[1] + product(weight, d, 1, 0)

    def add_row(g, total):
        bounds = forward.loop_bounds(table, (first_row + g) * tiles_of_keys + j)
        return jax.lax.fori_loop(0, heads, lambda r, total: jax.lax.fori_loop(
            *bounds, lambda i, total: add_tile(g, r, i, total), total), total)

    nothing = jnp.zeros(keys.shape, jnp.float32)
    found = jax.lax.fori_loop(0, group, add_row, (nothing, nothing))

    @pl.when(is_first)
    def _():
        d_key[...], d_value[...] = nothing, nothing

    d_key[...] += found[0]
    d_value[...] += found[1]


def _weights(keys: Array, values: Array, query: Array, d_out: Array, known: tuple, visible: Array, options: Options):
    """Attention weights and cotangents of the products q k, both [keys, queries] and in the operands' dtype.

    With w the weights and s the scores: d s = w (v d_out - delta), where delta is the sum of out d_out over a row.
    """
    log_total, delta = known
    score = scores(product(keys, query, 1, 1), query.shape[1], options)
    weight = jnp.where(visible, jnp.exp(score - log_total), 0.0)
    d_score = weight * (product(values, d_out, 1, 1) - delta)
    if options.soft_cap is not None:
        d_score *= 1 - (score / options.soft_cap) ** 2
    return weight.astype(d_out.dtype), (d_score * options.scale).astype(query.dtype)
