"""The bent score against the formula, and the numbers of TempSamp-R1's formula sheet."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.reward import shaping
from tests import numeric

SCORE = np.array([-0.3, 0.0, 0.2, 0.5, 0.79, 0.8, 0.81, 1.0, 1.7])


def oracle(r, threshold, above, below):
    if r >= threshold:
        return threshold + above * math.log(r - threshold + 1)
    if below <= 0:
        return r
    return threshold - (math.exp(below * (threshold - r)) - 1) / (math.exp(below) - 1)


@pytest.mark.parametrize("threshold, above, below", [(0.8, 0.01, 1.0), (0.5, 0.3, 4.0), (0.8, 0.01, 0.0),
                                                     (0.8, 0.5, -1.0)])
def test_against_the_formula(threshold, above, below):
    found = numeric.in_float64(shaping.flattened_above, SCORE, threshold, above, below)
    np.testing.assert_allclose(found, [oracle(r, threshold, above, below) for r in SCORE], rtol=1e-12, atol=1e-15)


def test_worked_example():
    # Formula sheet of TempSamp-R1: s = .8, alpha_1 = .01, alpha_2 = 1.
    found = shaping.flattened_above(jnp.array([0.0, 0.2, 0.5, 0.8, 1.0]))
    np.testing.assert_allclose(found, [0.086764, 0.321546, 0.596390, 0.8, 0.801823], atol=1e-6)


@pytest.mark.parametrize("at, side, slope", [(0.8, -1, 0.581977), (0.8, 1, 0.01), (0.0, 1, 1.295)])
def test_slopes(at, side, slope):
    # Same sheet: the top is flattened, the bottom stretched.
    low, high = sorted((at, at + side * 1e-6))
    pair = numeric.in_float64(shaping.flattened_above, np.array([low, high]))
    np.testing.assert_allclose((pair[1] - pair[0]) / 1e-6, slope, rtol=1e-3)


@pytest.mark.parametrize("below", [-1.0, 0.0, 1e-3, 1.0, 5.0])
def test_increasing_and_continuous(below):
    score = np.linspace(0, 1, 201)
    found = numeric.in_float64(shaping.flattened_above, score, 0.8, 0.01, below)
    assert (np.diff(found) > 0).all()
    near = numeric.in_float64(shaping.flattened_above, np.array([0.8 - 1e-9, 0.8]), 0.8, 0.01, below)
    np.testing.assert_allclose(near, 0.8, atol=1e-8)
    if below <= 1e-3:  # off, and the limit towards off
        np.testing.assert_allclose(found[score < 0.8], score[score < 0.8], atol=max(below, 0.0) + 1e-12)


def test_constant_and_traceable():
    gradient = jax.grad(lambda r: shaping.flattened_above(r).sum())(jnp.asarray(SCORE))
    np.testing.assert_array_equal(gradient, 0.0)
    traced = jax.jit(shaping.flattened_above)(jnp.asarray(SCORE), 0.8, 0.01, jnp.float32(0.0))
    np.testing.assert_allclose(traced[:5], SCORE[:5], rtol=1e-6)
