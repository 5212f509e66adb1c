"""Preference losses against loops over Python floats, which pairs there are, what they reduce to, a bandit."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.loss import divergence, pairwise
from tests import numeric

# Prompts 3 and 0 interleaved, 15 alone; the sixth row is empty.
GROUP = np.array([3, 0, 3, 0, 15, 0, 3, 0])
LEVEL = np.array([-1.0, -2, -3, -1, -1, -1, -1, -4])
MASK = np.random.default_rng(0).random((8, 5)) < 0.7
MASK[:, 0], MASK[5] = True, False
LOGP, REFERENCE = (np.where(MASK, -np.abs(numeric.normal(seed, 8, 5)), np.nan) for seed in (1, 2))
BETA, FACTOR = 0.7, 2.5


def oracle_z(i):
    of = [float(LOGP[i, t] - REFERENCE[i, t]) for t in range(5) if MASK[i, t]]
    return sum(of) / len(of) if of else 0.0


def oracle_beats(i, j):
    return bool(GROUP[i] == GROUP[j] and LEVEL[i] > LEVEL[j] and MASK[i].any() and MASK[j].any())


def oracle_pair(i, j):
    if not oracle_beats(i, j):
        return 0.0
    margin = BETA * (oracle_z(i) - oracle_z(j)) * (FACTOR if LEVEL[i] == -1 else 1)
    return math.log1p(math.exp(-margin))


def table(function):
    return np.array([[function(i, j) for j in range(8)] for i in range(8)])


def pair_losses(logp):
    z = pairwise.log_ratio(logp, jnp.asarray(REFERENCE), jnp.asarray(MASK))
    level = jnp.asarray(LEVEL)
    return pairwise.logistic(z, level, pairwise.beats(level, jnp.asarray(GROUP), jnp.asarray(MASK)), BETA, FACTOR)


@pytest.mark.parametrize("score, finished, formatted, expected", [
    (1.0, True, 1.0, -1), (1.0, False, 1.0, -1), (0.5, True, 1.0, -2), (0.0, False, 1.0, -3), (1.0, True, 0.0, -4)])
def test_levels(score, finished, formatted, expected):
    # Formula sheet of TRPA, there 1 to 4 and lower is better.
    found = pairwise.levels(jnp.full(1, score), jnp.full(1, finished), jnp.full(1, formatted))
    np.testing.assert_array_equal(found, [expected])
    if formatted:
        np.testing.assert_array_equal(pairwise.levels(jnp.full(1, score), jnp.full(1, finished)), found)


def test_pairs_are_across_levels_of_one_prompt():
    found = numeric.in_float64(pairwise.beats, LEVEL, GROUP, MASK)
    np.testing.assert_array_equal(found, table(oracle_beats))
    # Prompt 3: rows 0 and 6 beat row 2. Prompt 0: row 3 beats 1 and 7, and row 1 beats 7; row 5 is empty.
    assert found.sum() == 5 and not found[5].any() and not found[4].any()
    equal = numeric.in_float64(pairwise.beats, np.zeros(8), GROUP, MASK)
    assert not equal.any()


def test_pair_losses_against_loops():
    np.testing.assert_allclose(numeric.in_float64(pair_losses, LOGP), table(oracle_pair), rtol=1e-12)
    won = numeric.in_float64(lambda logp: pairwise.won(pair_losses(logp), jnp.asarray(MASK)), LOGP)
    np.testing.assert_allclose(won, np.repeat(table(oracle_pair).sum(axis=1, keepdims=True), 5, axis=1), rtol=1e-12)


def test_gradient_of_pair_losses():
    there = np.where(MASK, LOGP, 0.0)
    gradient = numeric.gradient(pair_losses, there)
    np.testing.assert_allclose(gradient, numeric.central_difference(pair_losses, there), rtol=1e-6, atol=1e-9)
    assert (gradient[~MASK] == 0).all() and (gradient[[4, 5]] == 0).all()
    slope = numeric.gradient(lambda reference: pairwise.log_ratio(jnp.asarray(there), reference, jnp.asarray(MASK)),
                             np.where(MASK, REFERENCE, 0.0))
    np.testing.assert_array_equal(slope, 0.0)


@pytest.mark.parametrize("winner, loss", [(-1.0, 0.632599), (-2.0, 0.668460)])
def test_worked_example(winner, loss):
    # Formula sheet of TRPA: z = (-.5, -1), beta = .1, factor 2.5.
    level = jnp.array([winner, -3.0])
    beats = pairwise.beats(level, jnp.zeros(2, int), jnp.ones((2, 1), bool))
    found = pairwise.logistic(jnp.array([-0.5, -1.0]), level, beats, 0.1, 2.5)
    np.testing.assert_allclose(found, [[0, loss], [0, 0]], rtol=1e-5)


def test_length_decides_nothing():
    # Formula sheet of TRPA: an answer three times as long at the same log-probability per token.
    logp, reference = jnp.full((2, 9), -0.5), jnp.full((2, 9), -1.5)
    short, long = (jnp.arange(9)[None] < jnp.array([[3], [n]]) for n in (3, 9))
    for mask in (short, long):
        np.testing.assert_allclose(pairwise.log_ratio(logp, reference, mask), 1.0, rtol=1e-6)


def test_two_levels_are_dpo_with_normalised_length():
    # Formula sheet of TRPA: factor 1 and no trust term. DPO written out with a sum over winners and losers.
    right, wrong = [0, 1, 2], [3, 4]
    there, reference = (np.where(MASK, x, 0.0)[[0, 1, 2, 6, 7]] for x in (LOGP, REFERENCE))
    mask, level = MASK[[0, 1, 2, 6, 7]], np.array([-1.0, -1, -1, -2, -2])

    def trpa(logp):
        beats = pairwise.beats(jnp.asarray(level), jnp.zeros(5, int), jnp.asarray(mask))
        z = pairwise.log_ratio(logp, jnp.asarray(reference), jnp.asarray(mask))
        return pairwise.logistic(z, jnp.asarray(level), beats, BETA, 1.0) / 6

    def dpo(logp):
        z = [((logp[i] - reference[i]) * mask[i]).sum() / mask[i].sum() for i in range(5)]
        return sum(-jnp.log(1 / (1 + jnp.exp(-BETA * (z[w] - z[x])))) for w in right for x in wrong) / 6

    np.testing.assert_allclose(numeric.in_float64(trpa, there).sum(), numeric.in_float64(dpo, there), rtol=1e-9)
    np.testing.assert_allclose(numeric.gradient(trpa, there), numeric.central_difference(dpo, there), rtol=1e-6,
                               atol=1e-9)


def test_without_pairs():
    def loss(logp):
        z = pairwise.log_ratio(logp, jnp.asarray(REFERENCE), jnp.asarray(MASK))
        return pairwise.unpaired(z, jnp.asarray(LEVEL), jnp.asarray(MASK), BETA)

    signs = [1 if level == -1 else -1 for level in LEVEL]
    expected = [math.log1p(math.exp(-BETA * sign * oracle_z(i))) for i, sign in enumerate(signs)]
    np.testing.assert_allclose(numeric.in_float64(loss, LOGP), np.repeat(np.array(expected)[:, None], 5, axis=1),
                               rtol=1e-12)
    there = np.where(MASK, LOGP, 0.0)
    np.testing.assert_allclose(numeric.gradient(loss, there), numeric.central_difference(loss, there), rtol=1e-6,
                               atol=1e-9)


def test_root_trust():
    logp, old = np.where(MASK, LOGP, 0.0), np.where(MASK, REFERENCE, 0.0)
    away = (logp - old).ravel()
    expected = [math.sqrt(math.exp(-x) + x - 1 + 0.25) for x in away]
    np.testing.assert_allclose(numeric.in_float64(pairwise.root_trust, logp, old).ravel(), expected, rtol=1e-12)
    near = old + 1e-5 * numeric.normal(9, 8, 5)
    root, k3 = (numeric.gradient(lambda p, f=f: f(p, jnp.asarray(old)), near)
                for f in (pairwise.root_trust, divergence.k3))
    np.testing.assert_allclose(root, k3, rtol=1e-5, atol=1e-12)
    slope = numeric.gradient(lambda o: pairwise.root_trust(jnp.asarray(logp), o), old)
    np.testing.assert_array_equal(slope, 0.0)


@pytest.mark.parametrize("start", [[0.0, 0.0, 0.0, 0.0], [-2.0, 3.0, 1.0, 0.0], [-3.0, -1.0, 2.0, 1.0]])
def test_a_bandit_of_four_levels_never_gets_worse(start):
    """Exact updates: each pair of arms counts by the probability of drawing both; 500 steps."""
    level = jnp.array([-1.0, -2.0, -3.0, -4.0])
    beats = pairwise.beats(level, jnp.zeros(4, int), jnp.ones((4, 1), bool))
    reference = jax.nn.log_softmax(jnp.array(start))

    def loss(logits):
        logp = jax.nn.log_softmax(logits)
        drawn = jax.lax.stop_gradient(jnp.exp(logp))
        both = drawn[:, None] * drawn[None, :]
        z = pairwise.log_ratio(logp[:, None], reference[:, None], jnp.ones((4, 1), bool))
        return (both * pairwise.logistic(z, level, beats, 0.1, 2.5)).sum() / (both * beats).sum()

    def step(logits, _):
        return logits - 2.0 * jax.grad(loss)(logits), (jax.nn.softmax(logits) * level).sum()

    _, expected = jax.jit(functools.partial(jax.lax.scan, step, length=500))(jnp.array(start))
    assert (jnp.diff(expected) > -1e-6).all() and expected[-1] > expected[0] + 0.3
