"""The entropy bonus."""
import jax
import jax.numpy as jnp
import numpy as np

from rl_jax.loss import entropy


def test_the_loss_falls_as_entropy_grows():
    value, slope = jax.value_and_grad(lambda h: entropy.bonus(h, 0.01).sum())(jnp.array([[0.5, 2.0]]))
    np.testing.assert_allclose(value, -0.025, rtol=1e-6)
    np.testing.assert_allclose(slope, -0.01)


def test_the_coefficient_may_be_traced():
    np.testing.assert_allclose(jax.jit(entropy.bonus)(jnp.ones((1, 2)), jnp.float32(0.5)), -0.5)
