"""R2VPO: no clip; the ratio's variance costs a price that rises while there is too much of it, so old data serves."""
from rl_jax.advantage import group
from rl_jax.loss import ratio, variance
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.schedule import dual
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2601.03320", confidence="secondary",
        title="Ratio-Variance Regularized Policy Optimization for Efficient LLM Fine-tuning",
        note="The penalised objective, and .04, are third-party code's; dual step, its numbers and token mean are choices. "
             "With replay=0, epochs=1 and minibatches=1 the ratio is always 1.")
def r2vpo(group_size: int = 8, initial: float = 0.04, target: float = 0.02, rate: float = 0.1, replay: int = 1,
          epochs: int = 1, minibatches: int = 1) -> Recipe:
    """-(r A - lambda (r - 1)^2) with the group z-score as A and lambda by dual ascent, mean over all tokens; no KL.

    Args:
      group_size: samples per prompt, at least 2.
      initial: lambda in the first batch.
      target, rate: mean (r - 1)^2 above which lambda rises, and how much per unit and batch; rate 0 keeps lambda.
      replay: how many batches of earlier steps are learned from again beside the fresh one.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Luo et al. 2026, arXiv:2601.03320.
    """
    def loss(policy, x):
        r = ratio.per_token(policy.logp, x.rollout_logp)
        return variance.penalised(r, x.advantage, x.coefficient.price), {"ratio_variance": variance.squared_change(r)}

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2, replay=replay),
        advantage=lambda x: group.zscore(x.reward, x.group),
        loss=loss,
        weighting=lambda x: aggregate.token_mean(x.mask),
        schedule=Schedule(epochs, minibatches, {"price": dual.ascent(initial, target, rate, "ratio_variance")}))
