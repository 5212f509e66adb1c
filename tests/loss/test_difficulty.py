"""The KL weight by difficulty, against loops and the numbers of APO's formula sheet."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.loss import difficulty

GROUP = np.array([3, 0, 3, 0, 15, 0, 3, 0, 7, 7])
SCORE = np.array([1.0, 0.5, 0.0, 1.5, 1.0, 0.0, 1.0, 0.0, 1.0, 1.2])
ADVANTAGE = np.array([1.0, 0.4, -2.0, 1.1, 1.0, -0.3, 0.0, -1.0, -0.7, 0.7])


def oracle(i, rate, correct):
    of = [SCORE[j] >= correct for j in range(10) if GROUP[j] == GROUP[i]]
    share = sum(of) / len(of)
    return 1 - math.exp(-rate * share) if ADVANTAGE[i] > 0 and share not in (0, 1) else 1.0


@pytest.mark.parametrize("rate, correct", [(math.e, 1.0), (0.5, 0.5), (math.e, 2.0)])
def test_against_loops(rate, correct):
    found = difficulty.divergence_weight(*map(jnp.asarray, (ADVANTAGE, SCORE, GROUP)), rate=rate, correct=correct)
    np.testing.assert_allclose(found, [oracle(i, rate, correct) for i in range(10)], rtol=1e-5)


@pytest.mark.parametrize("right, weight", [(0, 1.0), (1, 0.288077), (4, 0.743119), (7, 0.907310), (8, 1.0)])
def test_worked_example(right, weight):
    # Formula sheet of APO: groups of 8; answers without credit or with negative credit keep the whole weight.
    score, group = (jnp.arange(8) < right).astype(float), jnp.zeros(8, int)
    advantage = jnp.where(jnp.arange(8) % 3 == 0, 1.0, jnp.where(jnp.arange(8) % 3 == 1, -1.0, 0.0))
    found = difficulty.divergence_weight(advantage, score, group)
    np.testing.assert_allclose(found, np.where(np.arange(8) % 3 == 0, weight, 1.0), rtol=1e-5)


def test_the_weight_grows_with_the_share_of_correct_answers():
    score, group = np.arange(8)[None] < np.arange(1, 9)[:, None], np.repeat(np.arange(8), 8)
    found = difficulty.divergence_weight(jnp.ones(64), jnp.asarray(score.ravel(), float), jnp.asarray(group))
    weights = found[::8].tolist()
    assert weights == sorted(weights) and len(set(weights)) == 8


def test_an_infinite_rate_is_a_constant_weight():
    found = difficulty.divergence_weight(*map(jnp.asarray, (ADVANTAGE, SCORE, GROUP)), rate=math.inf)
    np.testing.assert_array_equal(found, 1.0)


def test_constant():
    gradients = jax.grad(lambda a, s: difficulty.divergence_weight(a, s, jnp.asarray(GROUP)).sum(), (0, 1))(
        jnp.asarray(ADVANTAGE), jnp.asarray(SCORE))
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)
