"""GMPO: the geometric mean of an answer's token ratios, each clipped before the mean."""
from rl_jax.advantage import group
from rl_jax.loss import gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2507.20673", confidence="verified", title="Geometric-Mean Policy Optimization")
def gmpo(group_size: int = 8, clip_low: float = 0.4, clip_high: float = 0.4, epochs: int = 1,
         minibatches: int = 1) -> Recipe:
    """Geometric mean of token ratios, each clipped in nats on the side of its credit, times group z-score; no KL.

    Args:
      group_size: samples per prompt, at least 2.
      clip_low, clip_high: half-widths of the band of each token's log-ratio, in nats.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Zhao et al. 2025, arXiv:2507.20673, "Geometric-Mean Policy Optimization".
    """
    def loss(policy, x):
        s = ratio.clipped_geometric_mean(policy.logp, x.rollout_logp, x.advantage, x.mask, clip_low, clip_high)
        return gate.unclipped(s, x.advantage)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.zscore(x.reward, x.group),
        loss=loss,
        weighting=lambda x: aggregate.sequence_mean_token_mean(x.mask),
        schedule=Schedule(epochs, minibatches))
