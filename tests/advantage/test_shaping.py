"""Bent credit against loops over Python floats; numbers of the formula sheets of APO and Q-Hawkeye."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.advantage import shaping
from tests import numeric

GROUP = np.array([3, 0, 3, 0, 15, 0, 3, 0, 7, 7])
ROWS = range(10)
ADVANTAGE = numeric.normal(0, 10)
SCORE = np.array([1.0, 0.5, 0.0, 1.5, 0.2, 0.0, 1.0, 0.9, 0.0, 0.3])
MASK = np.random.default_rng(1).random((10, 7)) < np.random.default_rng(2).permutation(10)[:, None] / 9
ENTROPY = np.where(MASK, np.abs(numeric.normal(3, 10, 7)), np.nan)
PREDICTION = np.array([1.0, 2.5, 4.0, np.nan, 2.0, 9.0, -3.0, 3.5, 2.2, 2.2])


def peers(i):
    return [j for j in ROWS if GROUP[j] == GROUP[i]]


def oracle_less_entropy(i, coefficient):
    of = [ENTROPY[i, t] for t in range(7) if MASK[i, t]]
    return ADVANTAGE[i] - coefficient * (sum(of) / len(of) if of else 0.0)


def oracle_stretched(i, base, correct):
    right = [int(MASK[j].sum()) for j in peers(i) if SCORE[j] >= correct]
    if SCORE[i] >= correct or not right:
        return ADVANTAGE[i]
    excess = int(MASK[i].sum()) - sum(right) / len(right)
    return ADVANTAGE[i] * (2 - base**-excess) if excess > 0 else ADVANTAGE[i]


def oracle_uncertainty(i, lowest, highest):
    read = [min(max(float(PREDICTION[j]), lowest), highest) for j in peers(i) if not math.isnan(PREDICTION[j])]
    if len(read) < 2:
        return 0.0
    mean = sum(read) / len(read)
    variance = sum((p - mean) ** 2 for p in read) / len(read)
    return min(variance / (0.25 * (highest - lowest) ** 2 + 1e-8), 1.0)


CASES = [
    (shaping.less_entropy, (ADVANTAGE, ENTROPY, MASK, 0.1), lambda i: oracle_less_entropy(i, 0.1)),
    (functools.partial(shaping.stretched_by_length, base=1.5), (ADVANTAGE, SCORE, GROUP, MASK),
     lambda i: oracle_stretched(i, 1.5, 1.0)),
    (functools.partial(shaping.stretched_by_length, base=1.00001, correct=0.5), (ADVANTAGE, SCORE, GROUP, MASK),
     lambda i: oracle_stretched(i, 1.00001, 0.5)),
    (shaping.uncertainty, (PREDICTION, GROUP, 1.0, 5.0), lambda i: oracle_uncertainty(i, 1.0, 5.0)),
    (shaping.discounted_by_uncertainty, (ADVANTAGE, PREDICTION, GROUP, 0.7, 0.0, 4.0),
     lambda i: ADVANTAGE[i] * math.exp(-0.7 * oracle_uncertainty(i, 0.0, 4.0)))]


@pytest.mark.parametrize("function, arguments, oracle", CASES)
def test_against_loops(function, arguments, oracle):
    np.testing.assert_allclose(numeric.in_float64(function, *arguments), [oracle(i) for i in ROWS], rtol=1e-9)


@pytest.mark.parametrize("function, arguments, _", CASES)
def test_everything_is_constant(function, arguments, _):
    numbers = [jnp.asarray(a) if isinstance(a, np.ndarray) else a for a in arguments]
    places = [k for k, a in enumerate(numbers) if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jnp.floating)]
    for gradient in jax.grad(lambda *a: function(*a).sum(), places)(*numbers):
        np.testing.assert_array_equal(gradient, 0.0)


def lengths(*count):
    return jnp.arange(max(count))[None] < jnp.array(count)[:, None]


@pytest.mark.parametrize("excess, factor", [(1000, 1.009950), (10000, 1.095163), (0, 1.0), (-500, 1.0)])
def test_stretch_worked_example(excess, factor):
    # Formula sheet of APO: d tokens longer than the mean of the correct ones, here 600.
    mask = lengths(500, 700, 600 + excess, 600)
    score, group = jnp.array([1.0, 1.0, 0.0, 0.0]), jnp.zeros(4, int)
    found = shaping.stretched_by_length(jnp.array([1.0, 1.0, -1.0, 0.0]), score, group, mask)
    np.testing.assert_allclose(found, [1.0, 1.0, -factor, 0.0], rtol=1e-6)


def test_the_longer_of_two_wrong_answers_gets_less_and_of_two_right_ones_does_not():
    score, group = jnp.array([1.0, 1.0, 0.0, 0.0]), jnp.zeros(4, int)
    found = shaping.stretched_by_length(jnp.array([0.9, 0.9, -0.9, -0.9]), score, group, lengths(10, 4000, 3000, 9000))
    assert found[3] < found[2] < -0.9 and found[0] == found[1] == jnp.float32(0.9)


@pytest.mark.parametrize("base, score", [(1.0, SCORE), (1.5, np.zeros(10))])
def test_nothing_changes_without_a_base_or_without_a_correct_answer(base, score):
    advantage = jnp.asarray(ADVANTAGE, jnp.float32)
    found = shaping.stretched_by_length(advantage, jnp.asarray(score), jnp.asarray(GROUP), jnp.asarray(MASK), base=base)
    np.testing.assert_array_equal(found, advantage)


@pytest.mark.parametrize("prediction, uncertainty, weight", [
    ((1, 1, 5, 5), 1.0, 0.818731), ((3, 3, 3, 3), 0.0, 1.0), ((2, 3, 3, 4), 0.125, 0.975310),
    ((-7, 1, 5, 50), 1.0, 0.818731), ((2, np.nan, np.nan, np.inf), 0.0, 1.0), ((2, 4, np.nan, np.nan), 0.25, 0.951229)])
def test_uncertainty_worked_example(prediction, uncertainty, weight):
    # Formula sheet of Q-Hawkeye: range 1 to 5, alpha .2; predictions outside are clipped, unread ones left out.
    prediction, group = jnp.array(prediction, jnp.float32), jnp.zeros(4, int)
    np.testing.assert_allclose(shaping.uncertainty(prediction, group, 1.0, 5.0), [uncertainty] * 4, rtol=1e-6)
    found = shaping.discounted_by_uncertainty(jnp.array([1.0, -2.0, 0.0, 4.0]), prediction, group, 0.2, 1.0, 5.0)
    np.testing.assert_allclose(found, weight * np.array([1.0, -2.0, 0.0, 4.0]), rtol=1e-5)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-20, 0.7])
def test_equal_predictions_weigh_exactly_one(value):
    found = shaping.discounted_by_uncertainty(jnp.ones(7), jnp.full(7, value), jnp.zeros(7, int), 5.0, 0.0, 1.0)
    np.testing.assert_array_equal(found, 1.0)


def test_the_weight_falls_with_the_spread():
    spread, group = np.linspace(0.0, 1.0, 9), np.repeat(np.arange(9), 2)
    prediction = np.stack([0.5 - spread / 2, 0.5 + spread / 2], axis=1).ravel()
    found = numeric.in_float64(shaping.discounted_by_uncertainty, np.ones(18), prediction, group, 0.2, 0.0, 1.0)
    weights = found[::2].tolist()
    assert weights == sorted(weights, reverse=True) and len(set(weights)) == 9
