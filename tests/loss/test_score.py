"""The policy-gradient term and the formula sheet's two-armed example."""
import jax
import jax.numpy as jnp
import numpy as np

from rl_jax.loss import score


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
