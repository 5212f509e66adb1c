"""REINFORCE++ with a baseline: reward less the group's mean, in units of its spread over the whole batch."""
from rl_jax.advantage import baseline, group
from rl_jax.loss import gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.reward import combine
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2501.03262", confidence="verified",
        title="REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Normalization",
        note="Mean and spread are over the tokens of the batch, so long answers count more in them; that the KL is off "
             "by default is a choice.")
def reinforce_pp_baseline(group_size: int = 8, clip: float = 0.2, beta: float = 0.0, epochs: int = 1,
                          minibatches: int = 1) -> Recipe:
    """Clipped ratio times (R - group mean), whitened over all tokens of the batch; the KL, if any, inside R.

    Args:
      group_size: samples per prompt, at least 2.
      clip: half-width of the ratio's band.
      beta: reward units per nat of divergence from the reference; 0 runs no reference.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Hu et al. 2025, arXiv:2501.03262, "REINFORCE++ w/ Baseline".
    """
    def reward(x):
        return combine.less_divergence(x.score, x.rollout_logp, x.reference_logp, x.mask, beta)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        reward=reward if beta > 0 else None,
        advantage=lambda x: baseline.whitened(group.centred(x.reward, x.group), x.mask),
        loss=lambda policy, x: gate.ppo_clip(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, clip, clip),
        weighting=lambda x: aggregate.token_mean(x.mask),
        schedule=Schedule(epochs, minibatches),
        models=("reference",) if beta > 0 else ())
