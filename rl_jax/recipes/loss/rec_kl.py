"""REC with a regulariser: REINFORCE that pays for each squared change of a log-probability; nothing is rejected."""
from rl_jax.advantage import group
from rl_jax.loss import reject, score
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate


@recipe(paper="arXiv:2509.24203", confidence="verified",
        title="Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm: "
              "Demystifying Some Myths About GRPO and Its Friends",
        note="The coefficient is a choice. The regulariser is 0 while the policy has not moved from what sampled: it "
             "acts on stale data and from the second optimiser step of a batch on.")
def rec_kl(group_size: int = 8, coefficient: float = 0.1, epochs: int = 1, minibatches: int = 1) -> Recipe:
    """-A log p + c (log p - log p_old)^2 with A = R - group mean, over token means.

    Args:
      group_size: samples per prompt, at least 2.
      coefficient: c, weight of the squared change, per nat squared.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Yao et al. 2025, arXiv:2509.24203; Trinity-RFT, rec_policy_loss.py, regularizer "k2".
    """
    def loss(policy, x):
        change = reject.squared_change(policy.logp, x.rollout_logp, coefficient)
        return score.policy_gradient(policy.logp, x.advantage) + change

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2),
        advantage=lambda x: group.centred(x.reward, x.group),
        loss=loss,
        weighting=lambda x: aggregate.token_mean(x.mask),
        schedule=Schedule(epochs, minibatches))
