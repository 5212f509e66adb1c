"""The gradient: made in the forward pass and scaled here; for gates in stages, spread from sums over rows to tokens."""
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.policy_gate import forward, reference
from kernels_pallas.policy_gate.grid import Block, Found
from kernels_pallas.policy_gate.reference import Gate, Gated, Policy


class Passes(NamedTuple):
    """Two ways to go over a batch, (moving, constants) -> (results, gradients of the loss).

    Attributes:
      values: makes no gradients.
      gradients: makes them beside the results.
    """

    values: Callable[[Policy, Any], tuple[Gated, dict[str, Array]]]
    gradients: Callable[[Policy, Any], tuple[Gated, dict[str, Array]]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(passes: Passes, moving: Policy, constants: Any) -> Gated:
    """The results of a batch, of which the loss is differentiable in `moving`.

    Args:
      passes: which of them is run depends on whether the call is differentiated.
      moving: the policy arrays that the loss depends on.
      constants: everything else.
    """
    return passes.values(moving, constants)[0]


def _forward(passes, moving, constants):
    results, gradients = passes.gradients(moving, constants)
    return results, {name: gradients[name].astype(x.dtype) for name, x in moving.items()}


def _backward(passes, gradients, cotangents):
    # A residual that was a constant comes back as a NumPy array.
    scaled = {name: jnp.asarray(x) * cotangents.loss.astype(x.dtype) for name, x in gradients.items()}
    return scaled, None


differentiable.defvjp(_forward, _backward)


class Pulls(NamedTuple):
    """Cotangents [n, 1] of a row's sums: of the loss, and of the unweighted terms (empty where not needed)."""

    loss: dict[str, Array]
    unweighted: dict[str, Array]


def spread(gate: Gate, statistics: Gate, wanted: tuple[str, ...], block: Block) -> Found:
    """Gradients per token, and the share of tokens without any: directly through the gate and through the row's sums.

    The gate runs a second time here, which reads nothing more than its statistics do: its gradient need not be stored
    in between.

    Args:
      gate: sees what was made of the sums as [n, 1].
      statistics: (policy, given) -> [n, t] by name, what was summed over rows.
      wanted: the names of the policy arrays whose gradients are made; may be empty.
      block: `policy` also holds what was made of the sums; `weight` holds, as "terms" and "pulls", the terms' weights
        and the `Pulls`.
    """
    weight, pulls = block.weight["terms"], block.weight["pulls"]
    block = forward.hidden(block._replace(weight=weight))
    given = {**block.given, "mask": block.mask}

    def both(moving):
        policy = {**block.policy, **moving}
        return reference.split(gate(policy, given))[0], statistics(policy, given)

    moving = {name: block.policy[name] for name in {"logp", *wanted}}
    (terms, sums), pull = jax.vjp(both, moving)

    def pulled(weight, of_sums):
        chosen = lambda cotangents, like: {
            name: jnp.where(block.mask, cotangents[name], 0.0).astype(x.dtype) for name, x in like.items()}
        return pull((chosen(weight, terms), chosen(of_sums, sums)))[0]

    gradients = forward.behind(block.mask, pulled(block.weight, pulls.loss)) if wanted else {}
    counts = {}
    if pulls.unweighted:
        sensitivity = pulled(forward.ones(block.weight), pulls.unweighted)["logp"]
        counts[f"diagnostic/{forward.CLIP_SHARE}"] = forward.clipped(block, sensitivity)
    return Found(counts, {}, {}, {name: gradients[name] for name in wanted}, {})
