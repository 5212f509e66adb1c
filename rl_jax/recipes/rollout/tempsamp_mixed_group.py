"""TempSamp-R1: the given answer is one member of each group, and scores are bent so that it does not drown the rest."""
from rl_jax.advantage import group
from rl_jax.loss import divergence, gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.reward import shaping
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2509.18056", confidence="verified",
        title="TempSamp-R1: Effective Temporal Sampling with Reinforcement Fine-Tuning for Video LLMs",
        note="Needs tasks with given answers. A verifier's part named `format` is added to the bent score; without one "
             "there is nothing to add.")
def tempsamp_mixed_group(group_size: int = 8, threshold: float = 0.8, above: float = 0.01, below: float = 1.0,
                         format_weight: float = 0.1, clip: float = 0.2, beta: float = 0.04, epochs: int = 1,
                         minibatches: int = 1) -> Recipe:
    """GRPO on groups of G - 1 drawn answers and the given one, of scores flattened above a threshold.

    Args:
      group_size: samples per prompt with the given one, at least 2.
      threshold, above, below: where and how strongly scores are bent (`shaping.flattened_above`).
      format_weight: of the verifier's part `format`, which is not bent.
      clip: half-width of the ratio's band.
      beta: weight of k3 to the reference, per nat; 0 runs no reference.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Li et al. 2025, arXiv:2509.18056, with the published code, github.com/HVision-NKU/TempSamp-R1.
    """
    def reward(x):
        bent = shaping.flattened_above(x.score, threshold, above, below)
        return bent + format_weight * x.parts["format"] if "format" in x.parts else bent

    def loss(policy, x):
        clipped = gate.ppo_clip(ratio.per_token(policy.logp, x.old_logp), x.advantage, clip, clip)
        return clipped + beta * divergence.k3(policy.logp, x.reference_logp) if beta > 0 else clipped

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2, given=1), reward=reward, loss=loss,
        advantage=lambda x: group.zscore(x.reward, x.group),
        weighting=lambda x: aggregate.sequence_mean_token_mean(x.mask), schedule=Schedule(epochs, minibatches),
        models=("old", "reference") if beta > 0 else ("old",))
