"""Dr. GRPO: GRPO without its two biases, the division by the group's spread and by the answer's own length."""
from rl_jax.advantage import group
from rl_jax.loss import gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2503.20783", confidence="verified",
        title="Understanding R1-Zero-Like Training: A Critical Perspective",
        note="`length` scales the loss and nothing else: set it to the task's generation budget.")
def dr_grpo(group_size: int = 8, clip: float = 0.2, length: int = 3000, epochs: int = 1,
            minibatches: int = 1) -> Recipe:
    """Clipped ratio times (R - group mean), total over all tokens over N times the generation budget; no KL.

    Args:
      group_size: samples per prompt, at least 2.
      clip: half-width of the ratio's band.
      length: the generation budget, in tokens.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Liu et al. 2025, arXiv:2503.20783, section 3.2.
    """
    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.centred(x.reward, x.group),
        loss=lambda policy, x: gate.ppo_clip(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, clip, clip),
        weighting=lambda x: aggregate.fixed_norm(x.mask, length),
        schedule=Schedule(epochs, minibatches))
