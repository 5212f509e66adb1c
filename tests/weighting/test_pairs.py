"""Means over pairs: weights against counting."""
import jax.numpy as jnp
import numpy as np

from rl_jax.weighting import aggregate, pairs

MASK = jnp.array([[True, True, False], [True, False, False], [False, False, False], [True, True, True]])
# Row 0 beats rows 1 and 3, row 3 beats row 1: three pairs.
BEATS = jnp.zeros((4, 4), bool).at[[0, 0, 3], [1, 3, 1]].set(True)
NONE = jnp.zeros((4, 4), bool)


def test_mean_over_pairs():
    lost = {(0, 1): 2.0, (0, 3): 5.0, (3, 1): 7.0}
    won = jnp.array([[2.0 + 5.0], [0.0], [0.0], [7.0]])
    np.testing.assert_allclose((pairs.pair_mean(MASK, BEATS) * won).sum(), sum(lost.values()) / 3, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(pairs.pair_mean(MASK, BEATS))[~np.asarray(MASK)], 0.0)
    assert np.isfinite(pairs.pair_mean(MASK, NONE)).all()


def test_sequences_count_only_where_there_is_no_pair():
    np.testing.assert_array_equal(pairs.sequence_mean_without_pairs(MASK, BEATS), 0.0)
    expected = aggregate.sequence_mean_token_mean(MASK)
    np.testing.assert_array_equal(pairs.sequence_mean_without_pairs(MASK, NONE), expected)
