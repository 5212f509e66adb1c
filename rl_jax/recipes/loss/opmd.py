"""OPMD: REINFORCE over the group's log-mean-exp of rewards, with steps that shrink as the old policy is trusted."""
from rl_jax.advantage import group
from rl_jax.loss import reject
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2505.17826", confidence="verified",
        title="Trinity-RFT: A General-Purpose and Unified Framework for Reinforcement Fine-Tuning of Large Language "
              "Models",
        note="The published code offers two baselines; its default is the group's mean: "
             "`replace(opmd(), advantage=lambda x: group.centred(x.reward, x.group), name=...)`.")
def opmd(group_size: int = 8, temperature: float = 1.0, epochs: int = 1, minibatches: int = 1) -> Recipe:
    """-(R - tau log mean exp(R / tau)) log p / (1 + tau), over token means.

    Args:
      group_size: samples per prompt, at least 2.
      temperature: tau, in reward units; the baseline is the group's mean for large and its best for small.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Pan et al. 2025, arXiv:2505.17826; Trinity-RFT, opmd_advantage.py and opmd_policy_loss.py.
    """
    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.above_log_mean_exp(x.reward, x.group, temperature),
        loss=lambda policy, x: reject.mirror_descent(policy.logp, x.advantage, temperature),
        weighting=lambda x: aggregate.token_mean(x.mask),
        schedule=Schedule(epochs, minibatches))
