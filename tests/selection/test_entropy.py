"""The entropy filters against loops, and the switch of GTPO's formula sheet."""
import math

import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.selection import entropy

MASK = np.array([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]], bool)
ENTROPY = np.where(MASK, [[0.5, 0.8, 0], [2.0, 0, 0.4], [0, 0, 0], [0.7, 0.7, 0.7]], np.nan)
MEAN = [0.65, 1.2, 0.0, 0.7]
BATCH = (0.5 + 0.8 + 2.0 + 0.4 + 2.1) / 7  # over the 7 chosen tokens; above ln 2


@pytest.mark.parametrize("threshold", [0.6, math.log(2), 0.71, 1.3])
def test_below_is_a_mean_per_answer(threshold):
    found = entropy.below(jnp.asarray(ENTROPY), jnp.asarray(MASK), threshold)
    np.testing.assert_array_equal(found, [mean <= threshold for mean in MEAN])


@pytest.mark.parametrize("initial, filtered", [(0.1, True), (math.log(2) - 1e-3, True), (math.log(2) + 1e-3, False),
                                               (5.0, False)])
def test_a_run_that_began_above_is_not_filtered(initial, filtered):
    # Formula sheet of GTPO: delta = 1 if the initial entropy is above ln 2, else 1[H <= ln 2].
    found = entropy.below_if_begun_below(jnp.asarray(ENTROPY), jnp.asarray(MASK), jnp.float32(initial))
    np.testing.assert_array_equal(found, [mean <= math.log(2) for mean in MEAN] if filtered else [True] * 4)


@pytest.mark.parametrize("unknown", [math.inf, math.nan])
@pytest.mark.parametrize("threshold", [BATCH - 0.01, BATCH + 0.01])
def test_the_first_batch_is_measured_against_itself(unknown, threshold):
    found = entropy.below_if_begun_below(jnp.asarray(ENTROPY), jnp.asarray(MASK), unknown, threshold)
    np.testing.assert_array_equal(found, [mean <= threshold or threshold < BATCH for mean in MEAN])
