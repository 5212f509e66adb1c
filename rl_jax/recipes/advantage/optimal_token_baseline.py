"""OTB: every position has a baseline of its own, in which answers count by the size of their gradient so far."""
from rl_jax.advantage import temporal, token_baseline
from rl_jax.loss import gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2602.07078", confidence="verified",
        title="The Optimal Token Baseline: Variance Reduction for Long-Horizon LLM-RL",
        note="Positions are those of the answer, as in verl's single-turn form, which leaves the last tokens of a "
             "group's longest answer without credit.")
def optimal_token_baseline(group_size: int = 8, clip: float = 0.2, epochs: int = 1, minibatches: int = 1) -> Recipe:
    """Clipped ratio times G_t - sum W_t G_t / sum W_t over the group, W the accumulated |d logp / d logits|^2.

    Args:
      group_size: samples per prompt; in a group of one there is no baseline.
      clip: half-width of the ratio's band.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Li et al. 2026, arXiv:2602.07078; verl, core_algos.py, whose loss this takes.
    """
    def advantage(x):
        reward_to_go = temporal.reward_to_go(temporal.at_last_token(x.reward, x.mask), x.mask, 1.0)
        energy = token_baseline.accumulated(token_baseline.score_norm(x.rollout_logp, x.second_moment), x.mask)
        return token_baseline.optimal(reward_to_go, energy, x.mask, x.group)

    return Recipe(
        rollout=Rollout(group_size),
        advantage=advantage,
        loss=lambda policy, x: gate.ppo_clip(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, clip, clip),
        weighting=lambda x: aggregate.token_mean(x.mask),
        schedule=Schedule(epochs, minibatches),
        models=("moments",))
