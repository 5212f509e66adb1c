"""GRPO: PPO's clip without a critic; an answer's credit is its reward's z-score within its group."""
from rl_jax.advantage import group
from rl_jax.loss import divergence, gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2402.03300", confidence="verified",
        title="DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models")
def grpo(group_size: int = 8, clip: float = 0.2, beta: float = 0.04, epsilon: float = 1e-6, epochs: int = 1,
         minibatches: int = 1) -> Recipe:
    """Clipped ratio times group z-score, plus beta k3 to the reference, mean over sequences of token means.

    Args:
      group_size: samples per prompt, at least 2.
      clip: half-width of the ratio's band.
      beta: weight of k3, per nat; 0 runs no reference.
      epsilon: added to the group's standard deviation, in reward units.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Shao et al. 2024, arXiv:2402.03300, eq. 3 and 4.
    """
    def loss(policy, x):
        clipped = gate.ppo_clip(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, clip, clip)
        return clipped + beta * divergence.k3(policy.logp, x.reference_logp) if beta > 0 else clipped

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.zscore(x.reward, x.group, epsilon=epsilon),
        loss=loss,
        weighting=lambda x: aggregate.sequence_mean_token_mean(x.mask),
        schedule=Schedule(epochs, minibatches),
        models=("reference",) if beta > 0 else ())
