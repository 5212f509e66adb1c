"""The last layer's quadratic model: exact derivatives of a small softmax, loops, and the formula sheet's numbers."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.weighting import curvature
from tests import numeric

K, D, RATE = 5, 3, 0.07
WEIGHTS, HIDDEN, SIDEWAYS = numeric.normal(0, K, D), numeric.normal(1, D), numeric.normal(2, K, D)
LOGITS = WEIGHTS @ HIDDEN
P = np.exp(LOGITS) / np.exp(LOGITS).sum()
ACTIONS, ADVANTAGES = range(K), (1.3, -0.7)


def score(action):
    return np.eye(K)[action] - P


def grid(value):
    """A number, or one per entry, at the only position of a batch of one token."""
    return np.asarray(value, np.float64)[None, None]


def moments(action):
    """log p, second and third moment, squared hidden norm: what a recipe knows of the token."""
    return [grid(value) for value in (np.log(P[action]), (P**2).sum(), (P**3).sum(), HIDDEN @ HIDDEN)]


def explicit(action, advantage, direction):
    """m_F and m_H of `divergence_along` and `improvement_along` for a direction [K, D] of the layer."""
    v, u, a = grid(score(action)), grid(direction @ HIDDEN), grid(advantage)
    return (numeric.in_float64(curvature.divergence_along, v, u, RATE).item(),
            numeric.in_float64(curvature.improvement_along, v, u, grid(P), a, RATE).item())


def of_sgd(action, advantage):
    logp, second, third, square = moments(action)
    a = grid(advantage)
    return (numeric.in_float64(curvature.divergence_of_sgd, logp, second, square, a, RATE).item(),
            numeric.in_float64(curvature.improvement_of_sgd, logp, second, third, square, a, RATE).item())


def surrogate(action, advantage, direction):
    """eta -> A times the token's probability after a step of eta along the direction, over that before."""
    def after(eta):
        logp = jax.nn.log_softmax((jnp.asarray(WEIGHTS) + eta * jnp.asarray(direction)) @ jnp.asarray(HIDDEN))
        return advantage * jnp.exp(logp[action] - jnp.log(P[action]))
    return after


def taylor(function):
    """First- and second-order terms at 0 of a step of RATE, by forward derivatives in float64."""
    with jax.enable_x64(True):
        def slope(eta):
            return jax.jvp(function, (eta,), (1.0,))[1]
        bend = jax.jvp(slope, (0.0,), (1.0,))[1]
        return float(RATE * slope(0.0)), float(RATE**2 / 2 * bend)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("action", ACTIONS)
def test_the_improvement_is_the_second_order_expansion(action, advantage):
    own = advantage * np.outer(score(action), HIDDEN)  # the gradient of A log p in the layer
    for direction, found in ((own, of_sgd(action, advantage)[1]), (own, explicit(action, advantage, own)[1]),
                             (SIDEWAYS, explicit(action, advantage, SIDEWAYS)[1])):
        np.testing.assert_allclose(found, sum(taylor(surrogate(action, advantage, direction))), rtol=1e-10)


def test_the_gradient_is_what_the_model_says():
    for action in ACTIONS:
        found = numeric.gradient(lambda w, action=action: jax.nn.log_softmax(w @ jnp.asarray(HIDDEN))[action], WEIGHTS)
        np.testing.assert_allclose(found, np.outer(score(action), HIDDEN), rtol=1e-9)


