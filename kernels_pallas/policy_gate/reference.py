"""The definition, on whole arrays and with plain automatic differentiation."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

Number = Float[Array, ""]
Policy = dict[str, Float[Array, "N _"]]
Given = dict[str, Shaped[Array, "..."]]
Mask = Bool[Array, "N T"]
Tokens = Float[Array, "N T"]
Weight = Tokens | dict[str, Tokens]
Gate = Callable[[dict[str, Any], dict[str, Any]], Any]
MAXIMA, MINIMA = ("rollout/logp_gap_nats", "policy/ratio_max"), ("policy/ratio_min",)  # diagnostics that are no sums
ONLY = ""  # the name of a term without a name


class Gated(NamedTuple):
    """What a gate makes of a batch. Only `loss` has a gradient, the rest is constant.

    Attributes:
      loss: sum over terms and chosen tokens of term * weight.
      terms: the same per named term; empty where the gate returns one array.
      extras: the gate's extras, as sums of extra * share over chosen tokens.
      diagnostics: what `policy_gate` says of the policy, by name.
    """

    loss: Number
    terms: dict[str, Number]
    extras: dict[str, Number]
    diagnostics: dict[str, Number]


def policy_gate(gate: Gate, policy: Policy, given: Given, mask: Mask, weight: Weight, share: Tokens) -> Gated:
    """sum(where(mask, term, 0) weight) over the gate's terms, and what every run reports about the batch.

    Args:
      gate: (policy, given) -> terms or (terms, extras).
      policy: differentiable.
      given: constants; the gate also finds the mask among them.
      mask: tokens that count; what is elsewhere is never read.
      weight: [N, T], or by name as the terms are.
      share: weights of means, [N, T].
    """
    wide = lambda x: x.astype(accumulator(x)) if jnp.issubdtype(x.dtype, jnp.floating) else x
    shown = lambda x: jnp.where(mask, x, jnp.zeros_like(x)) if x.shape == mask.shape else x
    ready = lambda tree: jax.tree.map(lambda x: shown(wide(x)), tree)
    given, weight, share = jax.lax.stop_gradient(ready((given, weight, share)))
    policy, given = ready(policy), {**given, "mask": mask}
    terms, extras = split(gate(policy, given))
    weights = weight if isinstance(weight, dict) else {ONLY: weight}
    totals = {name: (shown(term) * weights[name]).sum() for name, term in sorted(terms.items())}
    extras = {name: (shown(jnp.broadcast_to(wide(extra), mask.shape)) * share).sum() for name, extra in extras.items()}

    def unweighted(logp):
        return sum(shown(term).sum() for term in split(gate({**policy, "logp": logp}, given))[0].values())

    sensitivity = jax.grad(unweighted)(policy["logp"]) if counts_clipped(given) else None
    constants = jax.lax.stop_gradient((totals, extras, _diagnostics(policy, given, share, sensitivity)))
    totals_by_name, extras, diagnostics = constants
    named = {} if ONLY in totals else totals_by_name
    return Gated(sum(totals.values()), named, extras, diagnostics)


def _diagnostics(policy: Policy, given: Given, share: Tokens, sensitivity: Tokens | None) -> dict[str, Number]:
    mask, metrics = given["mask"], {}
    total = lambda x: jnp.where(mask, x * share, 0.0).sum()
    if "entropy" in policy:
        metrics["policy/entropy"] = total(policy["entropy"])
    if "rollout_logp" in given:
        change = jnp.where(mask, policy["logp"] - given["rollout_logp"], 0.0)
        ratio = jnp.exp(jnp.clip(change, -20, 20))
        fresh = given.get("fresh", mask).astype(bool)
        metrics |= {
            "rollout/logp_gap_nats": jnp.where(fresh, jnp.abs(change), 0.0).max(),
            "policy/kl_rollout": total(ratio - 1 - change),
            "policy/ratio_max": jnp.where(mask, ratio, 0.0).max(),
            "policy/ratio_min": jnp.where(mask, ratio, jnp.inf).min(),
        }
    if sensitivity is not None:
        metrics["policy/clip_share"] = total((sensitivity == 0) & (given["advantage"] != 0))
    if "reference_logp" in given:
        away = jnp.where(mask, given["reference_logp"] - policy["logp"], 0.0)
        metrics["policy/kl_reference"] = total(jnp.exp(jnp.clip(away, -20, 20)) - 1 - away)
    return metrics


def counts_clipped(given: Given) -> bool:
    """Whether there is credit of drawn tokens, so that `policy/clip_share` means something."""
    return "advantage" in given and "rollout_logp" in given


def split(out: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(terms by name, extras by name) of what a gate returned."""
    terms, extras = out if isinstance(out, tuple) else (out, {})
    return terms if isinstance(terms, dict) else {ONLY: terms}, extras


def accumulator(x: Any) -> Any:
    """The dtype in which numbers of x are computed and summed: its own, at least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)
