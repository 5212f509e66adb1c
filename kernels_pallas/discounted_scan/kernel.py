"""The sweeps over a block of time as Pallas kernels: a row of the arrays is a lane, steps follow each other."""
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels_pallas import dispatch
from kernels_pallas.discounted_scan import blocks, forward
from kernels_pallas.discounted_scan.forward import Rows, Steps

Lanes = Float[Array, "steps groups lanes"]


def _values(x, factor, last, y):
    def step(later, t, x, factor):
        now = x + factor * later
        y[pl.ds(t, 1)] = now
        return now

    _backwards(step, last[...], x, factor)


def _totals(x, factor, total, product):
    def step(later, t, x, factor):
        return x + factor * later[0], factor * later[1]

    nothing = jnp.zeros(total.shape, total.dtype), jnp.ones(total.shape, total.dtype)
    total[...], product[...] = _backwards(step, nothing, x, factor)


def _backwards(step: Callable, carry, x, factor):
    """carry = step(carry, t, x_t, factor_t) from the last t to the first, STEPS_READ_TOGETHER of them in flight."""
    together = blocks.STEPS_READ_TOGETHER

    def some(i, carry):
        times = [x.shape[0] - 1 - i * together - k for k in range(together)]
        read = [(t, x[pl.ds(t, 1)], factor[pl.ds(t, 1)]) for t in times]
        for t, x_t, factor_t in read:
            carry = step(carry, t, x_t, factor_t)
        return carry

    return jax.lax.fori_loop(0, x.shape[0] // together, some, carry)


def values(x: Steps, factor: Steps, last: Rows) -> Steps:
    """y_t = x_t + factor_t y_{t+1} in every row."""
    shape, time = x.shape, -x.shape[1] % blocks.STEPS_READ_TOGETHER
    x, factor, last = _lanes(x, time, 0), _lanes(factor, time, 1), _lanes(last[:, None], 0, 0)
    y = _call(_values, "values", (x, factor, last), (x,))[0]
    return y.reshape(y.shape[0], -1).T[:shape[0], :shape[1]]


def totals(x: Steps, factor: Steps) -> tuple[Rows, Rows]:
    """y at the first step of every row if 0 comes after the last, and the product of its factors."""
    rows, time = x.shape[0], -x.shape[1] % blocks.STEPS_READ_TOGETHER
    x, factor = _lanes(x, time, 0), _lanes(factor, time, 1)
    total, product = _call(_totals, "totals", (x, factor), (x[:1], x[:1]))
    return total.reshape(-1)[:rows], product.reshape(-1)[:rows]


def _lanes(x: Steps, more_time: int, neutral: int) -> Lanes:
    """Time in front of groups of 128 rows: a step is an index of an axis that no device tiles."""
    groups = -(-x.shape[0] // blocks.LANES)
    groups += -groups % blocks.groups(groups)
    more_rows = groups * blocks.LANES - x.shape[0]
    x = jnp.pad(x, ((0, more_rows), (0, more_time)), constant_values=neutral)
    return x.T.reshape(x.shape[1], groups, blocks.LANES)


def _call(body: Callable, name: str, inputs: tuple, outputs: tuple) -> tuple:
    """The body over groups of rows, all of a block's time at once; outputs give shapes."""
    count = inputs[0].shape[1]
    together = blocks.groups(count)
    spec = lambda a: pl.BlockSpec((a.shape[0], together, blocks.LANES), lambda i: (0, i, 0))
    return dispatch.pallas_call(
        body, grid=(count // together,), in_specs=[spec(a) for a in inputs], out_specs=[spec(a) for a in outputs],
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in outputs], name=f"discounted_scan_{name}")(*inputs)


PASSES = forward.Passes(totals, values)
