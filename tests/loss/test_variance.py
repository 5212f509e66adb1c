"""R2VPO's penalised surrogate against loops over Python floats, its formula sheet's numbers, and on stale data."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.loss import gate, variance
from rl_jax.schedule import dual
from tests import numeric

RATIO = np.exp(numeric.normal(0, 4, 5))
ADVANTAGE = numeric.normal(1, 4, 5)


def test_against_loops():
    found = numeric.in_float64(lambda r, a: variance.penalised(r, a, 0.3), RATIO, ADVANTAGE)
    pairs = list(zip(RATIO.ravel().tolist(), ADVANTAGE.ravel().tolist(), strict=True))
    np.testing.assert_allclose(found.ravel(), [-(r * a - 0.3 * (r - 1) ** 2) for r, a in pairs], rtol=1e-12)
    np.testing.assert_allclose(numeric.in_float64(variance.squared_change, RATIO).ravel(),
                               [(r - 1) ** 2 for r, _ in pairs], rtol=1e-12)


def test_gradient_in_the_ratio_only():
    def of_ratio(ratio):
        return variance.penalised(ratio, jnp.asarray(ADVANTAGE), 0.3)

    np.testing.assert_allclose(numeric.gradient(of_ratio, RATIO), numeric.central_difference(of_ratio, RATIO),
                               rtol=1e-6, atol=1e-8)
    constants = jax.grad(lambda c: variance.penalised(jnp.asarray(RATIO), c[0], c[1]).sum())(
        (jnp.asarray(ADVANTAGE), jnp.asarray(0.3)))
    for slope in constants:
        np.testing.assert_array_equal(slope, 0.0)


@pytest.mark.parametrize("ratio, advantage, weight", [(1, 1, 1), (1.5, 1, 1.44), (13.5, 1, 0), (1.5, -1, -1.56)])
def test_worked_example(ratio, advantage, weight):
    # Formula sheet of R2VPO, lambda .04: the weight of log p in the objective, r (A - 2 lambda (r - 1)).
    slope = numeric.gradient(lambda logp: variance.penalised(jnp.exp(logp), jnp.full((1, 1), float(advantage)), 0.04),
                             np.log([[float(ratio)]]))
    np.testing.assert_allclose(-slope, weight, atol=1e-12)


def test_without_a_price_it_is_the_surrogate_without_a_gate():
    found = numeric.in_float64(lambda r, a: variance.penalised(r, a, 0.0), RATIO, ADVANTAGE)
    np.testing.assert_array_equal(found, numeric.in_float64(gate.unclipped, RATIO, ADVANTAGE))


@pytest.mark.parametrize("price", [0.0, 0.04, 7.0])
def test_at_ratio_one_the_gradient_is_the_surrogates(price):
    slope = numeric.gradient(lambda r: variance.penalised(r, jnp.asarray(ADVANTAGE), price), np.ones((4, 5)))
    np.testing.assert_allclose(slope, -ADVANTAGE)


def test_without_credit_the_ratio_is_still_pulled_to_one():
    slope = numeric.gradient(lambda r: variance.penalised(r, jnp.zeros((4, 5)), 0.04), RATIO)
    np.testing.assert_array_equal(np.sign(slope), np.sign(RATIO - 1))


def test_its_mean_is_chi_square_and_twice_the_divergence_of_small_moves():
    """Over all tokens of a vocabulary, weighted by the old policy: the expectation itself, no sample."""
    logits, move = numeric.normal(2, 7), numeric.normal(3, 7)
    q = np.exp(logits) / np.exp(logits).sum()
    for size, close in ((1.0, False), (1e-3, True)):
        moved = np.exp(logits + size * move)
        p = moved / moved.sum()
        found = (q * numeric.in_float64(variance.squared_change, (p / q)[None])[0]).sum()
        chi_square = sum(float(a) ** 2 / float(b) for a, b in zip(p, q, strict=True)) - 1
        np.testing.assert_allclose(found, chi_square, rtol=1e-8)
        divergence = sum(float(a) * np.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
        assert (abs(found / (2 * divergence) - 1) < 0.01) == close


def test_extremes_are_finite():
    for ratio in (np.exp(20.0), np.exp(-20.0)):
        value, slope = jax.value_and_grad(lambda r: variance.penalised(r, jnp.ones((1, 1)), 0.04).sum())(
            jnp.full((1, 1), ratio, jnp.float32))
        assert np.isfinite(value) and np.isfinite(slope).all()


# A bandit whose behaviour policy lags: batch k is 64 arms drawn by the policy of batch k - LAG. Rewards 0, .5, 1.
LAG, TARGET, STEPS = 16, 0.02, 300


@jax.jit
def stale_bandit(rate):
    """(probabilities [STEPS 3], variance met [STEPS], price [STEPS]), the price starting from 0."""
    def step(carry, key):
        history, price = carry  # logits, newest first
        now, behaviour = history[0], history[-1]
        arm = jax.random.categorical(key, behaviour, shape=(64, 1))
        reward = arm / 2.0
        credit = (reward - reward.mean()) / (reward.std() + 1e-3)

        def loss(logits):
            r = jnp.exp(jax.nn.log_softmax(logits)[arm] - jax.nn.log_softmax(behaviour)[arm])
            return variance.penalised(r, credit, price).mean(), variance.squared_change(r).mean()

        slope, met = jax.grad(loss, has_aux=True)(now)
        price = dual.ascended(price, met, TARGET, rate)
        history = jnp.concatenate([(now - 0.3 * slope)[None], history[:-1]])
        return (history, price), (jax.nn.softmax(history[0]), met, price)

    start = (jnp.zeros((LAG + 1, 3)), jnp.zeros(()))
    return jax.lax.scan(step, start, jax.random.split(jax.random.key(0), STEPS))[1]


def test_learns_from_stale_data():
    """The best arm is found, and while it is, the variance is a fraction of what it is without a price."""
    _, free, _ = (np.asarray(a) for a in stale_bandit(0.0))
    probability, met, price = (np.asarray(a) for a in stale_bandit(2.0))
    assert probability[:, 2].min() > 1 / 3 and probability[-1, 2] > 0.99
    assert met.max() < free.max() / 3 and met[:100].mean() < free[:100].mean() / 3
    rising = np.diff(price) > 0
    np.testing.assert_array_equal(rising, met[1:] > TARGET)
    assert price.min() >= 0 and rising.any() and price[-1] < price.max()
