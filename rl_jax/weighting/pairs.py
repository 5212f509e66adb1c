"""Weights under which a sequence's total over its pairs becomes a mean over pairs.

`beats` [N, N] says which pairs there are: [i, j] is True where i wins against j, as from `loss.pairwise.beats`.
"""
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl_jax.types import Mask
from rl_jax.weighting import aggregate


def pair_mean(mask: Mask, beats: Bool[Array, "N N"]) -> Float[Array, "N T"]:
    """m / (n_i K), K the number of pairs: for losses that stand at each of a sequence's n_i chosen tokens.

    Args:
      mask: m, which tokens the policy chose.
      beats: the pairs of the whole batch.

    Source: Su et al. 2025, arXiv:2504.04524, with its published code.
    """
    return mask / jnp.maximum(mask.sum(axis=1, keepdims=True), 1) / jnp.maximum(beats.sum(), 1)


def sequence_mean_without_pairs(mask: Mask, beats: Bool[Array, "N N"]) -> Float[Array, "N T"]:
    """`aggregate.sequence_mean_token_mean` of a batch that has no pair, else 0.

    Args:
      mask: m, which tokens the policy chose.
      beats: the pairs of the whole batch.

    Source: Su et al. 2025, arXiv:2504.04524, with its published code.
    """
    return jnp.where(beats.any(), 0.0, aggregate.sequence_mean_token_mean(mask))
