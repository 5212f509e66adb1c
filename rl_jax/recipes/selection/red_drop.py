"""RED-Drop: REINFORCE in which bad answers that outnumber the good ones of their group are dropped by lot."""
from rl_jax.advantage import group
from rl_jax.loss import score
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.selection import lots
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2509.24203", confidence="verified",
        title="Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm: "
              "Demystifying Some Myths About GRPO and Its Friends",
        note="As in the published code a dropped answer has credit 0, and its tokens still count in the denominator.")
def red_drop(group_size: int = 8, epochs: int = 1, minibatches: int = 1) -> Recipe:
    """-(R - mean of the kept) log p over token means; at most as many R < mean are kept as R >= mean, 0 elsewhere.

    Args:
      group_size: samples per prompt, at least 2.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Yao et al. 2025, arXiv:2509.24203, "RED-Drop".
    """
    def advantage(x):
        return group.centred_among(x.reward, x.group, lots.balanced(x.reward, x.group, x.seed))

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=advantage,
        loss=lambda policy, x: score.policy_gradient(policy.logp, x.advantage),
        weighting=lambda x: aggregate.token_mean(x.mask),
        schedule=Schedule(epochs, minibatches))
