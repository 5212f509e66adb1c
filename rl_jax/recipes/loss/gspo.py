"""GSPO: a whole answer is clipped or not, by how much more probable it has become per token."""
from rl_jax.advantage import group
from rl_jax.loss import gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2507.18071", confidence="verified", title="Group Sequence Policy Optimization")
def gspo(group_size: int = 8, clip_low: float = 3e-4, clip_high: float = 4e-4, epochs: int = 1,
         minibatches: int = 4) -> Recipe:
    """Clipped length-normalised sequence ratio times group z-score, mean over sequences; no KL.

    Args:
      group_size: samples per prompt, at least 2.
      clip_low, clip_high: half-widths of the sequence ratio's band, below and above 1.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Zheng et al. 2025, arXiv:2507.18071, eq. 5 to 7.
    """
    def loss(policy, x):
        return gate.ppo_clip(ratio.per_sequence(policy.logp, x.rollout_logp, x.mask), x.advantage, clip_low, clip_high)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.zscore(x.reward, x.group),
        loss=loss,
        weighting=lambda x: aggregate.sequence_mean_token_mean(x.mask),
        schedule=Schedule(epochs, minibatches))
