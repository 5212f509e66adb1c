"""Gated objectives against loops over Python floats, their gradients, and the formula sheets' numbers."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.loss import gate
from tests import numeric

RATIO = np.exp(numeric.normal(0, 4, 5))
SEQUENCE = np.exp(0.3 * numeric.normal(2, 4, 5))
ADVANTAGE = numeric.normal(1, 4, 5)
SHARE = np.random.default_rng(3).random((4, 5))
LOW, HIGH, CEILING = 0.2, 0.28, 3.0
POSITIVE, NEGATIVE = 1.0, 2.0
S_LOW, S_HIGH = 0.03, 0.05


def clip(r, low, high):
    return min(max(r, 1 - low), 1 + high)


def oracle_ppo(r, a, low=LOW, high=HIGH):
    return -min(r * a, clip(r, low, high) * a)


def oracle_dual(r, a):
    return min(oracle_ppo(r, a), -CEILING * a) if a < 0 else oracle_ppo(r, a)


def oracle_two_sided(r, a, ceiling=1.1):
    return -min(min(r, ceiling) * a, clip(r, LOW, HIGH) * a)


def oracle_soft(r, a):
    tau = POSITIVE if a > 0 else NEGATIVE
    return -4 / tau / (1 + math.exp(-tau * (r - 1))) * a


def oracle_mixture(r, s, a, w):
    free = w * r + (1 - w) * s
    held = w * clip(r, LOW, LOW) + (1 - w) * clip(s, S_LOW, S_HIGH)
    return -min(free * a, held * a)


def oracle_two_losses(r, s, a, w):
    return w * oracle_ppo(r, a, LOW, LOW) + (1 - w) * oracle_ppo(s, a, S_LOW, S_HIGH)


CASES = [(gate.unclipped, lambda r, a: -r * a),
         (functools.partial(gate.ppo_clip, low=LOW, high=HIGH), oracle_ppo),
         (functools.partial(gate.dual_clip, low=LOW, high=HIGH, ceiling=CEILING), oracle_dual),
         (functools.partial(gate.two_sided_clip, low=LOW, high=HIGH, ceiling=1.1), oracle_two_sided),
         (functools.partial(gate.soft, positive=POSITIVE, negative=NEGATIVE), oracle_soft)]
MIXTURES = [
    (functools.partial(one, clip=LOW, sequence_low=S_LOW, sequence_high=S_HIGH), oracle)
    for one, oracle in ((gate.ppo_clip_of_mixture, oracle_mixture), (gate.mixture_of_ppo_clips, oracle_two_losses))]


@pytest.mark.parametrize("function, oracle", CASES)
def test_against_loops(function, oracle):
    found = numeric.in_float64(function, RATIO, ADVANTAGE)
    expected = [oracle(r, a) for r, a in zip(RATIO.flat, ADVANTAGE.flat, strict=True)]
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-12)


@pytest.mark.parametrize("function, oracle", CASES)
def test_gradient_in_the_ratio_only(function, oracle):
    def of_ratio(ratio):
        return function(ratio, jnp.asarray(ADVANTAGE))

    np.testing.assert_allclose(numeric.gradient(of_ratio, RATIO), numeric.central_difference(of_ratio, RATIO),
                               rtol=1e-6, atol=1e-9)
    credit = jax.grad(lambda a: function(jnp.asarray(RATIO, jnp.float32), a).sum())(jnp.asarray(ADVANTAGE, jnp.float32))
    np.testing.assert_array_equal(credit, 0.0)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("function, _", CASES)
def test_the_whole_gradient_at_ratio_one(function, _, advantage):
    gradient = jax.grad(lambda r: function(r, jnp.full((1, 1), advantage)).sum())(jnp.ones((1, 1)))
    np.testing.assert_allclose(gradient, -advantage)


@pytest.mark.parametrize("function", [gate.dual_clip, gate.two_sided_clip])
@pytest.mark.parametrize("ratio, advantage, loss", [(5, -1, 3), (1.5, -1, 1.5), (0.5, -1, 0.8), (1.5, 1, -1.2)])
def test_dual_clip_worked_example(function, ratio, advantage, loss):
    # Formula sheet of PPO: band .2, c = 3. TRL's delta is the same for c > 1 + high.
    found = function(jnp.full((1, 1), float(ratio)), jnp.full((1, 1), float(advantage)), 0.2, 0.2, 3.0)
    np.testing.assert_allclose(found, loss, rtol=1e-6)


def test_the_ceiling_of_the_two_sided_clip_only_bites_on_bad_tokens():
    # Formula sheet of PPO: where A > 0 the band holds the ratio first. Gradients agree with the dual clip's, too.
    options = {"low": LOW, "high": HIGH, "ceiling": CEILING}
    for signed in (np.abs(ADVANTAGE), -np.abs(ADVANTAGE)):
        credit = jnp.asarray(signed, jnp.float32)
        dual, two = (jax.value_and_grad(lambda r, f=f, a=credit: f(r, a, **options).sum())(
            jnp.asarray(RATIO, jnp.float32)) for f in (gate.dual_clip, gate.two_sided_clip))
        np.testing.assert_allclose(two[0], dual[0], rtol=1e-6)
        np.testing.assert_allclose(two[1], dual[1], rtol=1e-6)
    high = jnp.full((1, 1), 50.0)
    np.testing.assert_allclose(gate.two_sided_clip(high, jnp.ones((1, 1)), **options), -1.28, rtol=1e-6)
    np.testing.assert_allclose(gate.two_sided_clip(high, -jnp.ones((1, 1)), **options), 3.0, rtol=1e-6)


@pytest.mark.parametrize("ratio, advantage, high, slope", [(1.25, 1, 0.28, 1.25), (1.25, 1, 0.2, 0),
                                                           (0.75, -1, 0.28, 0)])
def test_decoupled_band_worked_example(ratio, advantage, high, slope):
    # Formula sheet of DAPO: gradient in the log-probability, which is r times that in r.
    gradient = jax.grad(lambda r: -gate.ppo_clip(r, jnp.full((1, 1), float(advantage)), 0.2, high).sum())(
        jnp.full((1, 1), ratio))
    np.testing.assert_allclose(ratio * gradient, slope, rtol=1e-6)


def test_the_band_may_be_traced_or_differ_per_token():
    ratio, advantage = jnp.full((1, 2), 1.5), jnp.ones((1, 2))
    np.testing.assert_allclose(jax.jit(gate.ppo_clip)(ratio, advantage, 0.2, jnp.float32(0.3)), -1.3, rtol=1e-6)
    np.testing.assert_allclose(gate.ppo_clip(ratio, advantage, 0.2, jnp.array([[0.1, 0.9]])), [[-1.1, -1.5]], rtol=1e-6)


@pytest.mark.parametrize("ratio, tau, value, slope", [
    (1.0, 1.0, 2.0, 1.0), (1.5, 1.0, 2.489837, 0.940015), (0.5, 1.05, 1.415938, 0.934140),
    (2.0, 1.0, None, 0.786448), (2.0, 1.05, None, 0.768110)])
def test_soft_gate_worked_example(ratio, tau, value, slope):
    # Formula sheet of SAPO: f(r; tau) and f'(r; tau), from the side of either sign.
    for sign, options in ((1.0, (tau, 9.0)), (-1.0, (9.0, tau))):
        found, gradient = jax.value_and_grad(lambda r, a=sign, o=options: gate.soft(r, jnp.full((1, 1), a), *o).sum())(
            jnp.full((1, 1), ratio))
        np.testing.assert_allclose(gradient, [[-sign * slope]], rtol=1e-5)
        if value is not None:
            np.testing.assert_allclose(found, -sign * value, rtol=1e-5)


def test_soft_gate_between_no_gate_and_a_hard_one():
    # Formula sheet of SAPO: tau -> 0 is the linear surrogate, a large tau leaves only ratios near 1, on both sides.
    def slope(tau):
        return jax.grad(lambda r: gate.soft(r, jnp.ones((1, 3)), tau, tau).sum())(jnp.array([[0.5, 1.0, 3.0]]))

    linear = jax.grad(lambda r: gate.unclipped(r, jnp.ones((1, 3))).sum())(jnp.ones((1, 3)))
    np.testing.assert_allclose(slope(1e-3), linear, rtol=1e-5)
    np.testing.assert_allclose(slope(100.0), [[0.0, -1.0, 0.0]], atol=1e-6)


@pytest.mark.parametrize("function, oracle", MIXTURES)
def test_mixtures_against_loops(function, oracle):
    arrays = (RATIO, SEQUENCE, ADVANTAGE, SHARE)
    expected = [oracle(*numbers) for numbers in zip(*(a.flat for a in arrays), strict=True)]
    np.testing.assert_allclose(numeric.in_float64(function, *arrays).ravel(), expected, rtol=1e-12)


@pytest.mark.parametrize("function, _", MIXTURES)
def test_gradient_of_mixtures_in_both_ratios_only(function, _):
    rest = jnp.asarray(ADVANTAGE), jnp.asarray(SHARE)
    of_token = [lambda r: function(r, jnp.asarray(SEQUENCE), *rest), RATIO]
    of_sequence = [lambda s: function(jnp.asarray(RATIO), s, *rest), SEQUENCE]
    for of, at in (of_token, of_sequence):
        np.testing.assert_allclose(numeric.gradient(of, at), numeric.central_difference(of, at), rtol=1e-6, atol=1e-9)
    both = tuple(jnp.asarray(a, jnp.float32) for a in (RATIO, SEQUENCE))
    for constant in jax.grad(lambda a, w: function(*both, a, w).sum(), (0, 1))(*rest):
        np.testing.assert_array_equal(constant, 0.0)


def test_mixture_worked_example():
    # Formula sheet of DHPO: clipping before mixing. Mixing first and clipping at 1.2 would give 1.2 and 1.06312.
    ratio, sequence = jnp.exp(jnp.array([[0.5, -0.1]])), jnp.exp(jnp.full((1, 2), 0.2))
    found = gate.ppo_clip_of_mixture(ratio, sequence, jnp.ones((1, 2)), 0.5, clip=0.2, sequence_low=4e-4,
                                     sequence_high=4e-4)
    np.testing.assert_allclose(-found, [[1.1002, 0.952619]], rtol=1e-5)


@pytest.mark.parametrize("function, low, objective", [
    (gate.ppo_clip_of_mixture, 4e-4, 1.0998), (gate.ppo_clip_of_mixture, 3e-4, 1.09985),
    (gate.mixture_of_ppo_clips, 4e-4, 1.05)])
def test_the_two_readings_of_dhpo_differ(function, low, objective):
    # Formula sheet of DHPO: r = 1.5, s = .9, A = 1.
    found = function(jnp.full((1, 1), 1.5), jnp.full((1, 1), 0.9), jnp.ones((1, 1)), 0.5, clip=0.2, sequence_low=low,
                     sequence_high=4e-4)
    np.testing.assert_allclose(-found, objective, rtol=1e-6)


@pytest.mark.parametrize("function", [gate.ppo_clip_of_mixture, gate.mixture_of_ppo_clips])
@pytest.mark.parametrize("share", [1.0, 0.0])
def test_mixtures_end_in_the_two_clips(function, share):
    # Formula sheet of DHPO: w = 1 is GRPO's clip and w = 0 that of GSPO-token, in value and gradient.
    arrays = [jnp.asarray(a, jnp.float32) for a in (RATIO, SEQUENCE, ADVANTAGE)]

    def mixed(r, s, a):
        return function(r, s, a, share, clip=LOW, sequence_low=S_LOW, sequence_high=S_HIGH).sum()

    def one(r, s, a):
        return gate.ppo_clip(r, a, LOW, LOW).sum() if share else gate.ppo_clip(s, a, S_LOW, S_HIGH).sum()

    found, expected = (jax.value_and_grad(f, (0, 1))(*arrays) for f in (mixed, one))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for gradient, of_one in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(gradient, of_one, rtol=1e-6, atol=1e-7)


def test_one_wild_token_cannot_leave_the_mixed_band():
    # A ratio of 50: at most the mean of the two upper limits, and no gradient in the wild ratio.
    def objective(r):
        return -gate.ppo_clip_of_mixture(r, jnp.ones((1, 1)), jnp.ones((1, 1)), 0.5, clip=0.2, sequence_low=3e-4,
                                         sequence_high=4e-4).sum()

    value, slope = jax.value_and_grad(objective)(jnp.full((1, 1), 50.0))
    np.testing.assert_allclose((value, slope[0, 0]), (1.1, 0.0), rtol=1e-6)


def test_entropy_share():
    # Entropy over the largest of the chosen; what is hidden is larger, and NaN.
    entropy = jnp.array([[0.5, 9.0, 2.0], [1.0, jnp.nan, 0.0]])
    mask = jnp.array([[True, False, True], [True, False, True]])
    np.testing.assert_allclose(gate.entropy_share(entropy, mask), [[0.25, 0, 1], [0.5, 0, 0]])
    np.testing.assert_array_equal(gate.entropy_share(jnp.zeros((2, 3)), mask), 0.0)
    np.testing.assert_array_equal(gate.entropy_share(entropy, jnp.zeros((2, 3), bool)), 0.0)
    np.testing.assert_array_equal(jax.grad(lambda h: gate.entropy_share(h, mask).sum())(entropy), 0.0)
