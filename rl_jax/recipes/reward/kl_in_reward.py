"""GRPO with its divergence from the reference inside the reward, where the estimate has the gradient of the KL."""
from rl_jax.advantage import group
from rl_jax.loss import gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.reward import combine
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2510.01555", confidence="verified",
        title="Rethinking KL Regularization in RLHF: From Value Estimation to Gradient Optimization",
        note="beta, by default verl's, is per nat of the whole answer and not per token as in `baselines.grpo`; "
             "dividing by the group's deviation rescales the KL with the rewards.")
def kl_in_reward(group_size: int = 8, clip: float = 0.2, beta: float = 0.001, epsilon: float = 1e-6, epochs: int = 1,
                 minibatches: int = 1) -> Recipe:
    """GRPO on R - beta sum of (log p - reference's log p), k1 in the reward, in the place of k3 in the loss.

    Args:
      group_size: samples per prompt, at least 2.
      clip: half-width of the ratio's band.
      beta: reward units per nat of divergence from the reference, > 0.
      epsilon: added to the group's standard deviation, in reward units.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Liu et al. 2025, arXiv:2510.01555; verl, use_kl_in_reward.
    """
    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        reward=lambda x: combine.less_divergence(x.score, x.rollout_logp, x.reference_logp, x.mask, beta),
        advantage=lambda x: group.zscore(x.reward, x.group, epsilon=epsilon),
        loss=lambda policy, x: gate.ppo_clip(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, clip, clip),
        weighting=lambda x: aggregate.sequence_mean_token_mean(x.mask),
        schedule=Schedule(epochs, minibatches),
        models=("reference",))
