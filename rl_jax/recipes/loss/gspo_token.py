"""GSPO-token: GSPO's ratio in a form that lets credit differ from token to token."""
from rl_jax.advantage import group
from rl_jax.loss import gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2507.18071", confidence="verified", title="Group Sequence Policy Optimization",
        note="With one credit per answer, as here, it is `loss.gspo`; it is meant for an advantage slot that returns "
             "one number per token.")
def gspo_token(group_size: int = 8, clip_low: float = 3e-4, clip_high: float = 4e-4, epochs: int = 1,
               minibatches: int = 4) -> Recipe:
    """Clipped sequence ratio, of which each token moves its own copy, times credit; mean over sequences of token means.

    Args:
      group_size: samples per prompt, at least 2.
      clip_low, clip_high: half-widths of the sequence ratio's band, below and above 1.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Zheng et al. 2025, arXiv:2507.18071, eq. 13 and 14.
    """
    def loss(policy, x):
        s = ratio.per_sequence_token(policy.logp, x.rollout_logp, x.mask)
        return gate.ppo_clip(s, x.advantage, clip_low, clip_high)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.zscore(x.reward, x.group),
        loss=loss,
        weighting=lambda x: aggregate.sequence_mean_token_mean(x.mask),
        schedule=Schedule(epochs, minibatches))
