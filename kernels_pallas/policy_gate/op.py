"""A policy's loss, its gradient and its diagnostics in one pass over the tokens."""
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.policy_gate import backward, blocks, forward, grid, reference, staged, trace
from kernels_pallas.policy_gate.grid import Block
from kernels_pallas.policy_gate.reference import Gate, Gated, Given, Mask, Policy, Tokens, Weight

LEVELS = "token", "row"
DIAGNOSED = {"policy": ("logp", "entropy"), "given": ("rollout_logp", "reference_logp", "advantage", "fresh")}


def policy_gate(gate: Gate, policy: Policy, given: Given, mask: Mask, weight: Weight, share: Tokens, *,
                level: str | None = "token", implementation: str | None = None) -> Gated:
    """sum(where(mask, term, 0) weight) over the gate's terms, with its gradient and the diagnostics in one pass.

    The gradient is made beside the values, by the vjp of the gate inside the kernel; differentiating only scales it.
    Without differentiation no gradient is made. What is behind the mask is never read and gets exactly 0.

    Diagnostics, each where the arrays that it is made of are there (extremes apart, those of parts of a batch add up):
    "policy/entropy", in nats, of policy "entropy"; with given "rollout_logp" the largest and smallest ratio to it
    ("policy/ratio_max", "policy/ratio_min"), k3 to it in nats per token ("policy/kl_rollout") and the largest
    difference of the two log-probabilities, among the tokens of given "fresh" ("rollout/logp_gap_nats"); with given
    "advantage" as well "policy/clip_share", the share of tokens with credit whose terms have no gradient in their
    log-probability: what any gate holds back; with given "reference_logp" k3 to it ("policy/kl_reference").

    Args:
      gate: (policy, given) -> terms or (terms, extras), an ordinary function of blocks: terms are one [n, t] or a dict
        of them, extras a dict of [n, t]. It closes over no array; `given["mask"]` is the mask.
      policy: differentiable, by name, [N, T] or [N, 1]: "logp", in nats, and perhaps "entropy" (nats), "values", ...
      given: constants by name: per token [N, T], per row [N, 1], or one number for all [].
      mask: tokens that count.
      weight: what terms are multiplied by, [N, T], or by name as the terms are. Constant.
      share: weights of means over tokens: mask / number of chosen tokens of the whole batch. Constant.
      level: "token", each result depends on the same token (and its row's [N, 1], and []) only; or "row", on the
        whole row: the gate then sees whole rows, perhaps longer ones with a mask that is False. None finds out.
      implementation: "reference" (plain automatic differentiation), "xla" (one pass, plain XLA), "pallas" (one
        kernel), or None for the best on this device.

    Raises:
      ValueError: arrays that do not fit; terms of another shape or with other names than the weights; a gate that
        closes over an array or is not of its level; an implementation that does not exist or cannot run this gate.
    """
    _check_arrays(policy, given, mask, weight, share)
    if level is not None and level not in LEVELS:
        raise ValueError(f"level={level!r}: allowed are None and {LEVELS}.")
    policy, given, mask, weight, share = _aligned((policy, given, mask, weight, share))
    known = {**given, "mask": mask}
    traced = trace.function(gate, "gate", policy, known)
    level = level or traced.level
    check_results(traced.out, mask, weight)
    if level == "token":
        _check_of_token("gate", traced, "take level='row'")
    where = dispatch.platform()
    obstacle = traced.obstacle or (blocks.too_long(where, mask.shape[1]) if level == "row" else None)
    size = (blocks.of_rows if level == "row" else blocks.of_tokens)(where, *mask.shape)
    names = traced.moving, traced.policy, traced.given

    def in_passes(run: grid.Run) -> Gated:
        moving, block = _split(names, policy, given, (mask, weight, share))
        call = functools.partial(forward.gated, run, trace.lean(gate, traced, policy, known))
        return backward.differentiable(_passes(call, moving), moving, block)

    run = dispatch.implementation("policy_gate", implementation, blocks.best(where, obstacle), {
        "reference": lambda: reference.policy_gate(gate, policy, given, mask, weight, share),
        "xla": lambda: in_passes(grid.at_once),
        "pallas": lambda: in_passes(_kernel("policy_gate", obstacle, size))})
    return run()


