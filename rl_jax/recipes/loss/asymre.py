"""AsymRE: REINFORCE on any data, with a baseline below the mean, so that good answers count more than bad ones."""
from rl_jax.advantage import group
from rl_jax.loss import score
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2506.20520", confidence="secondary",
        title="Asymmetric REINFORCE for off-Policy Reinforcement Learning: Balancing positive and negative rewards",
        note="As in Trinity-RFT and arXiv:2509.24203. The same gradient as the group's mean as baseline and imitation "
             "of all samples with weight `shift`.")
def asymre(group_size: int = 8, shift: float = 0.1, epochs: int = 1, minibatches: int = 1) -> Recipe:
    """-(R - (group mean - shift)) log p, over token means.

    Args:
      group_size: samples per prompt, at least 2.
      shift: how far below the mean the baseline is, in reward units.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Arnal et al. 2025, arXiv:2506.20520, as in Trinity-RFT, asymre_advantage.py.
    """
    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.shifted(x.reward, x.group, shift),
        loss=lambda policy, x: score.policy_gradient(policy.logp, x.advantage),
        weighting=lambda x: aggregate.token_mean(x.mask),
        schedule=Schedule(epochs, minibatches))
