"""Rewards for length, counted in tokens."""
import jax.numpy as jnp

from rl_jax.types import Mask, PerSequence


def soft_overlong(mask: Mask, limit: int, buffer: int) -> PerSequence:
    """clip((limit - buffer - n) / buffer, -1, 0): from 0, falling over the last `buffer` tokens, to -1.

    Args:
      mask: which tokens the policy chose; n is their number in a sequence.
      limit: the length from which on the whole penalty is due, in tokens.
      buffer: over how many tokens before the limit it grows, in tokens, in [1, limit].

    Raises:
      ValueError: if the buffer is not in [1, limit].

    Source: Yu et al. 2025, arXiv:2503.14476, eq. 13.
    """
    if not 1 <= buffer <= limit:
        raise ValueError(f"limit={limit}, buffer={buffer}: both are in tokens, and the buffer must be in [1, limit].")
    return jnp.clip((limit - buffer - mask.sum(axis=1)) / buffer, -1.0, 0.0)
