"""Rejection of tokens against loops over Python floats, gradients, what each reduces to, the sheets' numbers."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.loss import gate, ratio, reject, score
from tests import numeric

LOGP, OLD = -np.abs(numeric.normal(0, 6, 5)), -np.abs(numeric.normal(1, 6, 5))
RATIO, ADVANTAGE = np.exp(LOGP - OLD), numeric.normal(2, 6, 5)
ADVANTAGE[0] = 0.0
LOW, HIGH, FAR_LOW, FAR_HIGH = 0.2, 0.3, 0.6, 2.0


def one_side(r, a):
    return reject.one_side(r, a, LOW, HIGH)


def two_side(r, a):
    return reject.two_side(r, LOW, HIGH)


def ring(r, a):
    return reject.ring(r, a, LOW, HIGH, far_low=FAR_LOW, far_high=FAR_HIGH)


def oracle_one_side(r, a):
    return (a >= 0 and r <= 1 + HIGH) or (a <= 0 and r >= 1 - LOW)


def oracle_two_side(r, a):
    return 1 - LOW <= r <= 1 + HIGH


def oracle_ring(r, a):
    return oracle_two_side(r, a) or (a >= 0 and r <= 1 - FAR_LOW) or (a <= 0 and r >= 1 + FAR_HIGH)


MASKS = [(one_side, oracle_one_side), (two_side, oracle_two_side), (ring, oracle_ring)]


@pytest.mark.parametrize("function, oracle", MASKS)
def test_what_is_kept_against_loops(function, oracle):
    expected = [[oracle(r, a) for r, a in zip(*rows, strict=True)] for rows in zip(RATIO, ADVANTAGE, strict=True)]
    assert 0 < np.sum(expected) < RATIO.size
    np.testing.assert_array_equal(numeric.in_float64(function, RATIO, ADVANTAGE), expected)


@pytest.mark.parametrize("kind, advantage, expected", [
    ("one_side", 1, [1, 1, 1, 0, 0]), ("one_side", -1, [0, 0, 1, 1, 1]),
    ("two_side", 1, [0, 0, 1, 0, 0]), ("two_side", -1, [0, 0, 1, 0, 0]),
    ("ring", 1, [1, 0, 1, 0, 0]), ("ring", -1, [0, 0, 1, 0, 1]),
    ("one_side", 0, [1, 1, 1, 1, 1])])
def test_masks_worked_example(kind, advantage, expected):
    # Formula sheet of REC: bands .2 and .2, ring .6 and 2. The last line: A = 0 keeps both sides.
    r, a = jnp.array([[0.3, 0.5, 1.0, 1.5, 3.5]]), jnp.full((1, 5), float(advantage))
    found = {"one_side": lambda: reject.one_side(r, a, 0.2, 0.2), "two_side": lambda: reject.two_side(r, 0.2, 0.2),
             "ring": lambda: reject.ring(r, a, 0.2, 0.2, far_low=0.6, far_high=2.0)}[kind]()
    np.testing.assert_array_equal(found, [expected])


def test_the_loss_of_what_is_kept_against_loops():
    kept, weight = numeric.in_float64(one_side, RATIO, ADVANTAGE), RATIO
    expected = [-w * a * p if k else 0.0 for w, a, p, k in
                zip(weight.flat, ADVANTAGE.flat, LOGP.flat, kept.flat, strict=True)]
    found = numeric.in_float64(reject.policy_gradient, LOGP, ADVANTAGE, weight, kept)
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-12)


def test_ratio_credit_and_what_is_kept_are_constant():
    # The slope is -keep r A, not that of r, too; away from r = 1.
    def loss(logp):
        r = ratio.per_token(logp, jnp.asarray(OLD))
        return reject.policy_gradient(logp, jnp.asarray(ADVANTAGE), r, one_side(r, jnp.asarray(ADVANTAGE)))

    expected = [-r * a if oracle_one_side(r, a) else 0.0 for r, a in zip(RATIO.flat, ADVANTAGE.flat, strict=True)]
    np.testing.assert_allclose(numeric.gradient(loss, LOGP).ravel(), expected, rtol=1e-12)
    arrays = [jnp.asarray(x, jnp.float32) for x in (LOGP, ADVANTAGE, RATIO)]
    slopes = jax.grad(lambda a, w: reject.policy_gradient(arrays[0], a, w, one_side(w, a)).sum(), (0, 1))(*arrays[1:])
    np.testing.assert_array_equal(slopes, 0.0)


def test_with_the_ratio_as_weight_one_side_is_ppo_clip():
    # Formula sheet of REC: one-side + IS has the gradient of PPO's clip.
    advantage = jnp.asarray(ADVANTAGE, jnp.float32)

    def rec(logp):
        r = ratio.per_token(logp, jnp.asarray(OLD, jnp.float32))
        return reject.policy_gradient(logp, advantage, r, one_side(r, advantage)).sum()

    def ppo(logp):
        return gate.ppo_clip(ratio.per_token(logp, jnp.asarray(OLD, jnp.float32)), advantage, LOW, HIGH).sum()

    found, expected = (jax.grad(f)(jnp.asarray(LOGP, jnp.float32)) for f in (rec, ppo))
    assert 0 < np.sum(expected == 0) - 5 < 25  # the first row has no credit
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_members_of_the_family_are_one_function():
    # Formula sheet of REC: nothing rejected and W = 1 is REINFORCE; OPMD has W = 1 / (1 + tau).
    everything = np.ones(LOGP.shape, bool)
    plain = numeric.in_float64(reject.policy_gradient, LOGP, ADVANTAGE, 1.0, everything)
    np.testing.assert_array_equal(plain, numeric.in_float64(score.policy_gradient, LOGP, ADVANTAGE))
    opmd = numeric.in_float64(reject.mirror_descent, LOGP, ADVANTAGE, 3.0)
    np.testing.assert_allclose(opmd, -ADVANTAGE * LOGP / 4, rtol=1e-12)
    # Imitation of weight c and credit A is credit A + c: AsymRE.
    shifted = numeric.in_float64(score.policy_gradient, LOGP, ADVANTAGE + 0.1)
    np.testing.assert_allclose(plain + numeric.in_float64(reject.forward_divergence, LOGP, 0.1), shifted, rtol=1e-12)


def test_what_is_rejected_is_not_multiplied():
    r = jnp.array([[jnp.inf, jnp.nan, 1.0]])
    kept = reject.two_side(r, 0.2, 0.2)
    value, slope = jax.value_and_grad(lambda p: reject.policy_gradient(p, jnp.ones((1, 3)), r, kept).sum())(
        jnp.full((1, 3), -2.0))
    assert value == 2.0
    np.testing.assert_array_equal(slope, [[0, 0, -1]])


def test_squared_change():
    def change(logp):
        return reject.squared_change(logp, jnp.asarray(OLD), 0.3)

    np.testing.assert_allclose(numeric.in_float64(change, LOGP), 0.3 * (LOGP - OLD) ** 2, rtol=1e-12)
    np.testing.assert_allclose(numeric.gradient(change, LOGP), numeric.central_difference(change, LOGP), rtol=1e-6)
    slope = jax.grad(lambda old: reject.squared_change(jnp.zeros((1, 2)), old, 1.0).sum())(jnp.ones((1, 2)))
    np.testing.assert_array_equal(slope, 0.0)


CLIP = 0.1


def oracle_reciprocal(r, a):
    return -min(r * a, (1 + CLIP) * a if a >= 0 else a / (1 + CLIP))


def test_reciprocal_clip_against_loops():
    found = numeric.in_float64(reject.reciprocal_clip, RATIO, ADVANTAGE, CLIP)
    expected = [oracle_reciprocal(r, a) for r, a in zip(RATIO.flat, ADVANTAGE.flat, strict=True)]
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-12)

    def of_ratio(r):
        return reject.reciprocal_clip(r, jnp.asarray(ADVANTAGE), CLIP)

    np.testing.assert_allclose(numeric.gradient(of_ratio, RATIO), numeric.central_difference(of_ratio, RATIO),
                               rtol=1e-6, atol=1e-9)
    slope = jax.grad(lambda a: reject.reciprocal_clip(jnp.full((2, 2), 0.95), a, CLIP).sum())(jnp.ones((2, 2)))
    np.testing.assert_array_equal(slope, 0.0)


def test_reciprocal_clip_is_ppo_clip_with_its_lower_edge_moved():
    # Formula sheet of LOOP: low = 1 - 1 / (1 + clip).
    arrays = [jnp.asarray(x, jnp.float32) for x in (RATIO, ADVANTAGE)]
    found, expected = (jax.value_and_grad(lambda r, f=f: f(r).sum())(arrays[0]) for f in (
        lambda r: reject.reciprocal_clip(r, arrays[1], CLIP),
        lambda r: gate.ppo_clip(r, arrays[1], 1 - 1 / (1 + CLIP), CLIP)))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)


@pytest.mark.parametrize("r, advantage, slope", [
    (0.92, -1, 1), (0.90, -1, 0), (0.905, -1, 0), (1.0, -1, 1), (1.0, 1, -1), (1.09, 1, -1), (1.11, 1, 0)])
def test_reciprocal_clip_worked_example(r, advantage, slope):
    # Formula sheet of LOOP: clip = .1, the band begins at .90909.
    found = jax.grad(lambda r: reject.reciprocal_clip(r, jnp.full((1, 1), float(advantage)), 0.1).sum())(
        jnp.full((1, 1), r))
    np.testing.assert_allclose(found, slope)


def test_the_band_of_one_minus_clip_would_keep_more():
    # Formula sheet of LOOP: [.9, 1.1] keeps r = .905 alive.
    slope = jax.grad(lambda r: gate.ppo_clip(r, -jnp.ones((1, 1)), 0.1, 0.1).sum())(jnp.full((1, 1), 0.905))
    np.testing.assert_allclose(slope, 1)
