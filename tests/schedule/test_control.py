"""The adapting KL coefficient against loops."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.schedule import control
from rl_jax.types import Evaluated, Experience
from tests import numeric

MASK = np.array([[1, 1, 0], [0, 0, 0], [1, 1, 1]], bool)
LOGP, REFERENCE = (np.where(MASK, -np.abs(numeric.normal(seed, 3, 3)), np.nan) for seed in range(2))


@pytest.mark.parametrize("measured, factor", [(6.0, 1.0), (6.6, 1.01), (600.0, 1.02), (5.4, 0.99), (-3.0, 0.98)])
def test_proportional_worked_example(measured, factor):
    # Ziegler et al. 2019, section 2.2, with their target of 6 nats, gain .1 and error clipped at .2.
    found = control.proportional(jnp.float32(2.0), measured, 6.0, 0.1, 0.2)
    np.testing.assert_allclose(found, 2.0 * factor, rtol=1e-6)


def test_divergence_is_per_sequence_that_has_tokens():
    total = sum(float(LOGP[i, t]) - float(REFERENCE[i, t]) for i, t in zip(*np.nonzero(MASK), strict=True))
    np.testing.assert_allclose(numeric.in_float64(control.divergence_per_sequence, LOGP, REFERENCE, MASK), total / 2)


def batch(gap):
    """Experience in which the policy is `gap` nats per sequence away from the reference."""
    n, t = MASK.shape
    zeros = jnp.zeros((n, t))
    x = Experience(
        tokens=jnp.zeros((n, t), int), mask=jnp.asarray(MASK), rollout_logp=zeros, rollout_entropy=zeros,
        finished=jnp.ones(n, bool), version=jnp.zeros(n, int), score=jnp.zeros(n), reward=jnp.zeros(n),
        group=jnp.arange(n), parts={}, failed=jnp.zeros(n, bool), given={"reference_logp": zeros})
    return x, Evaluated(logp=jnp.where(MASK, gap * 2 / 5, jnp.nan), entropy=zeros), {}


def test_the_coefficient_rises_above_the_target_and_falls_below():
    made = control.adaptive_kl(0.5, target=2.0)
    update = jax.jit(made.update)
    state = made.init(64)
    assert made.read(state) == 0.5
    np.testing.assert_allclose(made.read(update(state, *batch(9.0))), 0.5 * 1.02, rtol=1e-6)
    np.testing.assert_allclose(made.read(update(state, *batch(1.8))), 0.5 * 0.99, rtol=1e-6)
    np.testing.assert_allclose(made.read(update(state, *batch(2.0))), 0.5, rtol=1e-6)


def test_the_state_keeps_its_shape_and_dtype():
    made = control.adaptive_kl(1.0, target=6.0)
    state = made.init(64)
    new = made.update(state, *batch(9.0))
    assert (new.shape, new.dtype) == (state.shape, state.dtype)


def test_a_control_without_the_reference_says_what_to_ask_for():
    made = control.adaptive_kl(1.0, target=6.0)
    x, policy, metrics = batch(1.0)
    with pytest.raises(ValueError, match="reference"):
        made.update(made.init(64), dataclasses.replace(x, given={}), policy, metrics)


@pytest.mark.parametrize("initial, target", [(0.0, 1.0), (1.0, 0.0)])
def test_a_coefficient_or_target_of_zero_is_refused(initial, target):
    with pytest.raises(ValueError, match="positive"):
        control.adaptive_kl(initial, target)
