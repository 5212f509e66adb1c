"""The recursion over blocks of time: what each block adds and keeps, then what comes after each, then every step."""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.discounted_scan import blocks, reference

Steps = Float[Array, "N T"]
Rows = Float[Array, " N"]


class Passes(NamedTuple):
    """The two sweeps over one block of time in every row.

    totals: (x, factor) -> (y at the first step if 0 comes after the last, product of the factors).
    values: (x, factor, last) -> y.
    """

    totals: Callable[[Steps, Steps], tuple[Rows, Rows]]
    values: Callable[[Steps, Steps, Rows], Steps]


def scan(passes: Passes, x: Steps, factor: Steps, last: Rows) -> Steps:
    """y_t = x_t + factor_t y_{t+1}.

    A block obeys the same recursion as a step: y at its first step is its total plus its product times y after it. So
    blocks are rows that are swept side by side, and between them runs this scan over fewer, longer steps.

    Args:
      passes: the sweeps over a block.
      x: what each step adds.
      factor: of what comes after each step, dimensionless.
      last: y after the last step.
    """
    rows, time = x.shape
    block = blocks.steps(time)
    if block == time:
        return passes.values(x, factor, last)
    x, factor = _cut(x, block, 0), _cut(factor, block, 1)
    totals, products = (part.reshape(rows, -1) for part in passes.totals(x, factor))
    at_first_steps = scan(passes, totals, products, last)
    after = jnp.concatenate([at_first_steps[:, 1:], last[:, None]], axis=1)
    return passes.values(x, factor, after.reshape(-1)).reshape(rows, -1)[:, :time]


def _cut(x: Steps, block: int, neutral: int) -> Float[Array, "blocks block"]:
    """Blocks of time as rows, the last filled up with steps that change nothing."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), constant_values=neutral).reshape(-1, block)


def _totals(x: Steps, factor: Steps) -> tuple[Rows, Rows]:
    def earlier(later, now):
        (total, product), (x, factor) = later, now
        return (x + factor * total, factor * product), None

    nothing = jnp.zeros_like(x[:, 0]), jnp.ones_like(x[:, 0])
    return jax.lax.scan(earlier, nothing, (x.T, factor.T), reverse=True)[0]


PASSES = Passes(_totals, reference.discounted_scan)
