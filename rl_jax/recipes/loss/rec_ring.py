"""REC-Ring-NoIS: REINFORCE on tokens near the old policy, and on those far off that their credit pulls back."""
from rl_jax.advantage import group
from rl_jax.loss import ratio, reject
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2509.24203", confidence="verified",
        title="Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm: "
              "Demystifying Some Myths About GRPO and Its Friends")
def rec_ring(group_size: int = 8, clip_low: float = 0.2, clip_high: float = 0.2, far_low: float = 0.6,
             far_high: float = 2.0, epochs: int = 1, minibatches: int = 1) -> Recipe:
    """-keep A log p, A = R - group mean, keep r in the band, or far below it where A >= 0, or far above where A <= 0.

    Args:
      group_size: samples per prompt, at least 2.
      clip_low, clip_high: half-widths of the ratio's inner band, below and above 1.
      far_low, far_high: distances of the ratio from 1 at which the outer ranges begin.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Yao et al. 2025, arXiv:2509.24203, "REC-Ring-NoIS".
    """
    def loss(policy, x):
        r = ratio.per_token(policy.logp, x.rollout_logp)
        kept = reject.ring(r, x.advantage, clip_low, clip_high, far_low=far_low, far_high=far_high)
        return reject.policy_gradient(policy.logp, x.advantage, 1.0, kept)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.centred(x.reward, x.group),
        loss=loss,
        weighting=lambda x: aggregate.token_mean(x.mask),
        schedule=Schedule(epochs, minibatches))
