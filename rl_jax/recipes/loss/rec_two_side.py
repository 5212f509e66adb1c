"""REC-TwoSide-IS: REINFORCE weighted by the ratio, without any token whose ratio left the band."""
from rl_jax.advantage import group
from rl_jax.loss import ratio, reject
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2509.24203", confidence="verified",
        title="Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm: "
              "Demystifying Some Myths About GRPO and Its Friends")
def rec_two_side(group_size: int = 8, clip_low: float = 0.2, clip_high: float = 0.2, epochs: int = 1,
                 minibatches: int = 1) -> Recipe:
    """-keep r A log p with A = R - group mean, r constant, keep 1 - low <= r <= 1 + high.

    Args:
      group_size: samples per prompt, at least 2.
      clip_low, clip_high: half-widths of the ratio's band, below and above 1.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Yao et al. 2025, arXiv:2509.24203, "REC-TwoSide-IS".
    """
    def loss(policy, x):
        r = ratio.per_token(policy.logp, x.rollout_logp)
        return reject.policy_gradient(policy.logp, x.advantage, r, reject.two_side(r, clip_low, clip_high))

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.centred(x.reward, x.group),
        loss=loss,
        weighting=lambda x: aggregate.token_mean(x.mask),
        schedule=Schedule(epochs, minibatches))
