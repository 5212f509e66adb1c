"""Weights by prompt against loops."""
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.weighting import aggregate, prompts
from tests import numeric

MASK = np.array([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1], [1, 0, 0]], bool)
LOSS = numeric.normal(0, *MASK.shape)


@pytest.mark.parametrize("group_size", [1, 2, 3, 6])
def test_sum_of_token_means_against_loops(group_size):
    count = len(MASK) // group_size
    total = 0.0
    for p in range(count):
        for i in range(p * group_size, (p + 1) * group_size):
            losses = [float(LOSS[i, t]) for t in range(3) if MASK[i, t]]
            total += sum(losses) / max(len(losses), 1)
    weight = np.asarray(prompts.sum_of_token_means(jnp.asarray(MASK), group_size))
    np.testing.assert_allclose((LOSS * weight).sum(), total / count, rtol=1e-5)
    np.testing.assert_array_equal(weight[~MASK], 0.0)


def test_a_group_of_one_is_the_mean_over_sequences():
    np.testing.assert_array_equal(prompts.sum_of_token_means(jnp.asarray(MASK), 1),
                                  aggregate.sequence_mean_token_mean(jnp.asarray(MASK)))


def test_worked_example():
    # Formula sheets, aggregators: n = (1, 3), loss (1 | 2, 2, 5), here two answers to one prompt: 1 + 3.
    weight = prompts.sum_of_token_means(jnp.array([[1, 0, 0], [1, 1, 1]], bool), 2)
    np.testing.assert_allclose((weight * jnp.array([[1.0, 9, 9], [2, 2, 5]])).sum(), 4.0, rtol=1e-6)
