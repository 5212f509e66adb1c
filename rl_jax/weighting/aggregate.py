"""How token losses become one number: weights [N, T] such that sum(loss * weight) is the aggregate.

Weights are 0 where nothing was chosen. A sequence without chosen tokens adds 0 and still counts
as one of the N sequences, unless a name says `present`: published code differs there.
"""
import jax.numpy as jnp
from jaxtyping import Array, Float

from rl_jax.types import Mask, Scalar


def token_mean(mask: Mask) -> Float[Array, "N T"]:
    """m / sum m: every chosen token of the batch counts the same.

    Args:
      mask: m, which tokens the policy chose.

    Source: Yu et al. 2025, arXiv:2503.14476, section 3.3.
    """
    return mask / jnp.maximum(mask.sum(), 1)


def sequence_mean_token_mean(mask: Mask) -> Float[Array, "N T"]:
    """m / (n_i N): every sequence counts the same, however long; n_i is its number of chosen tokens.

    Args:
      mask: m, which tokens the policy chose.

    Source: Shao et al. 2024, arXiv:2402.03300, eq. 3.
    """
    return mask / jnp.maximum(mask.sum(axis=1, keepdims=True), 1) / mask.shape[0]


def sequence_mean_token_sum(mask: Mask) -> Float[Array, "N T"]:
    """m / N: a sequence counts by its total, as one action.

    Args:
      mask: m, which tokens the policy chose.

    Source: Williams 1992, Machine Learning 8; Ahmadian et al. 2024, arXiv:2402.14740, "Modeling partial completions".
    """
    return mask / mask.shape[0]


def fixed_norm(mask: Mask, length: Scalar) -> Float[Array, "N T"]:
    """m / (N L): a token counts the same whatever the length of its own answer or of the others.

    Args:
      mask: m, which tokens the policy chose.
      length: L, the generation budget, in tokens, > 0.

    Source: Liu et al. 2025, arXiv:2503.20783, section 3.2.
    """
    return mask / (mask.shape[0] * length)


def present_sequence_mean_token_mean(mask: Mask) -> Float[Array, "N T"]:
    """m / (n_i N'): `sequence_mean_token_mean` over the N' sequences that have chosen tokens.

    Args:
      mask: m, which tokens the policy chose.

    Source: verl, github.com/volcengine/verl, core_algos.agg_loss, "seq-mean-token-mean".
    """
    return present_sequence_mean_token_sum(mask) / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)


def present_sequence_mean_token_sum(mask: Mask) -> Float[Array, "N T"]:
    """m / N': `sequence_mean_token_sum` over the N' sequences that have chosen tokens.

    Args:
      mask: m, which tokens the policy chose.

    Source: verl, github.com/volcengine/verl, core_algos.agg_loss, "seq-mean-token-sum".
    """
    return mask / jnp.maximum(mask.any(axis=1).sum(), 1)
