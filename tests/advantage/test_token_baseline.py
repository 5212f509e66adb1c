"""Baselines by the size of the gradient: loops over Python floats, exact bandits, and the formula sheets' numbers."""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.advantage import group, token_baseline
from tests import numeric

IDS = np.array([3, 0, 3, 0, 9, 3])  # groups of 3, 2 and 1, with ids anywhere in [0, 2N)
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
RETURNS, NORM = (np.where(MASK, values, np.nan) for values in (numeric.normal(0, 6, 4), numeric.normal(1, 6, 4) ** 2))
REWARD, WHOLE = numeric.normal(2, 6), numeric.normal(3, 6) ** 2
CREDITS = [token_baseline.norm_weighted, token_baseline.norm_weighted_leave_one_out]


def peers(i):
    return [j for j in range(6) if IDS[j] == IDS[i]]


def energy(i, t):
    return sum(float(NORM[i, u]) for u in range(t + 1) if MASK[i, u])


def oracle_optimal(i, t):
    if not MASK[i, t]:
        return 0.0
    if len(peers(i)) == 1:
        return RETURNS[i, t]
    there = [j for j in peers(i) if MASK[j, t]]
    return RETURNS[i, t] - sum(energy(j, t) * RETURNS[j, t] for j in there) / (sum(energy(j, t) for j in there) + 1e-8)


def test_optimal_against_loops():
    def found(returns, norm, mask, ids):
        return token_baseline.optimal(returns, token_baseline.accumulated(norm, mask), mask, ids)

    expected = [oracle_optimal(i, t) for i, t in np.ndindex(6, 4)]
    values = numeric.in_float64(found, RETURNS, NORM, MASK, IDS)
    np.testing.assert_allclose(values.ravel(), expected, rtol=1e-9, atol=1e-12)
    assert values[0, 3] == pytest.approx(0, abs=1e-7)  # the only answer of its group that is that long
    reweighted = numeric.in_float64(token_baseline.reweighted, NORM, np.full((6, 4), 3.0))
    np.testing.assert_allclose(reweighted, 9 * NORM)


