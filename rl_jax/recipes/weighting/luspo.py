"""LUSPO: GSPO with each answer counted by its length, so that long answers are not taught less per token."""
from rl_jax.advantage import group
from rl_jax.loss import gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2602.05261", confidence="secondary",
        title="Length-Unbiased Sequence Policy Optimization: Revealing and Controlling Response Length Variation in "
              "RLVR",
        note="A total over tokens: the step grows with the length of the answers.")
def luspo(group_size: int = 8, clip_low: float = 2e-3, clip_high: float = 2.5e-3, epochs: int = 1,
          minibatches: int = 1) -> Recipe:
    """n_i times GSPO's clipped sequence ratio times group z-score, mean over sequences; no KL.

    Args:
      group_size: samples per prompt, at least 2.
      clip_low, clip_high: half-widths of the sequence ratio's band, below and above 1.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Liu et al. 2026, arXiv:2602.05261, "Length-Unbiased Sequence Policy Optimization".
    """
    def loss(policy, x):
        return gate.ppo_clip(ratio.per_sequence(policy.logp, x.rollout_logp, x.mask), x.advantage, clip_low, clip_high)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.zscore(x.reward, x.group),
        loss=loss,
        weighting=lambda x: aggregate.sequence_mean_token_sum(x.mask),
        schedule=Schedule(epochs, minibatches))
