"""The definition: log-probability and entropy with all logits in memory, then the gate on whole arrays."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from kernels_pallas.linear_logprob import reference as linear_reference
from kernels_pallas.linear_logprob.reference import Scalar
from kernels_pallas.policy_gate import reference as gate_reference
from kernels_pallas.policy_gate.reference import Gate, Gated, Given, Mask, Policy, Tokens, Weight


class Head(NamedTuple):
    """The last layer: what `linear_logprob` takes, with a row for each of the N * T tokens of a batch.

    `hidden` and `vocabulary` are differentiable.
    """

    hidden: Float[Array, "M D"]
    vocabulary: Float[Array, "V D"]
    targets: Int[Array, " M"]
    temperature: Scalar = 1.0
    soft_cap: int | float | None = None
    support: UInt32[Array, "M W"] | None = None


class Batch(NamedTuple):
    """What `policy_gate` takes beside log-probability and entropy, which the head gives.

    `policy` holds further differentiable arrays, such as a critic's values.
    """

    policy: Policy
    given: Given
    mask: Mask
    weight: Weight
    share: Tokens


def linear_policy_loss(gate: Gate, head: Head, batch: Batch) -> Gated:
    """The gate's loss and diagnostics, by plain automatic differentiation."""
    logp, entropy = linear_reference.linear_logprob(
        head.hidden, head.vocabulary, head.targets, jnp.asarray(head.temperature, jnp.float32), head.support,
        head.soft_cap)
    return gate_reference.policy_gate(gate, {**batch.policy, **found(logp, entropy, batch.mask)}, *batch[1:])


def found(logp: Float[Array, " M"], entropy: Float[Array, " M"], mask: Any) -> Policy:
    """What the head says of the tokens, [N, T]; 0 behind the mask, where a target may be no token at all."""
    shown = lambda x: jnp.where(mask, x.reshape(mask.shape), 0.0)
    return jax.tree.map(shown, {"logp": logp, "entropy": entropy})