def test_equal_energies_give_the_mean_of_those_present():
    # Formula sheet of OTB, reduces to: reward-to-go minus the group's mean.
    mask, returns = jnp.ones((3, 2), bool), jnp.array([[3.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    found = token_baseline.optimal(returns, jnp.ones((3, 2)), mask, jnp.zeros(3, int))
    np.testing.assert_allclose(found, [[2, 0], [-1, 1], [-1, -1]], atol=1e-6)


def test_without_energy_there_is_no_baseline():
    mask, returns = jnp.ones((2, 2), bool), jnp.array([[3.0, 1.0], [0.0, 2.0]])
    np.testing.assert_allclose(token_baseline.optimal(returns, jnp.zeros((2, 2)), mask, jnp.zeros(2, int)), returns)


@pytest.mark.parametrize("p, norm", [((0.5, 0.5), 0.5), ((0.9, 0.1), 0.02)])
def test_score_norm_worked_example(p, norm):
    # Formula sheet of OTB.
    found = token_baseline.score_norm(jnp.full((1, 1), np.log(p[0])), jnp.full((1, 1), sum(q * q for q in p)))
    np.testing.assert_allclose(found, norm, rtol=1e-5)


def test_score_norm_is_that_of_the_gradient_and_never_negative():
    logits = numeric.normal(4, 5)
    p = np.exp(logits) / np.exp(logits).sum()
    for action in range(5):
        gradient = numeric.gradient(lambda z, action=action: jax.nn.log_softmax(z)[action], logits)
        logp, second = np.array([[np.log(p[action])]]), np.array([[(p**2).sum()]])
        found = numeric.in_float64(token_baseline.score_norm, logp, second)
        np.testing.assert_allclose(found, (gradient**2).sum(), rtol=1e-9)
    sure = token_baseline.score_norm(jnp.full((1, 1), -1e-9), jnp.full((1, 1), 1 - 1e-6))
    assert sure >= 0


def oracle_weighted(i, others):
    of = [j for j in peers(i) if not (others and j == i)]
    if len(peers(i)) == 1:
        return REWARD[i]
    return REWARD[i] - sum(WHOLE[j] * REWARD[j] for j in of) / sum(WHOLE[j] for j in of)


@pytest.mark.parametrize("function, others", [*zip(CREDITS, (False, True), strict=True)])
def test_weighted_against_loops(function, others):
    found = numeric.in_float64(function, REWARD, WHOLE, IDS)
    np.testing.assert_allclose(found, [oracle_weighted(i, others) for i in range(6)], rtol=1e-9)


def test_worked_example():
    # Formula sheet of OBLR-PO: W = (1, 3), R = (1, 0): b = .25, and sum W A = 0.
    found = token_baseline.norm_weighted(jnp.array([1.0, 0.0]), jnp.array([1.0, 3.0]), jnp.zeros(2, int))
    np.testing.assert_allclose(found, [0.75, -0.25], rtol=1e-6)
    assert float(found @ jnp.array([1.0, 3.0])) == 0


@pytest.mark.parametrize("function, equal", [
    (CREDITS[0], group.centred), (CREDITS[1], group.leave_one_out)])
def test_equal_and_zero_norms_weigh_alike(function, equal):
    reward, ids = jnp.asarray(REWARD, jnp.float32), jnp.asarray(IDS)
    for norm in (0.0, 2.5):
        np.testing.assert_allclose(function(reward, jnp.full(6, norm), ids), equal(reward, ids), rtol=1e-5, atol=1e-6)


def test_others_without_norm_weigh_alike_when_one_answer_has_it_all():
    found = token_baseline.norm_weighted_leave_one_out(jnp.array([1.0, 0.0, 0.5]), jnp.array([7.0, 0.0, 0.0]),
                                                       jnp.zeros(3, int))
    np.testing.assert_allclose(found, [0.75, -1.0, -0.5], rtol=1e-6)


@pytest.mark.parametrize("function", CREDITS)
def test_equal_rewards_give_exactly_zero_and_all_is_constant(function):
    ids, norm = jnp.array([0, 0, 0, 1]), jnp.array([0.3, 1.7, 0.9, 2.0])
    np.testing.assert_array_equal(function(jnp.array([0.1, 0.1, 0.1, 0.4]), norm, ids), jnp.array([0.0, 0, 0, 0.4]))
    gradient = jax.grad(lambda r, w: function(r, w, ids).sum(), argnums=(0, 1))(norm, norm)
    np.testing.assert_array_equal(gradient, 0.0)


def test_token_credit_is_constant():
    ids, mask, values = jnp.zeros(2, int), jnp.ones((2, 2), bool), jnp.array([[1.0, 2.0], [0.5, 0.25]])

    def total(returns, norm, logp):
        energy = token_baseline.accumulated(token_baseline.reweighted(norm, norm), mask)
        return (token_baseline.optimal(returns, energy, mask, ids) + token_baseline.score_norm(logp, norm)).sum()

    for gradient in jax.grad(total, argnums=(0, 1, 2))(values, values, -values):
        np.testing.assert_array_equal(gradient, 0.0)


# A bandit of three arms, known exactly: p, rewards, and the gradient s of each arm's log-probability in the logits.
ARM, PAYS = np.array([0.5, 0.3, 0.2]), np.array([1.0, 0.2, -0.5])
SCORES = np.eye(3) - ARM
SQUARE = (SCORES**2).sum(axis=1)


def test_the_baseline_minimises_the_variance():
    """Ten samples that hold each arm as often as expected: the group's sums are the expectations."""
    drawn = np.repeat(np.arange(3), (10 * ARM).astype(int))
    credit = numeric.in_float64(token_baseline.norm_weighted, PAYS[drawn], SQUARE[drawn], np.zeros(10, int))
    baseline = float(PAYS[drawn[0]] - credit[0])
    np.testing.assert_allclose(PAYS[drawn] - credit, baseline, rtol=1e-12)

    def variance(b):
        mean = (ARM[:, None] * (PAYS - b)[:, None] * SCORES).sum(axis=0)
        return (ARM * (PAYS - b) ** 2 * SQUARE).sum() - (mean**2).sum()

    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.grad(variance)(baseline), 0.0, atol=1e-14)
    assert variance(baseline) < min(variance(b) for b in (0.0, float(ARM @ PAYS), baseline - 0.1, baseline + 0.1))


@pytest.mark.parametrize("function, unbiased", [*zip(CREDITS, (False, True), strict=True)])
def test_leaving_the_answer_out_removes_the_bias(function, unbiased):
    """All 27 groups of three samples, each with its probability."""
    credit_of = functools.partial(numeric.in_float64, function)
    mean = np.zeros(3)
    for arms in itertools.product(range(3), repeat=3):
        arms = np.array(arms)
        credit = credit_of(PAYS[arms], SQUARE[arms], np.zeros(3, int))
        mean += ARM[arms].prod() * (credit[:, None] * SCORES[arms]).mean(axis=0)
    exact = (ARM[:, None] * PAYS[:, None] * SCORES).sum(axis=0)
    assert np.allclose(mean, exact, rtol=1e-9, atol=1e-12) == unbiased
