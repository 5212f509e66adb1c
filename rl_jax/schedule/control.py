"""Coefficients that adapt: `(init, update)` pairs as in optax, and how to read the number."""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rl_jax import masked
from rl_jax.types import Evaluated, Experience, Mask, Scalar, Tokens


@dataclasses.dataclass(frozen=True)
class Control:
    """One adapting coefficient.

    Attributes:
      init: number of training examples -> state, a pytree of arrays; it is checkpointed.
      update: (state, x, policy, metrics) -> state, once per batch, after the weights were updated.
        `policy` says what the policy said of the whole batch before that; `metrics` what the update
        reported, the loss slot's extras among it, averaged over its optimiser steps.
      read: state -> the coefficient, what the slots see as `x.coefficient.<name>`: a scalar, or
        whatever the slots that read it expect.
    """

    init: Callable[[int], Any]
    update: Callable[[Any, Experience, Evaluated, dict[str, Any]], Any]
    read: Callable[[Any], Any]


def divergence_per_sequence(logp: Tokens, reference_logp: Tokens, mask: Mask) -> Float[Array, ""]:
    """sum over chosen tokens of logp - reference_logp / number of sequences with any: KL in nats per sequence.

    Args:
      logp: log-probability under the policy that drew the tokens, in nats.
      reference_logp: that under the reference, in nats.
      mask: which tokens the policy chose.
    """
    return masked.total(logp - reference_logp, mask) / jnp.maximum(mask.any(axis=1).sum(), 1)


def proportional(coefficient: Float[Array, ""], measured: Scalar, target: Scalar, gain: Scalar,
                 band: Scalar) -> Float[Array, ""]:
    """coefficient (1 + gain clip(measured / target - 1, -band, band)).

    Args:
      coefficient: its value so far, any unit.
      measured: where the controlled quantity is.
      target: where it should be, in the same unit, > 0.
      gain: share of the clipped error by which the coefficient changes.
      band: largest relative error that counts.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """
    return coefficient * (1 + gain * jnp.clip(measured / target - 1, -band, band))


def adaptive_kl(initial: float, target: float, *, gain: float = 0.1, band: float = 0.2) -> Control:
    """A KL coefficient that rises while KL(policy || reference) is above its target and falls while it is below.

    The recipe must ask for models=("reference",).

    Args:
      initial: its first value, in reward units per nat, > 0.
      target: the wanted KL, in nats per sequence, > 0.
      gain: share of the clipped error by which it changes per batch.
      band: largest relative error that counts.

    Raises:
      ValueError: if `initial` or `target` is not positive.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """
    if initial <= 0 or target <= 0:
        raise ValueError(f"initial={initial}, target={target}: both must be positive; a coefficient of 0 stays 0.")

    def update(state, x, policy, metrics):
        measured = divergence_per_sequence(policy.logp, x.reference_logp, x.mask)
        return jax.lax.stop_gradient(proportional(state, measured, target, gain, band))

    return Control(init=lambda examples: jnp.asarray(initial, jnp.float32), update=update, read=lambda state: state)