def staged_gate(statistics: Gate, combine: staged.Combine, gate: Gate, policy: Policy, given: Given, mask: Mask, *,
                weight: Weight, share: Tokens, implementation: str | None = None) -> Gated:
    """`policy_gate` for a gate of sums over rows, however long they are, which may be mixed over rows in between.

    The same as the gate of the whole batch that the three functions make together, values, gradients and diagnostics.

    Args:
      statistics: (policy, given) -> dict of [n, t], each token's part of sums over its row's chosen tokens.
      combine: (sums, rows) -> dict of [N], an ordinary differentiable function of whole arrays, outside any kernel:
        sums [N] by the names of the statistics; rows, constants per row: those of `given` as [N], and `chosen`, the
        number of chosen tokens. It may compare rows and may close over arrays, which are constants.
      gate: as of `policy_gate`, at the level of tokens; it sees what `combine` made in `policy`, as [n, 1].
      policy: by name, [N, T].
      given, mask, weight, share, implementation: as of `policy_gate`.

    Raises:
      ValueError: as `policy_gate`.
    """
    _check_arrays(policy, given, mask, weight, share)
    if not all(x.shape == mask.shape for x in policy.values()):
        raise ValueError("policy arrays of a gate in stages are [N, T]; what `combine` makes is [N, 1].")
    policy, given, mask, weight, share = _aligned((policy, given, mask, weight, share))
    known, rows = {**given, "mask": mask}, staged.rows_of(given, mask)
    summed = trace.function(statistics, "function of statistics", policy, known)
    _check_of_token("function of statistics", summed, "sums over rows are made of what it returns")
    _check_shapes("statistics", summed.out, mask)
    combine, closed, made = _hoisted(combine, summed.out, rows)
    both = sorted(set(made) & set(policy))
    if both:
        raise ValueError(f"combine makes {both}, which policy has already: take other names.")
    everything = {**policy, **jax.eval_shape(staged.columns, made)}
    traced = trace.function(gate, "gate", everything, known)
    check_results(traced.out, mask, weight)
    _check_of_token("gate", traced, "make it of sums over rows, by statistics and combine")
    where = dispatch.platform()
    obstacle = summed.obstacle or traced.obstacle
    stages = staged.Stages(statistics, combine, gate)
    thin = staged.Stages(trace.lean(statistics, summed, policy, known), combine,
                         trace.lean(gate, traced, everything, known))
    names = ((summed.moving | traced.moving) & set(policy), summed.policy | traced.policy, summed.given | traced.given)

    def in_passes(run: grid.Run) -> Gated:
        moving, block = _split(names, policy, given, (mask, weight, share))
        call = functools.partial(staged.gated, run, thin)
        return backward.differentiable(_passes(call, moving), moving, staged.Constants(block, rows, closed))

    whole = staged.composed(stages, rows, closed)
    size = blocks.of_tokens(where, *mask.shape)
    run = dispatch.implementation("staged_gate", implementation, blocks.best(where, obstacle), {
        "reference": lambda: reference.policy_gate(whole, policy, given, mask, weight, share),
        "xla": lambda: in_passes(grid.at_once),
        "pallas": lambda: in_passes(_kernel("staged_gate", obstacle, size))})
    return run()


def _passes(call: Callable, moving: Policy) -> backward.Passes:
    return backward.Passes(functools.partial(call, ()), functools.partial(call, tuple(sorted(moving))))


def _kernel(op: str, obstacle: str | None, size: blocks.Size) -> grid.Run:
    if obstacle is not None:
        raise ValueError(f"{op} cannot run this gate with implementation='pallas': {obstacle}; or take 'xla' or None.")
    return functools.partial(grid.in_blocks, size=size)


def _split(names: tuple, policy: Policy, given: Given, arrays: tuple) -> tuple[Policy, Block]:
    """(policy arrays that get a gradient, the rest of what is read)."""
    mask, weight, share = arrays
    moving, of_policy, of_given = (set(one) for one in names)
    weight = weight if isinstance(weight, dict) else {reference.ONLY: weight}
    still = {name: x for name, x in policy.items() if name in of_policy.union(DIAGNOSED["policy"]) - moving}
    constants = {name: x for name, x in given.items() if name in of_given.union(DIAGNOSED["given"])}
    block = jax.lax.stop_gradient(Block(still, constants, mask, weight, share))
    return {name: x for name, x in policy.items() if name in moving}, block


