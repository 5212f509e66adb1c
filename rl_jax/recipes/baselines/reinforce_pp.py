"""REINFORCE++: PPO's clip without a critic; credit is what a token still earns, compared with the whole batch."""
from rl_jax import masked
from rl_jax.advantage import temporal
from rl_jax.loss import gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.reward import combine
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2501.03262", confidence="verified",
        title="REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Normalization",
        note="beta is a choice. verl cuts the return at tool output, so that earlier turns lose the reward; this does not.")
def reinforce_pp(group_size: int = 1, clip: float = 0.2, beta: float = 0.001, discount: float = 1.0, epochs: int = 1,
                 minibatches: int = 1) -> Recipe:
    """Clipped ratio times the return from each token on, k1 to the reference inside, whitened over the batch's tokens.

    Args:
      group_size: samples per prompt; they are not compared with each other.
      clip: half-width of the ratio's band.
      beta, discount: reward units per nat of k1 (0 runs no reference); gamma, per token.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Hu et al. 2025, arXiv:2501.03262, "Global Advantage Normalization".
    """
    def reward(x):
        if beta == 0:
            return temporal.at_last_token(x.reward, x.mask)
        return combine.less_divergence_per_token(x.reward, x.rollout_logp, x.reference_logp, x.mask, beta)

    return Recipe(
        rollout=Rollout(group_size),
        advantage=lambda x: masked.whiten(temporal.reward_to_go(reward(x), x.mask, discount), x.mask),
        loss=lambda policy, x: gate.ppo_clip(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, clip, clip),
        weighting=lambda x: aggregate.token_mean(x.mask),
        schedule=Schedule(epochs, minibatches),
        models=("reference",) if beta > 0 else ())
