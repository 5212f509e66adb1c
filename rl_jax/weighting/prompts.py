"""Weights under which every prompt counts the same, by the sum over its answers."""
from jaxtyping import Array, Float

from rl_jax.types import Mask
from rl_jax.weighting import aggregate


def sum_of_token_means(mask: Mask, group_size: int) -> Float[Array, "N T"]:
    """m G / (n_i N): token means, added up over the G answers of a prompt, and their mean over the N / G prompts.

    G times `aggregate.sequence_mean_token_mean`: the step grows with the group.

    Args:
      mask: m, which tokens the policy chose; n_i is their number in a sequence.
      group_size: G, answers per prompt.

    Source: Yang et al. 2025, arXiv:2509.02333, "Only Token Mean Loss"; the mean over prompts is a choice.
    """
    return group_size * aggregate.sequence_mean_token_mean(mask)
