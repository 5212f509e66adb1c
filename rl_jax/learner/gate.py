"""A recipe's loss slot as a gate of named arrays: what `policy_gate` and its kernels run."""
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.linear_logprob.op import linear_logprob
from kernels_pallas.linear_policy_loss.op import linear_policy_loss
from kernels_pallas.linear_policy_loss.reference import Batch, Head
from kernels_pallas.policy_gate import portable, reference, trace
from kernels_pallas.policy_gate.op import DIAGNOSED, policy_gate
from kernels_pallas.policy_gate.reference import Gated
from rl_jax.models import mesh
from rl_jax.recipe import Recipe
from rl_jax.types import Evaluated, Experience

SAID = ("logp", "entropy", "values")
OF_DRAWN = ("rollout_logp", "advantage", "fresh")  # what diagnostics read of answers that were drawn


class Slot(NamedTuple):
    """A recipe's loss slot.

    Attributes:
      gate: (policy, given) -> terms or (terms, extras).
      given: the fields of x that it reads, and those that diagnostics read, by name: per token [N, T], per sequence
        [N, 1], one for all [].
      terms: the names of its terms; None if it has one without a name.
      closed: it reads nothing else. One that closes over arrays (its author's, or what a memory keeps of every
        example) runs on whole batches and in no kernel.
    """

    gate: Callable[[dict[str, Array], dict[str, Array]], Any]
    given: dict[str, Array]
    terms: list[str] | None
    closed: bool


def of_recipe(recipe: Recipe, policy: Evaluated, x: Experience) -> Slot:
    """The loss slot of a recipe for this batch; of the policy only the shapes are read."""
    paths, treedef = jax.tree.flatten_with_path(dataclasses.replace(x, prompts=None, support=None))
    leaves = {_name(path, recipe): leaf for path, leaf in paths}
    trace_loss = jax.make_jaxpr(lambda leaves, policy: recipe.loss(policy, treedef.unflatten(leaves)), return_shape=True)
    closed, out = trace_loss(list(leaves.values()), policy)
    terms = out[0] if isinstance(out, tuple) else out
    needed = portable.needed(closed.jaxpr, closed.jaxpr.outvars)
    read = {name: leaf for (name, leaf), one in zip(leaves.items(), closed.jaxpr.invars, strict=False)
            if (one in needed or name in DIAGNOSED["given"]) and name != "mask"}
    ranks = {name: leaf.ndim for name, leaf in read.items() if leaf.shape in (x.mask.shape, x.mask.shape[:1], ())}
    others = {name: leaf for name, leaf in read.items() if name not in ranks}

    def gate(policy: dict[str, Array], given: dict[str, Array]) -> Any:
        fields = {name: given[name][:, 0] if rank == 1 else given[name] for name, rank in ranks.items()}
        fields |= {**others, "mask": given["mask"]}
        part = treedef.unflatten([fields.get(name, _unread(leaf, x.mask.shape, given["mask"].shape))
                                  for name, leaf in leaves.items()])
        return recipe.loss(Evaluated(**{name: policy.get(name) for name in SAID}), part)

    given = {name: read[name][:, None] if rank == 1 else read[name] for name, rank in ranks.items()}
    return Slot(gate, given, sorted(terms) if isinstance(terms, dict) else None,
                closed=not others and not trace.consts(closed))


def said(policy: Evaluated) -> dict[str, Array]:
    """What the policy says, by name."""
    return {name: values for name in SAID if (values := vars(policy)[name]) is not None}


def gated(recipe: Recipe, policy: Evaluated, x: Experience, weight: Any, share: Float[Array, "N T"]) -> Gated:
    """The recipe's loss on a batch or a part of it, and what every run reports about it.

    Args:
      weight: from the weighting slot, on the whole batch: [N, T], or by name for named terms.
      share: weights of means over the chosen tokens of the whole batch.
    """
    slot = of_recipe(recipe, policy, x)
    weight = _weight(recipe, slot, weight)
    # XLA cuts arrays over a mesh, and no kernel
    in_kernel = slot.closed and mesh.current() is None
    run = functools.partial(policy_gate, level=None) if in_kernel else reference.policy_gate
    return run(slot.gate, said(policy), slot.given, x.mask, weight, share)


def of_head(recipe: Recipe, head: Head, values: Float[Array, "N T"] | None, x: Experience, weight: Any,
            share: Float[Array, "N T"]) -> Gated:
    """`gated`, of what the head of a network says of the tokens: from hidden states to the loss.

    Args:
      head: a row for each token of x.
      values: the critic's, if there is one.
      weight, share: as in `gated`.
    """
    nothing = jnp.zeros(x.mask.shape, jnp.float32)
    slot = of_recipe(recipe, Evaluated(logp=nothing, entropy=nothing, values=values), x)
    said_too = {} if values is None else {"values": values}
    batch = Batch(said_too, slot.given, x.mask, _weight(recipe, slot, weight), share)
    if slot.closed:
        return linear_policy_loss(slot.gate, head, batch)
    logp, entropy = linear_logprob(head.hidden, head.vocabulary, head.targets, temperature=head.temperature,
                                   support=head.support)
    found = {"logp": logp.reshape(x.mask.shape), "entropy": entropy.reshape(x.mask.shape)}
    return reference.policy_gate(slot.gate, {**batch.policy, **found}, *batch[1:])


def _weight(recipe: Recipe, slot: Slot, weight: Any) -> Any:
    named = sorted(weight) if isinstance(weight, dict) else None
    if slot.terms != named:
        raise ValueError(f"recipe {recipe.name!r}: the loss slot has the terms {slot.terms or 'of no name'} and the "
                         f"weighting slot weights for {named or 'no name'}: both must name the same.")
    return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bool_ else a, weight)


def with_metrics(found: Gated) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss, and under the names of a run's metrics: the loss, its named terms, extras and diagnostics."""
    terms = {f"loss/{name}": value for name, value in found.terms.items()}
    return found.loss, {"loss/total": jax.lax.stop_gradient(found.loss), **terms, **found.extras, **found.diagnostics}


def _unread(leaf: Array, whole: tuple[int, int], part: tuple[int, int]) -> Array:
    """Something of the right shape in a part of the batch, for records that are checked when they are made."""
    sizes = {whole: part, whole[:1]: part[:1]}
    return jnp.zeros(sizes.get(leaf.shape, leaf.shape), leaf.dtype)


def _name(path: tuple, recipe: Recipe) -> str:
    """The field's name as `policy_gate` knows it, unique among all: "advantage", "marks/share"."""
    field, *rest = (key.name if isinstance(key, jax.tree_util.GetAttrKey) else str(key.key) for key in path)
    name = "/".join(rest if field == "given" else [field, *rest])
    return f"x/{name}" if name in SAID or recipe.rollout is None and name in OF_DRAWN else name
