"""FiberPO: how far an answer moves as a whole and how far each token moves beside it are held back separately."""
from rl_jax.advantage import group
from rl_jax.loss import fiber, gate
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2603.08239", confidence="verified", title="Fibration Policy Optimization",
        note="The equations are those of the same authors' arXiv:2604.03044. No budget is published: the defaults are "
             "untuned, .2 in sum as in an unofficial reproduction. x = 0 counts as a rise, a choice.")
def fiberpo(group_size: int = 8, positive: float = 0.12, negative: float = 0.08, residual: float = 0.2, epochs: int = 1,
            minibatches: int = 4) -> Recipe:
    """Gated ratio times group z-score, no minimum; mean over sequences of token means; no KL.

    Args:
      group_size: samples per prompt, at least 2.
      positive, negative: nats per token by which an answer's rises, and its falls, may change it as a whole.
      residual: nats by which a token may differ from its answer.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Li et al. 2026, arXiv:2603.08239; equations in arXiv:2604.03044, section 3.3.1.
    """
    def loss(policy, x):
        change = fiber.log_ratios(policy.logp, x.rollout_logp, x.mask)
        weight = fiber.trajectory_weight(change, x.mask, positive=positive, negative=negative)
        return gate.unclipped(fiber.gated_ratio(change, x.mask, weight, residual), x.advantage)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.zscore(x.reward, x.group),
        loss=loss,
        weighting=lambda x: aggregate.sequence_mean_token_mean(x.mask),
        schedule=Schedule(epochs, minibatches))
