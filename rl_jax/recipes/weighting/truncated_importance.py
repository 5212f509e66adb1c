"""TIS: GRPO whose tokens are weighted by how much likelier the learner found them than the engine that drew them."""
from rl_jax.advantage import group
from rl_jax.loss import gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate, importance


@recipe(paper="Yao et al. 2025, fengyao.notion.site/off-policy-rl", confidence="verified",
        title="Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
        note="`recipe.with_old_policy` does the same to any other recipe; sequence weights, batch normalisation and "
             "rejection are in `weighting.importance` and `selection.rejection`.")
def truncated_importance(group_size: int = 8, clip: float = 0.2, ceiling: float = 2.0, epsilon: float = 1e-6,
                         epochs: int = 1, minibatches: int = 1) -> Recipe:
    """GRPO with its ratio to the learner before the batch, tokens times min(that over rollout probability, ceiling).

    Args:
      group_size: samples per prompt, at least 2.
      clip: half-width of the ratio's band.
      ceiling: the largest weight of a token.
      epsilon: added to the group's standard deviation, in reward units.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Yao et al. 2025; verl, rollout_corr_helper.py.
    """
    def weighting(x):
        weight = importance.per_token(x.old_logp, x.rollout_logp, x.mask)
        return aggregate.sequence_mean_token_mean(x.mask) * importance.truncated(weight, ceiling)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.zscore(x.reward, x.group, epsilon=epsilon),
        loss=lambda policy, x: gate.ppo_clip(ratio.per_token(policy.logp, x.old_logp), x.advantage, clip, clip),
        weighting=weighting,
        schedule=Schedule(epochs, minibatches),
        models=("old",))
