"""LOOP: PPO without a critic, each answer's baseline being the mean reward of the others to the same prompt."""
from rl_jax.advantage import group
from rl_jax.loss import ratio, reject
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.selection import outcome
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2502.01600", confidence="verified",
        title="Reinforcement Learning for Long-Horizon Interactive LLM Agents",
        note="The variants: `ratio.per_sequence`, `score.policy_gradient`, `group.leave_one_out_zscore`. Stopping an "
             "epoch at a large divergence is not there.")
def loop(group_size: int = 6, clip: float = 0.1, threshold: float = 0.01, epochs: int = 2,
         minibatches: int = 1) -> Recipe:
    """Ratio clipped to [1 / (1 + clip), 1 + clip] times R - mean of the others, token means of answers with |A| >= .01.

    Args:
      group_size: samples per prompt, at least 2.
      clip: how far the ratio may rise above 1; below, the band ends at the reciprocal.
      threshold: answers with less credit than this are left out, in reward units.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Chen et al. 2025, arXiv:2502.01600, with its published code.
    """
    def loss(policy, x):
        return reject.reciprocal_clip(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, clip)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        selection=lambda x: outcome.at_least(group.leave_one_out(x.reward, x.group), threshold),
        advantage=lambda x: group.leave_one_out(x.reward, x.group),
        loss=loss,
        weighting=lambda x: aggregate.present_sequence_mean_token_mean(x.mask),
        schedule=Schedule(epochs, minibatches))
