"""PPO: a clipped ratio, and a critic that spreads the reward over the tokens (GAE)."""
from rl_jax import masked
from rl_jax.advantage import temporal
from rl_jax.loss import gate, ratio, value
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:1707.06347", confidence="verified",
        title="Proximal Policy Optimization Algorithms")
def ppo(clip: float = 0.2, value_clip: float = 0.5, value_coefficient: float = 1.0, discount: float = 1.0,
        decay: float = 0.95, epochs: int = 4, minibatches: int = 1) -> Recipe:
    """Clipped ratio times whitened GAE, plus the critic's clipped squared error, per token.

    Args:
      clip, value_clip: half-widths of the bands of the ratio and of the value (reward units).
      value_coefficient: weight of the critic's loss.
      discount, decay: gamma and lambda, per token.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7, 9 and 11.
    """
    def path(x):
        return temporal.at_last_token(x.reward, x.mask), x.values, x.mask, discount, decay

    def loss(policy, x):
        clipped = gate.ppo_clip(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, clip, clip)
        error = value.clipped(policy.values, x.values, x.mark.target, value_clip)
        return clipped + value_coefficient * error, {"loss/value": error}

    return Recipe(
        rollout=Rollout(group_size=1),
        advantage=lambda x: masked.whiten(temporal.gae(*path(x)), x.mask),
        marks=lambda x: {"target": temporal.lambda_return(*path(x))},
        loss=loss,
        weighting=lambda x: aggregate.token_mean(x.mask),
        schedule=Schedule(epochs, minibatches),
        models=("critic",))
