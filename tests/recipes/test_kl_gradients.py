"""Whose gradient a KL estimate has, in the loss and in the reward: small softmax policies, enumerated in float64.

Expectations are sums over every answer with its probability. The numbers come from the definition of the KL alone.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.advantage import baseline
from rl_jax.learner import assemble, update
from rl_jax.loss import divergence, score
from rl_jax.recipe import Recipe
from rl_jax.reward import combine
from rl_jax.types import Evaluated
from tests import numeric

V = 4
LOGITS, REFERENCE = numeric.normal(0, V), numeric.normal(1, V)


def at_the_policy(function):
    """(policy's log-probabilities, reference's, whatever drew) -> the estimate, for estimates of two arguments."""
    return lambda logp, drawn, reference: function(logp, reference)


ESTIMATES = {"k1": at_the_policy(divergence.k1), "k2": at_the_policy(divergence.k2), "k3": at_the_policy(divergence.k3),
             "k3+": at_the_policy(divergence.k3_straight_through), "k3 r": divergence.k3_corrected}


def kl(z):
    logp = jax.nn.log_softmax(z)
    return (jnp.exp(logp) * (logp - jax.nn.log_softmax(jnp.asarray(REFERENCE)))).sum()


def forward_kl(z):
    reference = jax.nn.log_softmax(jnp.asarray(REFERENCE))
    return (jnp.exp(reference) * (reference - jax.nn.log_softmax(z))).sum()


def mean_square(z):
    logp = jax.nn.log_softmax(z)
    return (jnp.exp(logp) * (logp - jax.nn.log_softmax(jnp.asarray(REFERENCE))) ** 2 / 2).sum()


def none(z):
    return 0.0 * z.sum()


def estimated(name, z, drawn):
    """The estimate at each of V tokens."""
    logp, reference = jax.nn.log_softmax(z)[:, None], jax.nn.log_softmax(jnp.asarray(REFERENCE))[:, None]
    return ESTIMATES[name](logp, jax.nn.log_softmax(drawn)[:, None], reference)[:, 0]


@pytest.mark.parametrize("name, value", [("k1", kl), ("k2", mean_square), ("k3", kl), ("k3+", kl), ("k3 r", kl)])
def test_mean_values(name, value):
    with jax.enable_x64(True):
        z = jnp.asarray(LOGITS)
        np.testing.assert_allclose((jax.nn.softmax(z) * estimated(name, z, z)).sum(), value(z), rtol=1e-12)


@pytest.mark.parametrize("name, whose", [("k1", none), ("k2", kl), ("k3", forward_kl), ("k3+", kl), ("k3 r", kl)])
def test_mean_gradient_as_a_term_of_the_loss(name, whose):
    with jax.enable_x64(True):
        z = jnp.asarray(LOGITS)
        found = jax.grad(lambda now: (jax.nn.softmax(z) * estimated(name, now, z)).sum())(z)
        np.testing.assert_allclose(found, jax.grad(whose)(z), rtol=1e-10, atol=1e-15)


def test_the_ratio_corrects_k3_off_policy_too():
    """Tokens of another policy: value and gradient are still those of KL(policy || reference); k3+'s are not."""
    with jax.enable_x64(True):
        z, drawn = jnp.asarray(LOGITS), jnp.asarray(numeric.normal(2, V))

        def mean(name):
            return jax.value_and_grad(lambda now: (jax.nn.softmax(drawn) * estimated(name, now, drawn)).sum())(z)

        (value, gradient), exact = mean("k3 r"), jax.grad(kl)(z)
        np.testing.assert_allclose(value, kl(z), rtol=1e-12)
        np.testing.assert_allclose(gradient, exact, rtol=1e-10)
        assert not np.allclose(mean("k3+")[1], exact, rtol=0.1)


def in_the_reward(estimate, probability):
    """REINFORCE on no reward but minus the estimate; every answer counts by its probability."""
    return Recipe(
        reward=lambda x: combine.less_estimate(x.score, estimate(x), x.mask, 1.0),
        advantage=lambda x: baseline.constant(x.reward, 0.0),
        loss=lambda policy, x: score.policy_gradient(policy.logp, x.advantage),
        weighting=lambda x: jnp.where(x.mask, probability[:, None], 0.0))


