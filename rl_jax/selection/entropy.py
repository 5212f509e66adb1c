"""Which answers are learned from, by how sure the policy was of them.

An answer whose tokens were drawn with a mean entropy above ln 2 was drawn by a policy that was, on
average, less sure than a fair coin between two tokens.
"""
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from rl_jax import masked
from rl_jax.types import Mask, Scalar, Tokens


def below(entropy: Tokens, mask: Mask, threshold: Scalar = math.log(2)) -> Bool[Array, " N"]:
    """mean over the answer's tokens of H <= threshold.

    Args:
      entropy: H of the distribution that the token was drawn from, in nats; carries no gradient.
      mask: which tokens the policy chose.
      threshold: in nats; the published code has 0.7.

    Source: the published code of Simoni et al. 2025, github.com/winstonsmith1897/GTPO, where it holds throughout.
    """
    return masked.row_mean(jax.lax.stop_gradient(entropy), mask) <= threshold


def below_if_begun_below(entropy: Tokens, mask: Mask, initial: Scalar,
                         threshold: Scalar = math.log(2)) -> Bool[Array, " N"]:
    """`below`, but True everywhere if the policy's entropy was above the threshold from the start.

    Args:
      entropy: H of the distribution that the token was drawn from, in nats; carries no gradient.
      mask: which tokens the policy chose.
      initial: mean entropy of the run's first batch, in nats, as by `schedule.first.token_mean`. While that is not
        finite this is the first batch, and its own mean is taken.
      threshold: in nats.

    Source: Simoni et al. 2025, arXiv:2508.03772; that the first batch's mean is over all of its tokens is a choice.
    """
    initial = jnp.where(jnp.isfinite(initial), initial, masked.mean(jax.lax.stop_gradient(entropy), mask))
    return below(entropy, mask, threshold) | (initial > threshold)
