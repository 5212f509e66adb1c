"""A budget of change that the tokens of an answer share."""
import jax
import jax.numpy as jnp

from rl_jax import masked
from rl_jax.types import Mask, Scalar, Tokens


def left_by_others(ratio: Tokens, mask: Mask, limit: Scalar) -> Tokens:
    """B_t = max(0, T delta - sum of |r_j - 1| over the sequence's other tokens), constant in the weights.

    Args:
      ratio: r, current over old probability of the chosen token; carries no gradient.
      mask: which tokens the policy chose; T is their number in the sequence.
      limit: delta, the mean |r - 1| per token that a sequence may have, dimensionless, >= 0. Total variation is half of
        the expected |r - 1|.

    Source: Li et al. 2026, arXiv:2603.08239, "Aggregational Policy Censoring Objective", by an unofficial reproduction.
      That the tokens of a sequence share a budget, and that B carries no gradient, are choices.
    """
    change = jnp.abs(masked.zeroed(jax.lax.stop_gradient(ratio) - 1, mask))
    # summed from either side: a total minus a token's own share would drown small changes beside a huge one
    before = jnp.cumsum(change, axis=1)[:, :-1]
    after = jnp.cumsum(change[:, ::-1], axis=1)[:, -2::-1]
    others = jnp.pad(before, ((0, 0), (1, 0))) + jnp.pad(after, ((0, 0), (0, 1)))
    return jnp.maximum(mask.sum(axis=1, keepdims=True) * limit - others, 0.0)


def censored(ratio: Tokens, advantage: Tokens, mask: Mask, limit: Scalar) -> Tokens:
    """-(1 + clip(r - 1, -B, B)) A: no gradient where the sequence's other tokens leave no room.

    |r_t - 1| < B_t says that sum |r - 1| < T delta, so either all tokens of a sequence learn or none of them, whatever
    the sign of A. At B itself there is no gradient.

    Args:
      ratio: r, current over old probability of the chosen token; differentiable.
      advantage: A, in reward units; carries no gradient.
      mask: which tokens the policy chose.
      limit: delta, the mean |r - 1| per token that a sequence may have, dimensionless, >= 0.

    Source: Li et al. 2026, arXiv:2603.08239, "Aggregational Policy Censoring Objective", see `left_by_others`.
    """
    room = left_by_others(ratio, mask, limit)
    change = masked.zeroed(ratio - 1, mask)
    held = jnp.where(jnp.abs(change) < room, change, jax.lax.stop_gradient(jnp.clip(change, -room, room)))
    return -(1 + held) * jax.lax.stop_gradient(advantage)