def gradient_in_the_reward(estimate, tokens_logp, reference_logp, z):
    """The gradient in z of that recipe's loss over all answers, whose tokens' log-probabilities are tokens_logp(z)."""
    drawn = tokens_logp(z)
    rows = drawn.shape[0]
    x = assemble.of_arrays(drawn, jnp.ones(drawn.shape, bool), jnp.zeros(rows), jnp.zeros(rows, int),
                           reference_logp=reference_logp)
    recipe = in_the_reward(lambda x: estimate(x.rollout_logp, x.rollout_logp, x.reference_logp),
                           jnp.exp(drawn.sum(axis=1)))

    def loss(now):
        logp = tokens_logp(now)
        return update.batch_loss(recipe, Evaluated(logp=logp, entropy=jnp.zeros_like(logp)), x)[0]

    return jax.grad(loss)(z)


@pytest.mark.parametrize("name, whose", [
    ("k1", kl), ("k2", lambda z: mean_square(z) - kl(z)), ("k3", lambda z: kl(z) - forward_kl(z)),
    ("k3+", lambda z: kl(z) - forward_kl(z)), ("k3 r", lambda z: kl(z) - forward_kl(z))])
def test_mean_gradient_in_the_reward(name, whose):
    with jax.enable_x64(True):
        z, reference = jnp.asarray(LOGITS), jax.nn.log_softmax(jnp.asarray(REFERENCE))[:, None]
        found = gradient_in_the_reward(ESTIMATES[name], lambda z: jax.nn.log_softmax(z)[:, None], reference, z)
        np.testing.assert_allclose(found, jax.grad(whose)(z), rtol=1e-5, atol=1e-7)  # credit is float32


def test_in_the_reward_k2_and_k3_hardly_pull_near_the_reference():
    with jax.enable_x64(True):
        z = jnp.asarray(REFERENCE + 1e-3 * LOGITS)
        reference = jax.nn.log_softmax(jnp.asarray(REFERENCE))[:, None]
        pull = {name: np.linalg.norm(gradient_in_the_reward(ESTIMATES[name], lambda z: jax.nn.log_softmax(z)[:, None],
                                                            reference, z)) for name in ("k1", "k2", "k3")}
        assert pull["k2"] < 0.01 * pull["k1"] and pull["k3"] < 0.01 * pull["k1"]


# Answers of two tokens: the distribution of the second depends on the first. All V^2 answers.
TREE, TREE_REFERENCE = numeric.normal(3, V + 1, V), numeric.normal(4, V + 1, V)


def tree_logp(z):
    """[V^2, 2]: log-probabilities of each answer's tokens; row 0 of z is for the first, row 1 + a for the second."""
    logp = jax.nn.log_softmax(z)
    return jnp.stack([jnp.repeat(logp[0], V), logp[1:].reshape(-1)], axis=1)


def test_k1_in_the_reward_is_the_kl_of_whole_answers_and_k2_in_the_loss_that_of_the_next_token():
    """The loss's term does not know that the first token decides where the second is drawn; the reward's does."""
    with jax.enable_x64(True):
        z, reference = jnp.asarray(TREE), tree_logp(jnp.asarray(TREE_REFERENCE))
        drawn = tree_logp(z)
        probability = jnp.exp(drawn.sum(axis=1))

        def whole(z):
            logp = tree_logp(z)
            return (jnp.exp(logp.sum(axis=1)) * (logp - reference).sum(axis=1)).sum()

        def next_token(z):
            """KL at the first position, and at the second from where the policy goes now, as a constant."""
            away = jax.nn.log_softmax(z) - jax.nn.log_softmax(jnp.asarray(TREE_REFERENCE))
            kls = (jax.nn.softmax(z) * away).sum(axis=1)
            return kls[0] + (jax.nn.softmax(jnp.asarray(TREE)[0]) * kls[1:]).sum()

        reward = gradient_in_the_reward(ESTIMATES["k1"], tree_logp, reference, z)
        loss = jax.grad(lambda now: (probability[:, None] * divergence.k2(tree_logp(now), reference)).sum())(z)
        np.testing.assert_allclose(reward, jax.grad(whole)(z), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(loss, jax.grad(next_token)(z), rtol=1e-10, atol=1e-15)
        np.testing.assert_allclose(reward[1:], loss[1:], rtol=1e-4, atol=1e-6)
        assert not np.allclose(reward[0], loss[0], rtol=0.1)
