"""Loss and gradients in one sweep: each row's logits are made once, and all is drawn from them while they are there."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from kernels_pallas.linear_logprob import backward as linear_backward
from kernels_pallas.linear_logprob import blocks as linear_blocks
from kernels_pallas.linear_logprob import forward as linear_forward
from kernels_pallas.linear_logprob import reference as linear_reference
from kernels_pallas.linear_policy_loss import backward, blocks
from kernels_pallas.linear_policy_loss.reference import found
from kernels_pallas.policy_gate import forward as gate_forward
from kernels_pallas.policy_gate import grid
from kernels_pallas.policy_gate.grid import Block
from kernels_pallas.policy_gate.reference import MAXIMA, MINIMA, Gate, Gated

HEAD = "hidden", "vocabulary"


class Constants(NamedTuple):
    """What the loss is not differentiated in; `block` has a row per token: [M, 1], or [] for all."""

    targets: Int[Array, " M"]
    temperature: Any
    support: UInt32[Array, "M W"] | None
    block: Block


def one_sweep(gate: Gate, through: tuple[str, ...], soft_cap: int | float | None, moving: dict[str, Array],
              constants: Constants) -> tuple[Gated, dict[str, Array]]:
    """(results, gradients of the loss in `moving`), with the logits of one block of rows in memory at a time.

    Args:
      gate: of one token at a time.
      through: names of the policy arrays that the terms depend on, "logp" and "entropy" as well.
      soft_cap: bound on the logits.
      moving: "hidden" [M, D] and "vocabulary" [V, D], and further policy arrays, [M, 1].
      constants: everything else.
    """
    vocabulary, rest = moving["vocabulary"], {name: x for name, x in moving.items() if name not in HEAD}
    for_all = {name: x for name, x in constants.block.given.items() if x.ndim == 0}
    per_row = {name: x for name, x in constants.block.given.items() if x.ndim > 0}

    def gated(block, rest, logp, entropy):
        return _gated(gate, through, block._replace(given={**block.given, **for_all}), rest, logp, entropy)

    def one_block(carry, part):
        total, d_vocabulary = carry
        hidden, targets, support, rest, block = part
        u = linear_forward.tile_logits(hidden, vocabulary, constants.temperature, support, soft_cap, 0,
                                       vocabulary.shape[0])
        seen = linear_forward.tile_moments(u, targets)
        logp, entropy, _, log_total = linear_forward.results(seen)
        new, gradients = gated(block, rest, logp, entropy)
        d_policy = {name: gradients.pop(name)[:, 0] for name in ("logp", "entropy") if name in gradients}
        d_z = backward.d_logits(u, seen, targets, d_policy, entropy, log_total)
        d_z *= linear_backward.slope(u, constants.temperature, soft_cap)
        d_z = d_z.astype(linear_reference.operand_dtype(hidden, vocabulary))
        d_hidden = linear_reference.product(d_z, vocabulary, 1, 0).astype(hidden.dtype)
        d_vocabulary += linear_reference.product(d_z, hidden, 0, 0)
        return (joined(total, new), d_vocabulary), {"hidden": d_hidden, **gradients}

    rows = moving["hidden"], constants.targets, constants.support, rest, constants.block._replace(given=per_row)
    shapes = jax.eval_shape(lambda: gated(rows[4], rest, *jnp.zeros((2, rows[0].shape[0]))))[0]
    start = _nothing_seen(shapes), jax.lax.full_like(vocabulary, 0, jnp.float32)
    size = rows[0].shape[0]
    count = blocks.row_blocks(size, vocabulary.shape[0])
    # Rows are filled up to equal shares with some whose mask is False: whatever their number, a share is small.
    filled = jax.tree.map(lambda x: jnp.pad(x, [(0, -size % count)] + [(0, 0)] * (x.ndim - 1)), rows)
    (total, d_vocabulary), gradients = linear_blocks.over_rows(one_block, start, filled, count)
    gradients = {name: x[:size] for name, x in gradients.items()}
    return total, {**gradients, "vocabulary": d_vocabulary.astype(vocabulary.dtype)}


def values(gate: Gate, through: tuple[str, ...], soft_cap: int | float | None, moving: dict[str, Array],
           constants: Constants) -> tuple[Gated, dict[str, Array]]:
    """The results of `one_sweep`, without gradients."""
    hidden, vocabulary, rest = moving["hidden"], moving["vocabulary"], {
        name: x for name, x in moving.items() if name not in HEAD}
    seen = linear_forward.moments(hidden, vocabulary, constants.targets, constants.temperature, constants.support,
                                  soft_cap)
    return _gated(gate, (), constants.block, rest, *linear_forward.results(seen)[:2])


def _gated(gate: Gate, through: tuple[str, ...], block: Block, rest: dict[str, Array], logp: Array,
           entropy: Array) -> tuple[Gated, dict[str, Array]]:
    policy = {**block.policy, **rest, **found(logp, entropy, block.mask)}
    return gate_forward.gated(grid.at_once, gate, through, {}, block._replace(policy=policy))


def joined(a: Gated, b: Gated) -> Gated:
    """The results of both parts of a batch together: sums, and extremes by their names."""
    of = lambda name: jnp.maximum if name in MAXIMA else jnp.minimum if name in MINIMA else jnp.add
    sums = jax.tree.map(jnp.add, a._replace(diagnostics={}), b._replace(diagnostics={}))
    return sums._replace(diagnostics={name: of(name)(x, b.diagnostics[name]) for name, x in a.diagnostics.items()})


def _nothing_seen(shapes: Gated) -> Gated:
    first = lambda name: -jnp.inf if name in MAXIMA else jnp.inf if name in MINIMA else 0.0
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return zero._replace(diagnostics={name: x + jnp.asarray(first(name), x.dtype)
                                      for name, x in zero.diagnostics.items()})
