"""TRPA: answers ranked into levels by rules, a preference loss for each pair across levels, near the old policy."""
from rl_jax.loss import divergence, pairwise
from rl_jax.recipe import Recipe, Rollout, Schedule, recipe
from rl_jax.weighting import aggregate, pairs


@recipe(paper="arXiv:2504.04524", confidence="verified", note="Reward is the level; -4 needs a part `format`.",
        title="Trust Region Preference Approximation: A simple and stable reinforcement learning algorithm for LLM "
              "reasoning")
def trpa(group_size: int = 16, beta: float = 0.1, factor: float = 2.5, trust: float = 0.001, epochs: int = 1,
         minibatches: int = 1) -> Recipe:
    """Mean over pairs of -log sigmoid(beta f (z_i - z_j)), z = mean of log(p / p_reference), plus trust k3 to the old.

    Args:
      group_size: samples per prompt, at least 2.
      beta, factor: slope, per nat; what multiplies it in the pairs that a right answer wins.
      trust: weight of k3, per nat; k3 is 0 in the first optimiser step of a batch.
      epochs, minibatches: passes over the batch, optimiser steps per pass.

    Source: Su et al. 2025, arXiv:2504.04524, with its published code.
    """
    def beats(x):
        return pairwise.beats(x.reward, x.group, x.mask)

    def loss(policy, x):
        z = pairwise.log_ratio(policy.logp, x.reference_logp, x.mask)
        return {"policy": pairwise.won(pairwise.logistic(z, x.reward, beats(x), beta, factor), x.mask),
                "unpaired": pairwise.unpaired(z, x.reward, x.mask, beta),
                "trust": trust * divergence.k3(policy.logp, x.rollout_logp)}

    return Recipe(
        rollout=Rollout(group_size, group_size_at_least=2), loss=loss,
        reward=lambda x: pairwise.levels(x.score, x.finished, x.parts.get("format", 1.0)),
        weighting=lambda x: {"policy": pairs.pair_mean(x.mask, beats(x)), "trust": aggregate.token_mean(x.mask),
                             "unpaired": pairs.sequence_mean_without_pairs(x.mask, beats(x))},
        schedule=Schedule(epochs, minibatches), models=("reference",))
