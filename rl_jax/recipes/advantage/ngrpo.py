"""NGRPO: GRPO with one right answer that nobody gave added to each group, so that groups in which all failed teach."""
from rl_jax.advantage import group
from rl_jax.loss import gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.selection import outcome
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2509.18851", confidence="verified",
        title="NGRPO: Negative-enhanced Group Relative Policy Optimization")
def ngrpo(group_size: int = 8, virtual_reward: float = 1.0, virtual: int = 1, clip_low: float = 0.16,
          clip_high: float = 0.24, epsilon: float = 1e-6, epochs: int = 1, minibatches: int = 1) -> Recipe:
    """Clipped ratio times z-score within group and virtual answers, mean over tokens of groups not all right; no KL.

    Args:
      group_size: samples per prompt, at least 2.
      virtual_reward: of each virtual answer: the largest there is, in reward units.
      virtual: how many of them there are; 0 is GRPO's credit.
      clip_low, clip_high: half-widths of the ratio's band, below and above 1.
      epsilon: added to the standard deviation, in reward units.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Nan et al. 2025, arXiv:2509.18851, with its published code.
    """
    def loss(policy, x):
        return gate.ppo_clip(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, clip_low, clip_high)

    def advantage(x):
        return group.zscore_with_virtual(x.reward, x.group, virtual_reward, count=virtual, epsilon=epsilon)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        selection=lambda x: outcome.not_all_correct(x.score, x.group),
        advantage=advantage, loss=loss,
        weighting=lambda x: aggregate.token_mean(x.mask),
        schedule=Schedule(epochs, minibatches))
