"""MIS: GRPO that leaves out answers which the learner found much likelier than the engine that drew them."""
from rl_jax.advantage import group
from rl_jax.loss import gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate, importance


@recipe(paper="Liu et al. 2025, richardli.xyz/rl-collapse", confidence="verified",
        title="When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch",
        note="TRL's form: a masked answer has weight 0 and still counts in the mean; verl's, where it does not, is "
             "`selection.rejection`.")
def masked_importance(group_size: int = 8, clip: float = 0.2, low: float = 0.0, high: float = 3.0,
                      epsilon: float = 1e-6, epochs: int = 1, minibatches: int = 1) -> Recipe:
    """GRPO with its ratio to the learner before the batch, an answer times that over rollout probability or 0.

    Args:
      group_size: samples per prompt, at least 2.
      clip: half-width of the ratio's band.
      low, high: weights of whole answers outside of this range become 0.
      epsilon: added to the group's standard deviation, in reward units.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Liu et al. 2025; TRL, grpo_trainer.py, "sequence_mask".
    """
    def weighting(x):
        weight = importance.per_sequence(x.old_logp, x.rollout_logp, x.mask)
        return aggregate.sequence_mean_token_mean(x.mask) * importance.within(weight, low, high)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.zscore(x.reward, x.group, epsilon=epsilon),
        loss=lambda policy, x: gate.ppo_clip(ratio.per_token(policy.logp, x.old_logp), x.advantage, clip, clip),
        weighting=weighting,
        schedule=Schedule(epochs, minibatches),
        models=("old",))
