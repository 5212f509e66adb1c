"""CAPO: GRPO without the few tokens whose own update would bend the policy too far."""
from rl_jax.advantage import group
from rl_jax.loss import gate, ratio
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate, curvature


@recipe(paper="arXiv:2510.00819", confidence="verified",
        title="Stabilizing Policy Gradients for Sample-Efficient Reinforcement Learning in LLM Reasoning",
        note="Predicts with plain SGD's direction, exact over the vocabulary; the paper's limits were tuned for Adam's "
             "look-ahead on the top-k tokens (`curvature.divergence_along`), so tune them anew, and `rate` with them.")
def capo_curvature(group_size: int = 8, clip: float = 0.2, rate: float = 1.5e-5, divergence_limit: float = 1e-4,
                   improvement_limit: float = 0.01, epochs: int = 1, minibatches: int = 1) -> Recipe:
    """GRPO, mean over sequences of means over the tokens with predicted KL and |gain| of their own step below limits.

    Args:
      group_size: samples per prompt, at least 2.
      clip: half-width of the ratio's band.
      rate: eta of the predicted step; the optimiser's learning rate.
      divergence_limit, improvement_limit: tau_F in nats, tau_H in reward units; 0 switches a test off.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Melo et al. 2025, arXiv:2510.00819.
    """
    def weighting(x):
        divergence = curvature.divergence_of_sgd(x.rollout_logp, x.second_moment, x.hidden_square, x.advantage, rate)
        improvement = curvature.improvement_of_sgd(x.rollout_logp, x.second_moment, x.third_moment, x.hidden_square,
                                                   x.advantage, rate)
        kept = curvature.kept_symmetric(divergence, improvement, divergence_limit, improvement_limit)
        return aggregate.sequence_mean_token_mean(x.mask & kept)

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2), weighting=weighting,
        advantage=lambda x: group.zscore(x.reward, x.group, epsilon=1e-4),
        loss=lambda policy, x: gate.ppo_clip(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, clip, clip),
        schedule=Schedule(epochs, minibatches), models=("moments",))
