"""Bands that differ per token against loops over Python floats, and the formula sheets' numbers."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.loss import bounds
from tests import numeric

LOGP = -3 * np.abs(numeric.normal(0, 4, 5))
H = np.clip(numeric.normal(1, 4, 5), -1, 1)
LOW, HIGH, CAP = 0.16, 0.2, 10.0


def oracle_by_probability(logp):
    q = math.exp(logp)
    return (0.5 - 0.5 * math.sqrt(max(1 - 4 * LOW / q, 0)), min(0.5 + 0.5 * math.sqrt(1 + 4 * HIGH / q), CAP) - 1)


def oracle_by_entropy(h, strength=0.7):
    return (LOW * (1 - strength * h), HIGH) if h <= 0 else (LOW, HIGH * (1 + strength * h))


CASES = [(functools.partial(bounds.by_probability, low=LOW, high=HIGH, cap=CAP), LOGP, oracle_by_probability),
         (functools.partial(bounds.by_entropy, low=LOW, high=HIGH, strength=0.7), H, oracle_by_entropy)]


@pytest.mark.parametrize("function, values, oracle", CASES, ids=["probability", "entropy"])
@pytest.mark.parametrize("side", [0, 1])
def test_against_loops(function, values, oracle, side):
    found = numeric.in_float64(lambda v: function(v)[side], values)
    np.testing.assert_allclose(found.ravel(), [oracle(v)[side] for v in values.flat], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function, values", [case[:2] for case in CASES], ids=["probability", "entropy"])
def test_bands_are_constants(function, values):
    gradient = jax.grad(lambda v: sum(side.sum() for side in function(v)))(jnp.asarray(values, jnp.float32))
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("q, bottom, top", [(0.9, 0.768742, 1.187184), (0.5, 0.5, 1.306226), (0.01, 0.5, 5.0),
                                            (0.001, 0.5, 10.0), (1.0, 0.8, 1.170820)])
def test_by_probability_worked_examples(q, bottom, top):
    # Formula sheet of DCPO: epsilon .16 and .2, cap 10.
    low, high = bounds.by_probability(jnp.log(jnp.full((1, 1), q)), LOW, HIGH)
    np.testing.assert_allclose([1 - low[0, 0], 1 + high[0, 0]], [bottom, top], rtol=2e-6)


def both(logp):
    return numeric.in_float64(lambda logp: jnp.stack(bounds.by_probability(logp, LOW, HIGH)), logp)


def test_at_both_ends_the_ratio_times_the_new_probability_is_epsilon():
    """|r - 1| p = epsilon with p = q r, wherever neither the cap nor the lower end's floor holds."""
    q = np.linspace(0.65, 1, 8)[None, :]
    low, high = both(np.log(q))
    for r, epsilon in ((1 - low, LOW), (1 + high, HIGH)):
        np.testing.assert_allclose(np.abs(r - 1) * q * r, epsilon, rtol=1e-9)


def test_the_band_widens_as_the_old_probability_falls():
    logp = np.linspace(0, -12, 60)[None, :]
    low, high = both(logp)[:, 0]
    assert (np.diff(low) >= 0).all() and (np.diff(high) >= 0).all()
    assert (np.diff(high[high < CAP - 1]) > 0).all() and (np.diff(low[low < 0.5]) > 0).all()


@pytest.mark.parametrize("logp", [-50.0, -88.0, -200.0, -np.inf])
def test_however_improbable_the_band_is_finite(logp):
    low, high = bounds.by_probability(jnp.full((1, 1), logp), LOW, HIGH)
    np.testing.assert_array_equal([low, high], [[[0.5]], [[9.0]]])
    np.testing.assert_array_equal(bounds.by_probability(jnp.full((1, 1), logp), 0.0, 0.0), 0.0)


def test_by_entropy_widens_the_lower_side_of_sure_tokens_and_the_upper_side_of_unsure_ones():
    # Formula sheet of HAPO: alpha 1, both half-widths .2, its example of h.
    low, high = bounds.by_entropy(jnp.array([[-1.0, -0.5, 0.0, 1.0]]), 0.2, 0.2, 1.0)
    np.testing.assert_allclose(low, [[0.4, 0.3, 0.2, 0.2]], rtol=1e-6)
    np.testing.assert_allclose(high, [[0.2, 0.2, 0.2, 0.4]], rtol=1e-6)


def test_by_entropy_switched_off_is_one_band():
    low, high = bounds.by_entropy(jnp.asarray(H, jnp.float32), 0.2, 0.28, 0.0)
    np.testing.assert_array_equal([low, high], np.broadcast_to(np.float32([0.2, 0.28])[:, None, None], (2, 4, 5)))
