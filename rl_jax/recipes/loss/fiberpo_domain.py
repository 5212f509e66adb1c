"""FiberPO-Domain: the gates of FiberPO stacked: domain, prompt within it, answer within that, token within that."""
from rl_jax.advantage import group
from rl_jax.loss import fiber, gate
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2603.08239", confidence="reconstructed", title="Fibration Policy Optimization",
        note="How the gates are stacked is a choice, as is one budget for rises and falls; the numbers are those of an "
             "unofficial reproduction, untuned. Gradients cross the groups of a domain: no micro-batches.")
def fiberpo_domain(group_size: int = 8, of_domain: float = 0.1, of_group: float = 0.15, of_answer: float = 0.2,
                   of_token: float = 0.2, epochs: int = 1, minibatches: int = 4) -> Recipe:
    """Four-level gated ratio times group z-score, no minimum; mean over sequences of token means; no KL.

    Args:
      group_size: samples per prompt, at least 2.
      of_domain, of_group, of_answer, of_token: nats by which each may move beside what holds it, in either channel.
      epochs, minibatches: passes over the batch, optimiser steps per pass; a domain's mean is that of the minibatch.

    Source: Li et al. 2026, arXiv:2603.08239, "FiberPO-Domain".
    """
    budgets = (of_domain, of_group, of_answer)

    def loss(policy, x):
        change = fiber.log_ratios(policy.logp, x.rollout_logp, x.mask)
        weight = fiber.tree_weight(change, x.mask, x.group, x.domain, positive=budgets, negative=budgets)
        return gate.unclipped(fiber.gated_ratio(change, x.mask, weight, of_token), x.advantage)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.zscore(x.reward, x.group),
        loss=loss,
        weighting=lambda x: aggregate.sequence_mean_token_mean(x.mask),
        schedule=Schedule(epochs, minibatches),
        indivisible=True)
