"""What a gate makes of one block: its numbers, and in the same pass its gradients."""
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.policy_gate import grid, reference
from kernels_pallas.policy_gate.grid import Block, Found
from kernels_pallas.policy_gate.reference import Gate, Gated, Policy

CLIP_SHARE = "policy/clip_share"


def gated(run: grid.Run, gate: Gate, wanted: tuple[str, ...], moving: Policy,
          constants: Block) -> tuple[Gated, dict[str, Array]]:
    """(results, gradients of the loss) of a batch, in one pass.

    Args:
      run: over the whole batch at once or block by block.
      wanted: the names of the policy arrays whose gradients are made.
      moving, constants: the batch; what the terms depend on, and the rest.
    """
    block = constants._replace(policy={**constants.policy, **moving})
    found = run(functools.partial(_gate, gate, wanted), block)
    return results(found), {**found.tokens, **found.rows}


def results(found: Found) -> Gated:
    """The numbers of a batch by what they are."""
    sums = _under("term/", found.sums)
    diagnostics = {**_under("diagnostic/", found.sums), **found.maxima, **found.minima}
    flat = lambda numbers: {name: number.reshape(()) for name, number in numbers.items()}
    loss = sum(number for _, number in sorted(sums.items())).reshape(())
    return Gated(loss, {} if reference.ONLY in sums else flat(sums), flat(_under("extra/", found.sums)),
                 flat(diagnostics))


def _under(prefix: str, numbers: dict[str, Array]) -> dict[str, Array]:
    return {name.removeprefix(prefix): number for name, number in numbers.items() if name.startswith(prefix)}


def _gate(gate: Gate, wanted: tuple[str, ...], block: Block) -> Found:
    block = hidden(block)
    found, pull = measured(gate, block, wanted)
    counts = reference.counts_clipped(block.given)
    held = {f"diagnostic/{CLIP_SHARE}": clipped(block, pull(ones(block.weight))["logp"])} if counts else {}
    gradients = behind(block.mask, pull(block.weight)) if wanted else {}
    tokens, rows = by_kind({name: gradients[name] for name in wanted}, block.mask)
    return found._replace(sums={**found.sums, **held}, tokens=tokens, rows=rows)


def measured(gate: Gate, block: Block, wanted: tuple[str, ...]) -> tuple[Found, Callable[..., Any]]:
    """The block's numbers, and pull(one weight per token for each term) -> cotangents of `wanted` and of logp."""
    def terms_of(moving):
        return reference.split(gate({**block.policy, **moving}, given))

    given = {**block.given, "mask": block.mask}
    moving = {name: block.policy[name] for name in {"logp", *wanted}}
    terms, pull, extras = jax.vjp(terms_of, moving, has_aux=True)

    def pulled(weight):
        return pull({name: jnp.where(block.mask, weight[name], 0.0).astype(x.dtype) for name, x in terms.items()})[0]

    share = lambda x: total(jnp.where(block.mask, x, 0.0) * block.share)
    sums = {**{f"term/{name}": total(jnp.where(block.mask, x, 0.0) * block.weight[name]) for name, x in terms.items()},
            **{f"extra/{name}": share(x) for name, x in extras.items()}}
    sums_of_policy, maxima, minima = _diagnostics(block, share)
    return Found({**sums, **sums_of_policy}, maxima, minima, {}, {}), pulled


def hidden(block: Block) -> Block:
    """The block with zeros behind the mask, in at least float32."""
    def shown(x):
        x = x.astype(reference.accumulator(x)) if jnp.issubdtype(x.dtype, jnp.floating) else x
        if x.shape != block.mask.shape:
            return x
        return x & block.mask if x.dtype == jnp.bool_ else jnp.where(block.mask, x, jnp.zeros_like(x))

    return jax.tree.map(shown, block)


def ones(weight: dict[str, Array]) -> dict[str, Array]:
    """1 for each of the terms' tokens."""
    return {name: jnp.ones_like(x) for name, x in weight.items()}


def clipped(block: Block, sensitivity: Array) -> Array:
    """Share of tokens that have credit, and whose terms have no gradient in their log-probability."""
    held = block.mask & (sensitivity == 0) & (block.given["advantage"] != 0)
    return total(jnp.where(held, block.share, 0.0))


def behind(mask: Array, cotangents: dict[str, Array]) -> dict[str, Array]:
    """Exactly 0 where nothing was chosen, whatever a number per row did there."""
    some = jnp.max(mask.astype(jnp.int32), axis=1, keepdims=True) > 0
    return {name: jnp.where(mask if x.shape == mask.shape else some, x, 0.0) for name, x in cotangents.items()}


def by_kind(arrays: dict[str, Array], mask: Array) -> tuple[dict[str, Array], dict[str, Array]]:
    """(numbers per token, numbers per row)."""
    tokens = {name: x for name, x in arrays.items() if x.shape == mask.shape}
    return tokens, {name: x for name, x in arrays.items() if name not in tokens}


def total(x: Array) -> Array:
    """The sum as [1, 1], along tokens first: neither backend needs a number outside its vectors."""
    return x.sum(axis=1, keepdims=True).sum(axis=0, keepdims=True)


def _diagnostics(block: Block, share: Callable[[Array], Array]) -> tuple[dict, dict, dict]:
    policy, given, mask = block.policy, block.given, block.mask
    sums, maxima, minima = {}, {}, {}
    largest = lambda x: x.max(axis=1, keepdims=True).max(axis=0, keepdims=True)
    if "entropy" in policy:
        sums["policy/entropy"] = share(policy["entropy"])
    if "rollout_logp" in given:
        change = jnp.where(mask, policy["logp"] - given["rollout_logp"], 0.0)
        ratio = jnp.exp(jnp.clip(change, -20.0, 20.0))
        gap = jnp.abs(change)
        gap = jnp.where(given["fresh"], gap, 0.0) if "fresh" in given else gap
        sums["policy/kl_rollout"] = share(ratio - 1 - change)
        maxima = {"rollout/logp_gap_nats": largest(gap), "policy/ratio_max": largest(jnp.where(mask, ratio, 0.0))}
        minima = {"policy/ratio_min": -largest(jnp.where(mask, -ratio, -jnp.inf))}
    if "reference_logp" in given:
        away = jnp.where(mask, given["reference_logp"] - policy["logp"], 0.0)
        sums["policy/kl_reference"] = share(jnp.exp(jnp.clip(away, -20.0, 20.0)) - 1 - away)
    return {f"diagnostic/{name}": number for name, number in sums.items()}, maxima, minima
