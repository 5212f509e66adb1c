"""Better answers against worse ones to the same prompt: a loss for each pair.

Answers have levels, higher is better. `beats` compares every two answers of the batch, [N, N]: N^2 numbers for each
array of pairs, in the gradient three or four at once, 4 MB each at N = 1024 and 64 MB at N = 4096.
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl_jax import masked
from rl_jax.loss import divergence
from rl_jax.types import Group, Mask, PerSequence, Scalar, Tokens

BEST = -1.0


def levels(score: PerSequence, finished: Bool[Array, " N"], formatted: PerSequence | Scalar = 1.0,
           correct: Scalar = 1.0) -> PerSequence:
    """-1 right, -2 finished and wrong, -3 neither right nor finished, -4 in a bad format, whatever else.

    Args:
      score: what the verifier said, in reward units.
      finished: whether the answer came to its end.
      formatted: what the verifier said of the format, > 0 is good; without it nothing is of level -4.
      correct: the score from which on an answer is right.

    Source: Su et al. 2025, arXiv:2504.04524, "Preference levels", there counted 1 to 4; that "incomplete" is "without
      an end token" is a choice.
    """
    content = jnp.where(score >= correct, BEST, jnp.where(finished, -2.0, -3.0))
    return jnp.where(formatted > 0, content, -4.0)


def beats(level: PerSequence, group: Group, mask: Mask) -> Bool[Array, "N N"]:
    """[i, j]: i and j answer the same prompt, i is of the higher level, and both have chosen tokens.

    Args:
      level: from `levels`, or any score; higher is better.
      group: id of each sequence's group.
      mask: which tokens the policy chose.

    Source: Su et al. 2025, arXiv:2504.04524, with its published code.
    """
    present = mask.any(axis=1)
    better = level[:, None] > level[None, :]
    return better & (group[:, None] == group[None, :]) & present[:, None] & present[None, :]


def log_ratio(logp: Tokens, reference_logp: Tokens, mask: Mask) -> PerSequence:
    """z = mean over the answer's tokens of (logp - reference_logp), in nats per token: no answer gains by its length.

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      reference_logp: that of the reference, in nats; carries no gradient.
      mask: which tokens the policy chose.

    Source: Su et al. 2025, arXiv:2504.04524; its published code takes the reference, its text the old policy.
    """
    return masked.row_mean(logp - jax.lax.stop_gradient(reference_logp), mask)


def logistic(z: PerSequence, level: PerSequence, beats: Bool[Array, "N N"], beta: Scalar,
             factor: Scalar) -> Float[Array, "N N"]:
    """[i, j]: -log sigmoid(beta f (z_i - z_j)) where i beats j, 0 elsewhere; f is `factor` where i is of level -1.

    With two levels and factor = 1 it is the loss of DPO with length-normalised log-ratios.

    Args:
      z: log-ratio of each answer, in nats per token; differentiable.
      level: from `levels`.
      beats: which pairs there are, from `beats`.
      beta: slope, per nat, > 0.
      factor: f, dimensionless, >= 0; 1 treats all levels alike.

    Source: Su et al. 2025, arXiv:2504.04524, with its published code.
    """
    slope = beta * jnp.where(level == BEST, factor, 1.0)
    margin = slope[:, None] * (z[:, None] - z[None, :])
    return jnp.where(beats, jax.nn.softplus(-margin), 0.0)


def won(pair_loss: Float[Array, "N N"], mask: Mask) -> Tokens:
    """Sum of the losses of the pairs that the sequence wins, the same at each of its positions.

    Args:
      pair_loss: [i, j], of the pair in which i beats j.
      mask: which tokens the policy chose.
    """
    return jnp.broadcast_to(pair_loss.sum(axis=1, keepdims=True), mask.shape)


def unpaired(z: PerSequence, level: PerSequence, mask: Mask, beta: Scalar) -> Tokens:
    """-log sigmoid(beta z) for level -1, -log sigmoid(-beta z) for the others, the same at each position.

    For a batch without any pair.

    Args:
      z: log-ratio of each answer, in nats per token; differentiable.
      level: from `levels`.
      mask: which tokens the policy chose.
      beta: slope, per nat, > 0; one version of the published code has 1 here.

    Source: Su et al. 2025, arXiv:2504.04524, with its published code.
    """
    margin = beta * jnp.where(level == BEST, z, -z)
    return jnp.broadcast_to(jax.nn.softplus(-margin)[:, None], mask.shape)


def root_trust(logp: Tokens, old_logp: Tokens) -> Tokens:
    """sqrt(k3 + 1/4), k3 of logp and old_logp: the slope of k3 near the old policy, half its exponent far from it.

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      old_logp: that of the policy that drew it, in nats; carries no gradient.

    Source: Su et al. 2025, arXiv:2504.04524, an option of its published code; `divergence.k3` is its default.
    """
    return jnp.sqrt(divergence.k3(logp, old_logp) + 0.25)
