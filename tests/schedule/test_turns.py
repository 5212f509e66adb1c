"""The ratio that is carried from turn to turn, against loops over Python floats."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.schedule import turns
from tests import numeric

MASK = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]], bool)
FACTOR = np.array([0.9, 1.1, 1.0, 1.2])
AFTER, BEFORE = (np.where(MASK, 0.2 * numeric.normal(seed, 4, 4), np.nan) for seed in range(2))


def clip(x, low, high):
    return min(max(x, low), high)


def oracle(band):
    found = []
    for i, factor in enumerate(FACTOR):
        change = [float(AFTER[i, t] - BEFORE[i, t]) for t in range(4) if MASK[i, t]]
        if change:
            ratio = math.exp(clip(sum(change) / len(change), -10, 10))
            factor = clip(factor * clip(ratio, 1 - band, 1 + band), 1 - band, 1 + band)
        found.append(factor)
    return found


@pytest.mark.parametrize("band", [0.2, 0.05, 0.5])
def test_against_loops(band):
    """The second sequence does not have the turn: its factor stays, even outside of the band."""
    found = numeric.in_float64(turns.carried_ratio, FACTOR, AFTER, BEFORE, MASK, band)
    np.testing.assert_allclose(found, oracle(band), rtol=1e-12)
    assert found[1] == FACTOR[1]


def test_worked_example():
    # Formula sheet of SeeUPO: turn factors 1.5, then .5: M is 1.2, then .96; clipped before and after the product.
    one, mask = jnp.zeros((1, 2)), jnp.array([[True, True]])
    first = turns.carried_ratio(jnp.ones(1), one + jnp.log(1.5), one, mask)
    second = turns.carried_ratio(first, one + jnp.log(0.5), one, mask)
    np.testing.assert_allclose([first[0], second[0]], [1.2, 0.96], rtol=1e-6)


@pytest.mark.parametrize("change, expected", [(500.0, 1.2), (-500.0, 0.8), (np.inf, 1.2)])
def test_huge_changes_stay_finite(change, expected):
    found = turns.carried_ratio(jnp.ones(1), jnp.full((1, 1), change), jnp.zeros((1, 1)), jnp.ones((1, 1), bool))
    np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_it_is_constant():
    def total(given):
        return turns.carried_ratio(*given, jnp.asarray(MASK)).sum()

    given = tuple(jnp.asarray(np.nan_to_num(a), jnp.float32) for a in (FACTOR, AFTER, BEFORE))
    for slope in jax.grad(total)(given):
        np.testing.assert_array_equal(slope, 0.0)
