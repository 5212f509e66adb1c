"""A gate of whole rows in stages: sums over the row, what is made of them, the gate, and the way back.

Rows may be longer than a block, and what is made of the sums may mix rows.
"""
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.policy_gate import backward, forward, grid, reference
from kernels_pallas.policy_gate.grid import Block, Found
from kernels_pallas.policy_gate.reference import Gate, Gated, Policy

Sums = dict[str, Float[Array, " N"]]
Combine = Callable[[Sums, dict[str, Any]], Sums]


class Stages(NamedTuple):
    """The three functions of a gate in stages; `combine` takes what it closed over as its last argument."""

    statistics: Gate
    combine: Callable[..., Sums]
    gate: Gate


class Constants(NamedTuple):
    """What has no gradient: the batch's arrays, and what `combine` sees of the rows and closed over."""

    block: Block
    rows: dict[str, Array]
    closed: Any


def composed(stages: Stages, rows: dict[str, Array], closed: Any) -> Gate:
    """The three functions as one gate of the whole batch."""
    def gate(policy, given):
        sums = {name: jnp.where(given["mask"], x, 0.0).sum(axis=1)
                for name, x in stages.statistics(policy, given).items()}
        made = stages.combine(sums, rows, closed)
        return stages.gate({**policy, **columns(made)}, given)

    return gate


def gated(run: grid.Run, stages: Stages, wanted: tuple[str, ...], moving: Policy,
          constants: Constants) -> tuple[Gated, dict[str, Array]]:
    """(results, gradients of the loss) of a batch, in three passes: sums, gate, way back.

    Without gradients the third only counts `policy/clip_share`, where there is one.

    Args:
      run: over the whole batch at once or block by block.
      wanted: the names of the policy arrays whose gradients are made.
      moving, constants: the batch; what the terms depend on, and the rest.
    """
    block = constants.block._replace(policy={**constants.block.policy, **moving})
    bare = block._replace(weight={}, share=None)
    sums = run(functools.partial(_sums, stages.statistics), bare).rows
    made, pull = jax.vjp(lambda sums: stages.combine(sums, constants.rows, constants.closed),
                         {name: x[:, 0] for name, x in sums.items()})
    whole = block._replace(policy={**block.policy, **columns(made)})
    names = tuple(sorted(made))
    counts = reference.counts_clipped(block.given)
    asked = (("loss",) if wanted else ()) + (("unweighted",) if counts else ())
    found = run(functools.partial(_gate, stages.gate, names, asked), whole)
    through = {kind: columns(pull({name: found.rows[f"{kind}/{name}"][:, 0].astype(made[name].dtype)
                                   for name in names})[0]) for kind in asked}
    if not asked:
        return forward.results(found), {}
    pulls = backward.Pulls(through.get("loss", {}), through.get("unweighted", {}))
    back = functools.partial(backward.spread, stages.gate, stages.statistics, wanted)
    last = run(back, whole._replace(weight={"terms": block.weight, "pulls": pulls}))
    return forward.results(found._replace(sums={**found.sums, **last.sums})), last.tokens


def columns(rows: Sums) -> dict[str, Float[Array, "N 1"]]:
    """Numbers per row, as the gate sees them."""
    return {name: x[:, None] for name, x in rows.items()}


def rows_of(given: dict[str, Any], mask: Array) -> dict[str, Any]:
    """What `combine` is told of the rows: the constants per row as [N], and `chosen`, their number of chosen tokens."""
    return {**{name: x[:, 0] for name, x in given.items() if x.shape == (mask.shape[0], 1)}, "chosen": mask.sum(axis=1)}


def _sums(statistics: Gate, block: Block) -> Found:
    block = forward.hidden(block)
    numbers = statistics(block.policy, {**block.given, "mask": block.mask})
    rows = {name: jnp.where(block.mask, x, 0.0).sum(axis=1, keepdims=True) for name, x in numbers.items()}
    return Found({}, {}, {}, {}, rows)


def _gate(gate: Gate, names: tuple[str, ...], asked: tuple[str, ...], block: Block) -> Found:
    """The gate's numbers, and sums over the row's tokens of the cotangents of what was made of the row's sums."""
    block = forward.hidden(block)
    found, pull = forward.measured(gate, block, names)
    weights = {"loss": block.weight, "unweighted": forward.ones(block.weight)}
    rows = {}
    for kind in asked:
        cotangents = forward.behind(block.mask, pull(weights[kind]))
        rows |= {f"{kind}/{name}": cotangents[name] for name in names}
    return found._replace(rows=rows)
