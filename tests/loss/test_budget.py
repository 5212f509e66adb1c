"""The shared budget of change against loops over Python floats."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.loss import budget, gate
from tests import numeric

MASK = np.random.default_rng(0).random((6, 5)) < 0.7
MASK[:, 0] = True
MASK[2] = False
RATIO = np.where(MASK, np.exp(numeric.normal(1, 6, 5) * np.array([0.1, 0.4, 1, 0.8, 0.3, 0.05])[:, None]), np.nan)
ADVANTAGE = numeric.normal(2, 6, 5)
LIMIT = 0.25


def tokens(i):
    return [int(t) for t in np.flatnonzero(MASK[i])]


def oracle_room(i, t, limit=LIMIT):
    others = sum(abs(float(RATIO[i, j]) - 1) for j in tokens(i) if j != t)
    return max(0.0, len(tokens(i)) * limit - others)


def oracle(i, t, limit=LIMIT):
    room = oracle_room(i, t, limit)
    return -(1 + min(max(float(RATIO[i, t]) - 1, -room), room)) * float(ADVANTAGE[i, t])


def within(i, limit=LIMIT):
    return sum(abs(float(RATIO[i, t]) - 1) for t in tokens(i)) < len(tokens(i)) * limit


@pytest.mark.parametrize("limit", [0.0, 0.02, LIMIT, 2.0])
def test_against_loops(limit):
    room = numeric.in_float64(lambda r, m: budget.left_by_others(r, m, limit), RATIO, MASK)
    found = numeric.in_float64(lambda r, a, m: budget.censored(r, a, m, limit), RATIO, ADVANTAGE, MASK)
    for i, t in zip(*np.nonzero(MASK), strict=True):
        np.testing.assert_allclose(room[i, t], oracle_room(i, t, limit), atol=1e-12)
        np.testing.assert_allclose(found[i, t], oracle(i, t, limit), atol=1e-12)


def slopes(ratio, limit=LIMIT, advantage=ADVANTAGE):
    return numeric.gradient(lambda r: jnp.where(jnp.asarray(MASK), budget.censored(
        r, jnp.asarray(advantage), jnp.asarray(MASK), limit), 0.0), ratio)


def test_a_whole_sequence_learns_or_none_of_it_does():
    """The gradient is -A within the budget and exactly 0 beyond, whatever the sign of A; nothing passes through B."""
    learning = np.array([within(i) for i in range(6)])
    assert learning[[0, 1, 3, 4, 5]].any() and not learning[[0, 1, 3, 4, 5]].all()
    expected = np.where(MASK & learning[:, None], -ADVANTAGE, 0.0)
    np.testing.assert_allclose(slopes(RATIO), expected, atol=1e-12)
    np.testing.assert_array_equal(slopes(RATIO, advantage=-ADVANTAGE)[~learning], 0.0)


def test_gradient_with_the_budget_held_constant():
    """B is constant: against differences of the formula in which it is."""
    room = np.array([[oracle_room(i, t) if MASK[i, t] else 0.0 for t in range(5)] for i in range(6)])

    def held(ratio):
        return jnp.where(jnp.asarray(MASK), -(1 + jnp.clip(ratio - 1, -room, room)) * jnp.asarray(ADVANTAGE), 0.0)

    ratio = np.where(MASK, RATIO, 1.0)
    np.testing.assert_allclose(slopes(ratio), numeric.central_difference(held, ratio), atol=1e-8)


def test_credit_and_budget_are_constants():
    ratio, credit, mask = jnp.where(jnp.asarray(MASK), RATIO, 1.0), jnp.asarray(ADVANTAGE), jnp.asarray(MASK)
    for function, point in ((lambda a: budget.censored(ratio, a, mask, LIMIT), credit),
                            (lambda r: budget.left_by_others(r, mask, LIMIT), ratio)):
        np.testing.assert_array_equal(jax.grad(lambda v, f=function: f(v).sum())(point), 0.0)


def test_where_the_policy_has_not_moved_it_is_the_surrogate():
    ratio = np.where(MASK, 1.0, np.nan)
    np.testing.assert_allclose(slopes(ratio, 1e-6), np.where(MASK, -ADVANTAGE, 0.0))
    np.testing.assert_array_equal(slopes(ratio, 0.0), 0.0)  # nothing may move


def test_with_a_large_budget_it_is_the_surrogate():
    ratio = np.where(MASK, RATIO, 1.0)
    found = numeric.in_float64(lambda r, a, m: budget.censored(r, a, m, 1e6), ratio, ADVANTAGE, MASK)
    np.testing.assert_allclose(found, numeric.in_float64(gate.unclipped, ratio, ADVANTAGE), rtol=1e-12)


def test_small_changes_beside_a_huge_one_are_not_lost():
    """float32: the room of the huge one is what the small ones leave, that of the small ones is 0."""
    ratio = jnp.array([[1.1, 1 + 4e8, 0.8]])
    room = budget.left_by_others(ratio, jnp.ones((1, 3), bool), 0.2)
    np.testing.assert_allclose(room, [[0.0, 0.3, 0.0]], rtol=1e-5)


def test_one_token_and_none():
    for mask, expected in ((True, 0.2), (False, 0.0)):
        room = budget.left_by_others(jnp.full((1, 1), 5.0), jnp.full((1, 1), mask), 0.2)
        np.testing.assert_allclose(room, expected)
    slope = jax.grad(lambda r: budget.censored(r, jnp.ones((1, 2)), jnp.zeros((1, 2), bool), 0.2).sum())(
        jnp.full((1, 2), jnp.nan))
    np.testing.assert_array_equal(slope, 0.0)
