"""Rewarding the policy for staying undecided."""
from rl_jax.types import Scalar, Tokens


def bonus(entropy: Tokens, coefficient: Scalar) -> Tokens:
    """-coefficient H: the loss falls as the policy's entropy grows.

    Args:
      entropy: H of the whole next-token distribution, in nats; differentiable.
      coefficient: reward units per nat; negative punishes entropy.

    Source: Williams and Peng 1991, Connection Science 3; Mnih et al. 2016, arXiv:1602.01783, section 4.
    """
    return -coefficient * entropy
