"""One kernel: online softmax over the prompt's tiles, then over the row's own up to the diagonal.

Scores stand transposed, [keys, queries]: what is known of a query is then a row, and the result leaves as [E, T].
"""
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Float32, Int

from kernels_pallas import dispatch
from kernels_pallas.prefix_attention import blocks, tiles
from kernels_pallas.prefix_attention.operands import Operands
from kernels_pallas.prefix_attention.reference import NEVER, scores
from kernels_pallas.prefix_attention.visibility import Intervals, Options

Scalar = int | Int[Array, ""]


def attend(operands: Operands, intervals: Intervals,
           options: Options) -> tuple[Float[Array, "P K G R T E"], Float32[Array, "P K G R 1 U"]]:
    """(out, log-sum-exp of every query's scores, in nats; the latter for whole tiles of queries)."""
    (p, k, g, r, t, e), plan = operands.query.shape, tiles.plan(operands, intervals)
    options = options._replace(scale=e**-0.5 if options.scale is None else options.scale)
    given = tiles.padded(operands, plan.tile)
    rows, size = given.query.shape[4:]
    body = functools.partial(_body, options=options, tile=plan.tile)
    out, log_total = dispatch.pallas_call(
        body, name="prefix_attention", warps=blocks.warps(size), grid=(p, k, g, r, rows // plan.tile.own),
        in_specs=[tiles.table(), tiles.table(), query_tile(plan.tile.own, size), own(rows, size), own(size, rows),
                  prompt(*given.prompt_key.shape[2:]), prompt(*given.prompt_value.shape[:1:-1]),
                  pl.BlockSpec((None, None, 3, plan.tile.own), lambda p, k, g, r, i: (p, g, 0, i))],
        out_specs=[query_row(size, plan.tile.own), query_row(1, plan.tile.own)],
        out_shape=[jax.ShapeDtypeStruct((p, k, g, r, size, rows), given.query.dtype),
                   jax.ShapeDtypeStruct((p, k, g, r, 1, rows), jnp.float32)],
    )(tiles.ranges(plan.near), tiles.ranges(plan.far), given.query, given.key, given.value.mT,
      given.prompt_key, given.prompt_value.mT, plan.sees)
    return out.mT[..., :t, :e], log_total


def query_tile(tile: int, size: int) -> pl.BlockSpec:
    """[tile, size] of an array [P, K, G, R, T, size] on the grid (P, K, G, R, query tiles)."""
    return pl.BlockSpec((None, None, None, None, tile, size), lambda p, k, g, r, i: (p, k, g, r, i, 0))


def query_row(size: int, tile: int) -> pl.BlockSpec:
    """[size, tile] of an array [P, K, G, R, size, T] on that grid."""
    return pl.BlockSpec((None, None, None, None, size, tile), lambda p, k, g, r, i: (p, k, g, r, 0, i))


def own(rows: int, columns: int) -> pl.BlockSpec:
    """The whole [rows, columns] of a row's keys or values on that grid."""
    return pl.BlockSpec((None, None, None, rows, columns), lambda p, k, g, r, i: (p, k, g, 0, 0))


def prompt(rows: int, columns: int) -> pl.BlockSpec:
    """The whole [rows, columns] of a prompt's keys or values on that grid."""
    return pl.BlockSpec((None, None, rows, columns), lambda p, k, g, r, i: (p, k, 0, 0))


def sees_own(row: Callable[[int], Array], key_start: Scalar, query_start: Scalar,
             shape: tuple[int, int]) -> Bool[Array, "u t"]:
    """Which of a tile's queries (columns) sees which of a tile of its row's keys.

    Args:
      row: i -> [1, t], near_from, far_from or far_to of the queries, as in `tiles.Plan`.
      key_start, query_start: first positions of the two tiles.
      shape: (u, t).
    """
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + key_start
    query = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + query_start
    return (key >= row(0)) & (key <= query)


def sees_prompt(row: Callable[[int], Array], key_start: Scalar, query_start: Scalar,
                shape: tuple[int, int]) -> Bool[Array, "s t"]:
    """Which of a tile's queries (columns) sees which of a tile of its prompt's keys; arguments as in `sees_own`."""
    del query_start
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + key_start
    return (key >= row(1)) & (key < row(2))


def product(a: Array, b: Array, a_axis: int, b_axis: int) -> Float32[Array, "..."]:
    """Matrix product summed over one axis of each, in float32."""
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def loop_bounds(table: Any, row: Scalar) -> tuple[Array, Array]:
    """(first tile, behind the last) of one row of `tiles.ranges`."""
    return table[0, 2 * row], table[0, 2 * row + 1]


def _body(near, far, query, key, value, prompt_key, prompt_value, sees, out, log_total, *, options, tile):
    i = pl.program_id(4)
    row = (pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)) * pl.num_programs(4) + i
    q, row_of = query[...], lambda n: sees[n:n + 1, :]
    size = q.shape[1]

    def add(seen, keys, values, visible):
        top, total, mixed = seen
        score = jnp.where(visible, scores(product(keys, q, 1, 1), size, options), NEVER)
        new_top = jnp.maximum(top, score.max(axis=0, keepdims=True))
        shrink, weight = jnp.exp(top - new_top), jnp.exp(score - new_top)
        mixed = mixed * shrink + product(values, weight.astype(values.dtype), 1, 0)
        return new_top, total * shrink + weight.sum(axis=0, keepdims=True), mixed

    def add_prompt(j, seen):
        at = tiles.at(j, tile.prompt)
        visible = sees_prompt(row_of, j * tile.prompt, 0, (tile.prompt, tile.own))
        return add(seen, prompt_key[at, :], prompt_value[:, at], visible)

    def add_own(j, seen):
        at = tiles.at(j, tile.own)
        visible = sees_own(row_of, j * tile.own, i * tile.own, (tile.own, tile.own))
        return add(seen, key[at, :], value[:, at], visible)

    every = lambda number: jnp.full((1, tile.own), number, jnp.float32)
    seen = every(NEVER / 2), every(0), jnp.zeros((size, tile.own), jnp.float32)
    seen = jax.lax.fori_loop(*loop_bounds(far, row), add_prompt, seen)
    top, total, mixed = jax.lax.fori_loop(*loop_bounds(near, row), add_own, seen)
    total = jnp.where(total == 0, 1.0, total)
    out[...] = (mixed / total).astype(out.dtype)
    log_total[...] = top + jnp.log(total)
