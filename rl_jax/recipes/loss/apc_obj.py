"""APC-Obj: an answer's tokens share one budget of change; once it is spent the answer teaches nothing more."""
from rl_jax.advantage import group
from rl_jax.loss import budget, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2603.08239", confidence="secondary", title="Fibration Policy Optimization",
        note="The objective that FiberPO is derived from, by an unofficial reproduction. Choices: tokens of an answer "
             "share the budget, which is constant in the weights, and its size.")
def apc_obj(group_size: int = 8, limit: float = 0.2, epochs: int = 1, minibatches: int = 4) -> Recipe:
    """-(1 + clip(r - 1, -B, B)) A, B what the answer's other tokens leave of its budget; no KL.

    Args:
      group_size: samples per prompt, at least 2.
      limit: mean |r - 1| per token that an answer may have.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Li et al. 2026, arXiv:2603.08239, "Aggregational Policy Censoring Objective".
    """
    def loss(policy, x):
        return budget.censored(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, x.mask, limit)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.zscore(x.reward, x.group),
        loss=loss,
        weighting=lambda x: aggregate.sequence_mean_token_mean(x.mask),
        schedule=Schedule(epochs, minibatches))
