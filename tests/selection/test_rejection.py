"""Rejection criteria against loops over Python floats; what is rejected leaves the denominators."""
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.selection import rejection
from rl_jax.weighting import aggregate, importance
from tests import numeric

MASK = np.array([[1, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
OLD, ROLLOUT = (np.where(MASK, -np.abs(numeric.normal(seed, 4, 4)), np.nan) for seed in (0, 1))

STATISTICS = {"k1": (rejection.k1, lambda d: -d), "k2": (rejection.k2, lambda d: d * d / 2),
              "k3": (rejection.k3, lambda d: math.exp(d) - 1 - d)}
REDUCTIONS = {"token": (lambda k, mask: k, None), "total": (rejection.sequence_total, sum),
              "mean": (rejection.sequence_mean, lambda of: sum(of) / len(of)), "max": (rejection.sequence_max, max)}
# max of k1 is not offered, as in verl
CRITERIA = [pair for pair in itertools.product(STATISTICS, REDUCTIONS) if pair != ("k1", "max")]


def oracle(statistic, reduction, i, t):
    if not MASK[i, t]:
        return None
    of = [STATISTICS[statistic][1](float(OLD[i, u] - ROLLOUT[i, u])) for u in range(4) if MASK[i, u]]
    reduce = REDUCTIONS[reduction][1]
    return STATISTICS[statistic][1](float(OLD[i, t] - ROLLOUT[i, t])) if reduce is None else reduce(of)


@pytest.mark.parametrize("statistic, reduction", CRITERIA)
def test_every_criterion_against_loops(statistic, reduction):
    def found(old, rollout, mask):
        return REDUCTIONS[reduction][0](STATISTICS[statistic][0](old, rollout), mask)

    def kept(old, rollout, mask):
        if statistic == "k1":
            return rejection.within_ratio(found(old, rollout, mask), mask, 0.5, 3.0)
        return rejection.at_most(found(old, rollout, mask), mask, 0.4)

    values, mask = numeric.in_float64(found, OLD, ROLLOUT, MASK), numeric.in_float64(kept, OLD, ROLLOUT, MASK)
    for i, t in np.ndindex(4, 4):
        expected = oracle(statistic, reduction, i, t)
        if expected is None:
            assert not mask[i, t]
            continue
        assert values[i, t] == pytest.approx(expected, rel=1e-9)
        assert mask[i, t] == (0.5 <= math.exp(expected) <= 3 if statistic == "k1" else expected <= 0.4)
    assert 0 < mask.sum() < MASK.sum()


@pytest.mark.parametrize("delta, kept", [(math.log(2) - 0.01, True), (math.log(2) + 0.01, False),
                                         (-math.log(3) + 0.01, True), (-math.log(3) - 0.01, False)])
def test_k1_bounds_the_reciprocal_of_the_weight(delta, kept):
    # Formula sheet of TIS and MIS, disagreements: bounds of .5 and 3 act on rollout over old probability.
    one = jnp.ones((1, 1), bool)
    criterion = rejection.k1(jnp.full((1, 1), delta), jnp.zeros((1, 1)))
    assert rejection.within_ratio(criterion, one, 0.5, 3.0).item() is kept


def test_criteria_are_joined_and_rejected_tokens_leave_the_denominators():
    # delta = (1, -.6 | .1, .2): one token is outside of [1/2, 2]; its answer is then rejected by its largest k2.
    old, rollout, mask = jnp.array([[1.0, -0.6], [0.1, 0.2]]), jnp.zeros((2, 2)), jnp.ones((2, 2), bool)
    token = rejection.within_ratio(rejection.k1(old, rollout), mask, 0.5, 2.0)
    np.testing.assert_array_equal(token, [[False, True], [True, True]])
    np.testing.assert_allclose(aggregate.token_mean(token), [[0, 1 / 3], [1 / 3, 1 / 3]], rtol=1e-6)
    both = token & rejection.at_most(rejection.sequence_max(rejection.k2(old, rollout), mask), mask, 0.3)
    np.testing.assert_allclose(aggregate.token_mean(both), [[0, 0], [0.5, 0.5]])
    # the other form: weight 0, and the four tokens still share
    weight = aggregate.token_mean(mask) * importance.within(importance.per_token(old, rollout, mask), 0.5, 2.0)
    np.testing.assert_allclose(weight, np.array([[0, math.exp(-0.6)], [math.exp(0.1), math.exp(0.2)]]) / 4, rtol=1e-6)


def test_all_rejected_gives_weights_of_zero_and_equal_engines_reject_nothing():
    old, mask = jnp.array([[3.0, 4.0]]), jnp.ones((1, 2), bool)
    none = rejection.within_ratio(rejection.k1(old, jnp.zeros((1, 2))), mask, 0.5, 2.0)
    np.testing.assert_array_equal(aggregate.token_mean(none), 0.0)
    for statistic, _ in STATISTICS.values():
        assert rejection.at_most(statistic(old, old), mask, 1e-9).all()


def test_far_away_is_finite():
    far = jnp.array([[1e30, -1e30]])
    for statistic, _ in STATISTICS.values():
        assert np.isfinite(statistic(far, jnp.zeros((1, 2)))).all()
