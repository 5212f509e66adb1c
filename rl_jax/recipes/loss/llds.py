"""LLDS: GRPO with a penalty where an answer that was not bad becomes less probable."""
from rl_jax.advantage import group
from rl_jax.loss import divergence, gate, likelihood, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2512.04220", confidence="secondary",
        title="On Group Relative Policy Optimization Collapse in Agent Search: The Lazy Likelihood-Displacement",
        note="The penalty is 0 in the first optimiser step of a batch: `epochs * minibatches` must be at least 2.")
def llds(group_size: int = 8, clip: float = 0.2, beta: float = 0.04, penalty: float = 0.1, epochs: int = 1,
         minibatches: int = 2) -> Recipe:
    """GRPO plus penalty times the fall of log p, per token of the batch, in answers with A >= 0 that fell as a whole.

    Args:
      group_size: samples per prompt, at least 2.
      clip: half-width of the ratio's band.
      beta: weight of k3 to the reference, per nat; 0 runs no reference.
      penalty: lambda, weight of the fall, per nat.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Deng et al. 2025, arXiv:2512.04220, as in third-party implementations.
    """
    def loss(policy, x):
        clipped = gate.ppo_clip(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, clip, clip)
        grpo = clipped + beta * divergence.k3(policy.logp, x.reference_logp) if beta > 0 else clipped
        fall = likelihood.displacement(policy.logp, x.rollout_logp, x.advantage, x.mask)
        return {"policy": grpo, "displacement": penalty * fall}

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.zscore(x.reward, x.group), loss=loss,
        weighting=lambda x: {"policy": aggregate.sequence_mean_token_mean(x.mask),
                             "displacement": aggregate.token_mean(x.mask)},
        schedule=Schedule(epochs, minibatches),
        models=("reference",) if beta > 0 else ())
