"""DCPO: rare tokens may change more, and an answer is also compared with all earlier answers to its prompt."""
from rl_jax.advantage import history
from rl_jax.loss import bounds, gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.schedule import memory
from rl_jax.weighting import prompts


@recipe(paper="arXiv:2509.02333", confidence="verified", title="DCPO: Dynamic Clipping Policy Optimization",
        note="The mean over prompts is a choice; published code takes token means per micro-batch, bounds 0.2, 0.28.")
def dcpo_dynamic_clip(group_size: int = 16, clip_low: float = 0.16, clip_high: float = 0.2, cap: float = 10.0,
                      ceiling: float = 10.0, epochs: int = 1, minibatches: int = 1) -> Recipe:
    """Dual-clipped ratio, its band set by the token's old probability, times a z-score smoothed over past groups.

    Args:
      group_size: samples per prompt, at least 2.
      clip_low, clip_high: largest |r - 1| p below and above 1, p the token's new probability.
      cap, ceiling: upper end of the widest band; largest ratio that counts where the advantage is negative.
      epochs, minibatches: passes over the batch, optimiser steps per pass.
    """
    def past(x):
        return memory.rows(x.coefficient.history, x.example)

    def loss(policy, x):
        low, high = bounds.by_probability(x.rollout_logp, clip_low, clip_high, cap)
        return gate.dual_clip(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, low, high, ceiling)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: history.smoothed(x.reward, x.group, **past(x)), loss=loss,
        weighting=lambda x: prompts.sum_of_token_means(x.mask, group_size),
        schedule=Schedule(epochs, minibatches, controls={"history": memory.per_example(
            history.NONE, lambda x: history.updated(x.reward, x.group, **past(x)))}))
