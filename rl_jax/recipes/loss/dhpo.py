"""DHPO, averaged: half token ratio (GRPO), half sequence ratio (GSPO), each clipped to its own band first."""
from rl_jax.advantage import group
from rl_jax.loss import gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2601.05607", confidence="reconstructed",
        title="Orchestrating Tokens and Sequences: Dynamic Hybrid Policy Optimization for RLVR",
        note="Choices: the minimum is taken of the mixtures (the other reading is `gate.mixture_of_ppo_clips`), and "
             "the bands are GRPO's and GSPO's.")
def dhpo(group_size: int = 8, share: float = 0.5, clip: float = 0.2, sequence_clip_low: float = 3e-4,
         sequence_clip_high: float = 4e-4, epochs: int = 1, minibatches: int = 1) -> Recipe:
    """Clipped mixture of token ratio and sequence ratio times group z-score, mean over sequences of token means; no KL.

    Args:
      group_size: samples per prompt, at least 2.
      share: of the token's own ratio, in [0, 1]: 1 is GRPO, 0 is GSPO-token.
      clip: half-width of the token ratio's band.
      sequence_clip_low, sequence_clip_high: half-widths of the sequence ratio's band, below and above 1.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Min et al. 2026, arXiv:2601.05607, abstract.
    """
    def loss(policy, x):
        r = ratio.per_token(policy.logp, x.rollout_logp)
        s = ratio.per_sequence_token(policy.logp, x.rollout_logp, x.mask)
        return gate.ppo_clip_of_mixture(r, s, x.advantage, share, clip=clip, sequence_low=sequence_clip_low,
                                        sequence_high=sequence_clip_high)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.zscore(x.reward, x.group),
        loss=loss,
        weighting=lambda x: aggregate.sequence_mean_token_mean(x.mask),
        schedule=Schedule(epochs, minibatches))
