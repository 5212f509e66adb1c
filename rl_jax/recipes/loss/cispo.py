"""CISPO: REINFORCE with a capped importance weight; every token keeps a gradient, however far it has moved."""
from rl_jax.advantage import group
from rl_jax.loss import ratio, score
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2506.13585", confidence="verified",
        title="MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
        note="The paper tunes an upper bound only and does not print it: 5 is TRL's. verl clips on both sides instead "
             "(`score.weighted_by_clipped_ratio`).")
def cispo(group_size: int = 8, cap: float = 5.0, epochs: int = 1, minibatches: int = 1) -> Recipe:
    """-min(r, cap) A log p with a constant weight and the group z-score as A, mean over all tokens; no KL.

    Args:
      group_size: samples per prompt, at least 2.
      cap: the largest ratio that counts, absolute.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: MiniMax 2025, arXiv:2506.13585, eq. 4 and 5.
    """
    def loss(policy, x):
        r = ratio.per_token(policy.logp, x.rollout_logp)
        return score.weighted_by_capped_ratio(policy.logp, r, x.advantage, cap)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.zscore(x.reward, x.group),
        loss=loss,
        weighting=lambda x: aggregate.token_mean(x.mask),
        schedule=Schedule(epochs, minibatches))
