"""SAPO: instead of a clip, a gate that closes smoothly the further a token's ratio is from 1."""
from rl_jax.advantage import group
from rl_jax.loss import gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2511.20347", confidence="secondary", title="Soft Adaptive Policy Optimization")
def sapo_soft_gate(group_size: int = 8, positive: float = 1.0, negative: float = 1.05, epochs: int = 1,
                   minibatches: int = 1) -> Recipe:
    """(4 / tau) sigmoid(tau (r - 1)) times group z-score, tau by its sign; mean over sequences of token means, no KL.

    Args:
      group_size: samples per prompt, at least 2.
      positive, negative: tau where credit is above 0 and elsewhere; larger closes the gate nearer to 1.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Gao et al. 2025, arXiv:2511.20347, "Soft Adaptive Policy Optimization".
    """
    def loss(policy, x):
        return gate.soft(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, positive, negative)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.zscore(x.reward, x.group),
        loss=loss,
        weighting=lambda x: aggregate.sequence_mean_token_mean(x.mask),
        schedule=Schedule(epochs, minibatches))
