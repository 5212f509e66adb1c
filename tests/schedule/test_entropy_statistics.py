"""HAPO's statistics of entropies against loops, its formula sheet's numbers, and what is carried between steps."""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.learner import assemble
from rl_jax.schedule import entropy_statistics as entropies
from tests import numeric

MASK = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 1]], bool)
ENTROPY = np.where(MASK, np.exp(1.5 * numeric.normal(0, 4, 4)), np.nan)
NAMES = ("pivot", "deviation", "above", "below")
SHEET = np.array([[0.01, 0.1, 0.5, 1.0, 2.0]])
SHEET_H = [-1, -0.5, -0.150515, 0, 1]


def oracle(quantile):
    z = sorted(math.log(max(float(h), 1e-12)) for h in ENTROPY[MASK])
    pivot = z[round(quantile * (len(z) - 1))]
    deviation = math.sqrt(sum((one - pivot) ** 2 for one in z) / len(z))
    h = [(one - pivot) / deviation for one in z]
    return pivot, deviation, max(0.0, *h), max(0.0, *(-one for one in h))


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.8, 1.0])
def test_statistics_against_loops(quantile):
    def of(entropy, mask):
        found = entropies.of_tokens(entropy, mask, quantile)
        return jnp.stack([found[name] for name in NAMES])

    found = numeric.in_float64(of, ENTROPY, MASK)
    np.testing.assert_allclose(found, oracle(quantile), rtol=1e-12)


def oracle_h(entropy, quantile=0.8):
    pivot, deviation, above, below = oracle(quantile)
    h = (math.log(max(entropy, 1e-12)) - pivot) / deviation
    scale = above if h > 0 else below
    return min(max(h / scale, -1.0), 1.0) if scale else 0.0


@pytest.mark.parametrize("quantile", [0.0, 0.8, 1.0])
def test_scaled_against_loops(quantile):
    """Also of entropies that the statistics have not met, beyond them on either side."""
    other = np.array([0.0, 1e-15, 1e-6, 0.1, 0.5, 1.0, 3.0, 100.0])

    def of(entropy, mask, other):
        return entropies.scaled(other, **entropies.of_tokens(entropy, mask, quantile))

    found = numeric.in_float64(of, ENTROPY, MASK, other)
    np.testing.assert_allclose(found, [oracle_h(h, quantile) for h in other], rtol=1e-9, atol=1e-12)


def test_scaled_in_batch_against_loops():
    found = numeric.in_float64(entropies.scaled_in_batch, ENTROPY, MASK)
    expected = [oracle_h(float(h)) if chosen else 0.0 for h, chosen in zip(ENTROPY.flat, MASK.flat, strict=True)]
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-9, atol=1e-12)
    assert found.max() == 1 and found.min() == -1


def test_worked_example():
    # Formula sheet of HAPO, with the intended sign and with that of published code.
    entropy, mask = jnp.asarray(SHEET), jnp.ones((1, 5), bool)
    statistics = entropies.of_tokens(entropy, mask)
    np.testing.assert_allclose(entropies.scaled(entropy, **statistics)[0], SHEET_H, atol=1e-6)
    np.testing.assert_allclose(entropies.scaled_in_batch(entropy, mask)[0], SHEET_H, atol=1e-6)
    np.testing.assert_allclose(entropies.scaled_repo_sign(entropy, **statistics)[0], np.abs(SHEET_H), atol=1e-6)
    factor = entropies.temperature_factor(jnp.asarray(SHEET[0]), statistics, 0.05)
    np.testing.assert_allclose(factor, [0.95, 0.975, 0.9925, 1, 1.05], atol=5e-5)


def statistics_of(*values):
    return entropies.of_tokens(jnp.array([values]), jnp.ones((1, len(values)), bool))


@pytest.mark.parametrize("entropy", [(0.7,), (0.3, 0.3, 0.3), (0.0, 0.0)], ids=str)
def test_without_any_spread_no_token_is_sure_or_unsure(entropy):
    np.testing.assert_array_equal(entropies.scaled(jnp.array([0.0, 0.3, 0.7, 5.0]), **statistics_of(*entropy)), 0.0)


def test_on_a_side_without_tokens_no_token_is_sure_or_unsure():
    """All but one entropy equal: the pivot is theirs."""
    new = jnp.array([0.01, 0.3, 2.0])
    np.testing.assert_array_equal(entropies.scaled(new, **statistics_of(0.3, 0.3, 0.3, 0.3, 2.0))[:2], 0.0)
    np.testing.assert_array_equal(entropies.scaled(new, **statistics_of(0.01, 0.3, 0.3, 0.3, 0.3))[1:], 0.0)


def test_no_tokens_and_no_entropy_are_finite():
    nothing = entropies.of_tokens(jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool))
    np.testing.assert_array_equal(jax.tree.leaves(nothing), 0.0)
    np.testing.assert_array_equal(entropies.scaled_in_batch(jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool)), 0.0)
    np.testing.assert_allclose(entropies.log_entropy(jnp.zeros(1)), np.log(1e-12), rtol=1e-6)
    np.testing.assert_allclose(entropies.scaled(jnp.zeros(1), **statistics_of(0.0, 0.5, 1.0)), -1, rtol=1e-6)


def test_entropies_are_constants():
    def total(entropy):
        return entropies.scaled_in_batch(entropy, jnp.asarray(MASK)).sum() + entropies.temperature_factor(
            entropy[0], entropies.of_tokens(entropy, jnp.asarray(MASK)), 0.05).sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.asarray(np.where(MASK, ENTROPY, 1.0))), 0.0)


@pytest.mark.parametrize("strength", [1.0, -0.1, 7])
def test_a_temperature_that_might_not_be_positive_is_refused(strength):
    with pytest.raises(ValueError, match="allowed is 0 <= strength < 1"):
        entropies.temperature_factor(jnp.ones(2), statistics_of(0.1, 0.2), strength)


def experience(entropy, mask):
    n = len(mask)
    x = assemble.of_arrays(jnp.zeros(mask.shape), jnp.asarray(mask), jnp.zeros(n), jnp.zeros(n, int))
    return dataclasses.replace(x, rollout_entropy=jnp.asarray(entropy, jnp.float32))


def test_the_control_carries_those_of_the_step_before():
    made = entropies.of_previous_step(0.8)
    state = made.init(0)
    factor = functools.partial(entropies.temperature_factor, jnp.array([0.0, 0.3, 9.0]), strength=0.05)
    np.testing.assert_array_equal(factor(made.read(state)), 1.0)  # the first step: nothing is known yet
    new = jax.jit(made.update)(state, experience(ENTROPY, MASK), None, {})
    np.testing.assert_allclose([new[name] for name in NAMES], oracle(0.8), rtol=1e-5)
    np.testing.assert_allclose(factor(made.read(new)), [0.95, 1 + 0.05 * oracle_h(0.3), 1.05], rtol=1e-5)
    unchanged = made.update(new, experience(ENTROPY, np.zeros_like(MASK)), None, {})
    for a, b, c in zip(*map(jax.tree.leaves, (state, new, unchanged)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(b, c)
