"""PF-PPO: PPO on the answers whose reward can be trusted, drawn anew from each prompt's best and worst."""
from rl_jax import masked
from rl_jax.advantage import temporal
from rl_jax.loss import gate, ratio, value
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.selection import resample
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2409.06957", confidence="verified",
        title="Policy Filtration in RLHF to Fine-Tune LLM for Code Generation",
        note="(best, worst, rest) = (1, 1, 0) is the paper's BW, (.4, .1, .1) BR, (1, 0, 0) BoN; for |R|^2 "
             "put `resample.power` into the selection slot. Each prompt gets as many draws as it has samples; the "
             "published code draws from all prompts at once. The group size is a choice.")
def pf_ppo(group_size: int = 5, best: float = 1.0, worst: float = 1.0, rest: float = 0.0, clip: float = 0.2,
           value_clip: float = 0.5, value_coefficient: float = 1.0, discount: float = 1.0, decay: float = 0.95,
           epochs: int = 1, minibatches: int = 1) -> Recipe:
    """PPO (clipped ratio, whitened GAE, critic) on answers drawn with replacement by their reward's rank in the group.

    Args:
      group_size: samples per prompt, from which as many are drawn.
      best, worst, rest: how often the prompt's best, worst and other answers are drawn, in proportion.
      clip, value_clip: half-widths of the bands of the ratio and of the value (reward units).
      value_coefficient: weight of the critic's loss.
      discount, decay: gamma and lambda, per token.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Shen and Zhang 2024, arXiv:2409.06957, with the published code, github.com/swtheing/PF-PPO-RLHF.
    """
    def selection(x):
        weight = resample.ranked(x.reward, x.group, x.seed, best=best, worst=worst, rest=rest)
        return resample.drawn(weight, x.group, x.seed)

    def path(x):
        return temporal.at_last_token(x.reward, x.mask), x.values, x.mask, discount, decay

    def loss(policy, x):
        clipped = gate.ppo_clip(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, clip, clip)
        error = value.clipped(policy.values, x.values, x.mark.target, value_clip)
        return clipped + value_coefficient * error, {"loss/value": error}

    return Recipe(
        rollout=Rollout(group_size), selection=selection,
        advantage=lambda x: masked.whiten(temporal.gae(*path(x)), x.mask),
        marks=lambda x: {"target": temporal.lambda_return(*path(x))}, loss=loss,
        weighting=lambda x: aggregate.token_mean(x.mask), schedule=Schedule(epochs, minibatches), models=("critic",))
