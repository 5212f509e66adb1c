"""RED-Weight: REINFORCE in which better answers count exponentially more than worse ones."""
from rl_jax.advantage import group
from rl_jax.loss import score
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate, quality


@recipe(paper="arXiv:2509.24203", confidence="verified",
        title="Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm: "
              "Demystifying Some Myths About GRPO and Its Friends")
def red_weight(group_size: int = 8, temperature: float = 1.0, epochs: int = 1, minibatches: int = 1) -> Recipe:
    """-exp(A / temperature) A log p with A = R - group mean, over token means.

    Args:
      group_size: samples per prompt, at least 2.
      temperature: the credit that makes a weight of e, in reward units.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Yao et al. 2025, arXiv:2509.24203, "RED-Weight".
    """
    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.centred(x.reward, x.group),
        loss=lambda policy, x: score.policy_gradient(policy.logp, x.advantage),
        weighting=lambda x: aggregate.token_mean(x.mask) * quality.exponential(x.advantage, temperature),
        schedule=Schedule(epochs, minibatches))