def _aligned(arrays: Any) -> Any:
    """The arrays, all varying over the mesh axes that any of them varies over.

    Inside `shard_map` a replicated argument then gets its gradient summed over the devices.
    """
    varying = lambda x: jax.typeof(x).manual_axis_type.varying
    axes = frozenset().union(*map(varying, jax.tree.leaves(arrays)))

    def align(x):
        missing = tuple(sorted(axes - varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(align, arrays)


def _hoisted(combine: staged.Combine, statistics: Any, rows: dict[str, Any]) -> tuple[Callable, list, Any]:
    """(combine with what it closed over as its last argument, that, the shapes of what it makes)."""
    shape = rows["chosen"].shape
    sums = {name: jax.ShapeDtypeStruct(shape, x.dtype) for name, x in statistics.items()}
    closed, made = jax.make_jaxpr(combine, return_shape=True)(sums, rows)
    if not isinstance(made, dict) or any(x.shape != shape for x in made.values()):
        raise ValueError(f"combine must return a dict of arrays [N] = {list(shape)}, not {made}.")

    def called(sums: Any, rows: Any, closed_over: list) -> Any:
        flat = jax.core.eval_jaxpr(closed.jaxpr, closed_over, *jax.tree.leaves((sums, rows)))
        return jax.tree.unflatten(jax.tree.structure(made), flat)

    return called, jax.lax.stop_gradient(closed.consts), made


def _check_arrays(policy: Policy, given: Given, mask: Mask, weight: Weight, share: Tokens) -> None:
    rows = mask.shape[0]
    if "logp" not in policy or "mask" in given:
        raise ValueError(f"policy must have 'logp' (it has {sorted(policy)}), and given no 'mask' (the gate finds the "
                         "mask there by itself).")
    both = sorted(set(policy) & set(given))
    if both:
        raise ValueError(f"{both} are in policy and in given: what is differentiable is in policy only.")
    wrong = [f"policy[{name!r}] {x.shape}" for name, x in policy.items() if x.shape not in (mask.shape, (rows, 1))]
    wrong += [f"given[{name!r}] {x.shape}" for name, x in given.items() if x.shape not in (mask.shape, (rows, 1), ())]
    weights = weight if isinstance(weight, dict) else {"": weight}
    wrong += [f"{name or 'weight'} {x.shape}" for name, x in {**weights, "share": share, "logp": policy["logp"]}.items()
              if x.shape != mask.shape]
    if wrong:
        raise ValueError(f"with a mask [N, T] = {list(mask.shape)} these do not fit: {', '.join(wrong)}; policy may be "
                         "[N, T] or [N, 1], given also [], logp, weight and share are [N, T].")


def check_results(out: Any, mask: Mask, weight: Weight) -> None:
    """Raises ValueError unless a gate's results are as `policy_gate` says.

    Args:
      out: what the gate returned, arrays or shapes.
      mask, weight: as of `policy_gate`.
    """
    terms = out[0] if isinstance(out, tuple) else out
    extras = out[1] if isinstance(out, tuple) else {}
    if isinstance(out, tuple) and len(out) != 2 or not isinstance(extras, dict):
        raise ValueError(f"a gate returns terms or (terms, extras), extras a dict; not {out}.")
    named = sorted(terms) if isinstance(terms, dict) else None
    weights = sorted(weight) if isinstance(weight, dict) else None
    if named != weights:
        raise ValueError(f"the gate has the terms {named or 'of no name'} and there are weights for "
                         f"{weights or 'no name'}: both must name the same.")
    _check_shapes("terms", terms if isinstance(terms, dict) else {"of no name": terms}, mask)
    _check_shapes("extras", extras, mask)


def _check_shapes(what: str, arrays: Any, mask: Mask) -> None:
    if not isinstance(arrays, dict):
        raise ValueError(f"{what} must be a dict of arrays [n, t], not {arrays}.")
    wrong = {name: x.shape for name, x in arrays.items() if x.shape != mask.shape}
    if wrong:
        raise ValueError(f"{what} must have one number per token, [N, T] = {list(mask.shape)}; other shapes have "
                         f"{wrong}: broadcast them.")


def _check_of_token(name: str, traced: trace.Traced, remedy: str) -> None:
    if traced.reduction is not None:
        raise ValueError(f"the {name} joins tokens ({traced.reduction}) and is to be of one token at a time: {remedy}.")
