"""T-PPO: PPO that learns from answers while they are still being written."""
from rl_jax import masked
from rl_jax.advantage import temporal
from rl_jax.loss import gate, ratio, value
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2506.15050", confidence="secondary", title="Truncated Proximal Policy Optimization",
        note="The window's schedule, the mean over the policy's fresh tokens and the whitening are choices.")
def t_ppo(window: int = 2, clip: float = 0.2, value_clip: float = 0.5, value_coefficient: float = 1.0,
          discount: float = 1.0, decay: float = 0.95, epochs: int = 1, minibatches: int = 1) -> Recipe:
    """Clipped ratio times EGAE on the tokens of this window; the critic learns from whole answers.

    Args:
      window: most tokens by which an answer grows per step, at least 2 (the newest token of a cut answer has no
        credit); must be below the completion length, or nothing is ever cut.
      clip, value_clip: half-widths of the bands of the ratio and of the value (reward units).
      value_coefficient: weight of the critic's loss.
      discount, decay: gamma and lambda, per token.
      epochs, minibatches: passes over the batch, optimiser steps per pass.
    """
    def whole(x):
        return x.mask & x.complete[:, None]

    def advantage(x):
        reward = temporal.at_last_token(x.reward, whole(x))
        return masked.whiten(temporal.extended_gae(reward, x.values, x.mask, ~x.complete, discount, decay), x.fresh)

    def marks(x):
        return {"target": temporal.reward_to_go(temporal.at_last_token(x.reward, x.mask), x.mask, discount)}

    def loss(policy, x):
        clipped = gate.ppo_clip(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, clip, clip)
        error = value.clipped(policy.values, x.values, x.mark.target, value_clip)
        return {"policy": clipped, "value": value_coefficient * error}

    return Recipe(
        rollout=Rollout(group_size=1, window=window), advantage=advantage, marks=marks, loss=loss,
        weighting=lambda x: {"policy": aggregate.token_mean(x.fresh), "value": aggregate.token_mean(whole(x))},
        schedule=Schedule(epochs, minibatches), models=("critic",))
