"""Policy-gradient terms, what is constant in them, and the formula sheets' examples."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.loss import ratio, score
from tests import numeric

LOGP, OLD, ADVANTAGE = -np.abs(numeric.normal(0, 3, 4)), -np.abs(numeric.normal(1, 3, 4)), numeric.normal(2, 3, 4)
RATIO = np.exp(LOGP - OLD)

WEIGHTED = [
    (functools.partial(score.weighted_by_clipped_ratio, low=0.2, high=0.28), lambda r: min(max(r, 0.8), 1.28)),
    (functools.partial(score.weighted_by_clipped_ratio, low=1.0, high=0.28), lambda r: min(r, 1.28)),
    (functools.partial(score.weighted_by_capped_ratio, cap=1.5), lambda r: min(r, 1.5)),
    (functools.partial(score.weighted_by_capped_ratio, cap=jnp.inf), lambda r: r)]


def test_value_and_constant_credit():
    logp, advantage = jnp.array([[-1.0, -3.0]]), jnp.array([[0.5, -2.0]])
    value, gradients = jax.value_and_grad(lambda *a: score.policy_gradient(*a).sum(), (0, 1))(logp, advantage)
    np.testing.assert_allclose(value, 0.5 - 6.0)
    np.testing.assert_array_equal(gradients[0], -advantage)
    np.testing.assert_array_equal(gradients[1], 0.0)


def test_worked_example():
    # Formula sheet of REINFORCE: two arms, logits 0, arm 0 drawn, R = 1.
    def loss(logits):
        return score.policy_gradient(jax.nn.log_softmax(logits)[:1][None], jnp.ones((1, 1))).sum()

    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(2)), [-0.5, 0.5])


@pytest.mark.parametrize("function, weight", WEIGHTED)
def test_weighted_against_loops(function, weight):
    expected = [-weight(r) * a * p for r, a, p in zip(RATIO.flat, ADVANTAGE.flat, LOGP.flat, strict=True)]
    np.testing.assert_allclose(numeric.in_float64(function, LOGP, RATIO, ADVANTAGE).ravel(), expected, rtol=1e-12)


@pytest.mark.parametrize("function, weight", WEIGHTED)
def test_the_ratio_is_constant_also_when_made_of_the_same_logp(function, weight):
    def loss(logp, old, advantage):
        return function(logp, ratio.per_token(logp, old), advantage).sum()

    arrays = [jnp.asarray(a, jnp.float32) for a in (LOGP, OLD, ADVANTAGE)]
    gradient, *constant = jax.grad(loss, (0, 1, 2))(*arrays)
    expected = [-weight(r) * a for r, a in zip(RATIO.flat, ADVANTAGE.flat, strict=True)]
    np.testing.assert_allclose(np.asarray(gradient).ravel(), expected, rtol=1e-5)
    for values in constant:
        np.testing.assert_array_equal(values, 0.0)


def slope(function, r, advantage):
    one = jnp.ones((1, 1))
    return float(jax.grad(lambda logp: function(logp, r * one, advantage * one).sum())(-one)[0, 0])


def test_cispo_worked_example():
    # Formula sheet of CISPO: where PPO's gradient is 0, the token still counts, as one at the band's edge.
    clipped = functools.partial(score.weighted_by_clipped_ratio, low=0.2, high=0.28)
    capped = functools.partial(score.weighted_by_capped_ratio, cap=5.0)
    assert slope(clipped, 2.0, 1.0) == pytest.approx(-1.28)
    assert slope(capped, 0.5, -1.0) == pytest.approx(0.5)


def test_the_two_forms_differ_for_what_became_improbable():
    # Formula sheet of CISPO: r -> 0 leaves no weight under the cap, and 1 - low under the two-sided clip.
    for function, weight in WEIGHTED[:1] + WEIGHTED[2:3]:
        assert slope(function, 1e-6, 1.0) == pytest.approx(-weight(1e-6))
    assert slope(WEIGHTED[0][0], 1e-6, 1.0) == pytest.approx(-0.8)
    assert slope(WEIGHTED[2][0], 1e-6, 1.0) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("function, _", WEIGHTED)
def test_at_ratio_one_it_is_the_policy_gradient_and_without_credit_nothing(function, _):
    logp, advantage = (jnp.asarray(a, jnp.float32) for a in (LOGP, ADVANTAGE))
    ones = jnp.ones_like(logp)
    np.testing.assert_array_equal(function(logp, ones, advantage), score.policy_gradient(logp, advantage))
    np.testing.assert_array_equal(function(logp, 3 * ones, 0 * ones), 0.0)