def test_the_divergence_is_on_average_that_of_the_step():
    """Over tokens drawn from p, for one direction, the mean of m_F is the second-order term of KL(before || after)."""
    def kl(eta):
        after = jax.nn.log_softmax((jnp.asarray(WEIGHTS) + eta * jnp.asarray(SIDEWAYS)) @ jnp.asarray(HIDDEN))
        return (jnp.asarray(P) * (jnp.log(jnp.asarray(P)) - after)).sum()

    mean = sum(P[action] * explicit(action, 1.0, SIDEWAYS)[0] for action in ACTIONS)
    first, second = taylor(kl)
    np.testing.assert_allclose([first, second], [0.0, mean], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_moments_and_explicit_pairs_agree(advantage):
    for action in ACTIONS:
        own = advantage * np.outer(score(action), HIDDEN)
        np.testing.assert_allclose(of_sgd(action, advantage), explicit(action, advantage, own), rtol=1e-10)


def test_worked_example():
    # Formula sheet of CAPO, SGD form: p = (.7, .2, .1), a = 0, A = 1, h = (1, 2), eta = .1.
    p, one = jnp.array([0.7, 0.2, 0.1]), jnp.ones((1, 1))
    logp, second, third = (jnp.full((1, 1), x) for x in (jnp.log(0.7), (p**2).sum(), (p**3).sum()))
    np.testing.assert_allclose(curvature.divergence_of_sgd(logp, second, 5 * one, one, 0.1), 0.00245, rtol=1e-5)
    np.testing.assert_allclose(curvature.improvement_of_sgd(logp, second, third, 5 * one, one, 0.1), 0.06665, rtol=1e-5)
    v = (jnp.array([1.0, 0.0, 0.0]) - p)[None, None]
    np.testing.assert_allclose((v * 5 * v).sum(), 0.7, rtol=1e-6)
    np.testing.assert_allclose(curvature.divergence_along(v, 5 * v, 0.1), 0.00245, rtol=1e-5)
    np.testing.assert_allclose(curvature.improvement_along(v, 5 * v, p[None, None], one, 0.1), 0.06665, rtol=1e-5)


def test_everything_is_a_constant():
    one = jnp.full((1, 1), 0.5)

    def total(logp, second, third, square, advantage):
        return (curvature.divergence_of_sgd(logp, second, square, advantage, 0.1)
                + curvature.improvement_of_sgd(logp, second, third, square, advantage, 0.1)).sum()

    def along(v, u, p, advantage):
        return (curvature.divergence_along(v, u, 0.1) + curvature.improvement_along(v, u, p, advantage, 0.1)).sum()

    pairs = jnp.full((1, 1, 2), 0.5)
    for gradient in (*jax.grad(total, argnums=range(5))(-one, one, one, one, one),
                     *jax.grad(along, argnums=range(4))(pairs, pairs, pairs, one)):
        np.testing.assert_array_equal(gradient, 0.0)


DIVERGENCE, IMPROVEMENT = jnp.array([[0.1, 0.3, 0.1, 0.1, 0.0]]), jnp.array([[0.1, 0.1, 0.3, -0.1, 0.0]])


@pytest.mark.parametrize("function, limits, kept", [
    (curvature.kept_symmetric, (0.2, 0.2), (1, 0, 0, 1, 1)), (curvature.kept_asymmetric, (0.2, 0.2), (1, 0, 0, 0, 1)),
    (curvature.kept_symmetric, (0.2, 0.05), (0, 0, 0, 0, 1)), (curvature.kept_symmetric, (0.0, 0.2), (1, 1, 0, 1, 1)),
    (curvature.kept_symmetric, (0.2, 0.0), (1, 0, 1, 1, 1)), (curvature.kept_asymmetric, (0.0, 0.2), (1, 1, 0, 0, 1)),
    (curvature.kept_asymmetric, (0.2, 0.0), (1, 0, 1, 1, 1)), (curvature.kept_asymmetric, (0.0, 0.0), (1,) * 5)])
def test_limits_and_switching_them_off(function, limits, kept):
    # The last token has A = 0, so both are 0: kept (formula sheet of CAPO, degenerate).
    np.testing.assert_array_equal(function(DIVERGENCE, IMPROVEMENT, *limits), [np.array(kept, bool)])


@pytest.mark.parametrize("planted", [0, 3])
def test_the_planted_outlier_is_the_first_rejected(planted):
    """Surprising, under a sure policy, at a large hidden state: as the limits fall it goes before any other token."""
    chosen = np.array([0.6, 0.5, 0.7, 0.4, 0.55])
    square = np.full(5, 2.0)
    chosen[planted], square[planted] = 0.001, 8.0
    rest = [np.array([p, *np.full(4, (1 - p) / 4)]) if i != planted else np.array([p, 1 - p, 0, 0, 0])
            for i, p in enumerate(chosen)]
    logp, second, third, square, advantage = (jnp.asarray([numbers], jnp.float32) for numbers in (
        np.log(chosen), [(p**2).sum() for p in rest], [(p**3).sum() for p in rest], square, np.ones(5)))
    divergence = curvature.divergence_of_sgd(logp, second, square, advantage, 0.05)
    improvement = curvature.improvement_of_sgd(logp, second, third, square, advantage, 0.05)
    for limits in (lambda scale: (scale, 0.0), lambda scale: (0.0, scale), lambda scale: (scale, scale)):
        for scale in np.geomspace(10, 1e-4, 60):
            kept = np.asarray(curvature.kept_symmetric(divergence, improvement, *limits(float(scale))))[0]
            if not kept.all():
                break
        assert list(np.flatnonzero(~kept)) == [planted]
