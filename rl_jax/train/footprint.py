"""What a phase will hold and do on each device of its mesh, before there is any of them: shapes, and XLA's own analysis.

The step is compiled for as many CPU devices as the mesh has, from shapes alone. What is held is exact. A CPU multiplies
no bfloat16, so where the network computes in it XLA's temporaries hold float32 copies that other devices do without.
"""
import contextlib
import dataclasses
import math
from typing import Any

import jax
from jax.extend.core import Var

from rl_jax.experiment import Experiment
from rl_jax.learner import assemble, evaluate, roles, update
from rl_jax.models import mesh as meshes
from rl_jax.models.network import Network
from rl_jax.train import loop, plan, session
from rl_jax.types import Parameters, Prompts, TrainState


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Of one phase, on one device.

    Attributes:
      held: bytes by role, all the time.
      away: bytes by role in the host's memory; none of the device's.
      rollout, update: bytes by role while answers are drawn, and while weights are learned; not at the same time.
      rest: bytes of XLA's temporaries that are none of these, at the dearest moment.
      total: bytes of the compiled step at that moment: arguments, results and temporaries.
      flops: by part of the step.
    """

    held: dict[str, int]
    away: dict[str, int]
    rollout: dict[str, int]
    update: dict[str, int]
    rest: int
    total: int
    flops: dict[str, float]


class NoWorkers:
    """In the place of the processes of a host verifier: nothing is scored where nothing runs."""

    def score(self, fields: Any, texts: Any) -> Any:
        """Never called."""
        raise NotImplementedError("a plan scores nothing")


def mesh_of(experiment: Experiment) -> jax.sharding.Mesh | None:
    """The mesh of a run, of the devices of this process."""
    others = experiment.asynchronous.sampler_devices
    several = experiment.mesh.devices > 1 or others or experiment.mesh.offload
    return meshes.make(experiment.mesh, behind=others) if several else None


def devices(experiment: Experiment) -> int:
    """How many a run needs."""
    return experiment.mesh.devices + experiment.asynchronous.sampler_devices


def on(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager:
    """What is traced inside is compiled for the mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def phase_loop(experiment: Experiment, index: int, mesh: jax.sharding.Mesh | None) -> tuple[loop.PhaseLoop, TrainState]:
    """The programs of a phase, not compiled yet, and the shapes of its first state.

    Args:
      index: of the phase.
    """
    phase = experiment.phases[index]
    one = loop.PhaseLoop(phase, experiment.task, Network(experiment.shape), workers=NoWorkers(), mesh=mesh,
                         shown_groups=experiment.run.shown_groups or 1, ahead=experiment.asynchronous,
                         offload=experiment.mesh.offload, batching=experiment.batching)
    return one, jax.eval_shape(one.initial_state, jax.random.key(0), session.first_shapes(experiment, phase.scale.seeds))


def needed(experiment: Experiment) -> int:
    """Bytes per device of the dearest phase."""
    mesh = mesh_of(experiment)
    with on(mesh):
        return max(_compiled(experiment, index, mesh) for index in range(len(experiment.phases)))


def _compiled(experiment: Experiment, index: int, mesh: jax.sharding.Mesh | None) -> int:
    one, state = phase_loop(experiment, index, mesh)
    one.prepare(state, one.asked())
    return _needed(one, state)


def _needed(one: loop.PhaseLoop, state: TrainState) -> int:
    """Bytes of the compiled step. A CPU's memory is its host's: what a device keeps there is taken off, down to the moment
    of the optimiser's step, when it has come back and the gradients are there."""
    held, away = _held(one, state)
    gradients = device_bytes(state.parameters, _shardings(one, state).parameters)
    together = sum(held.values()) + sum(away.values()) + gradients
    total = plan.needed_bytes(one)
    return max(total - sum(away.values()), together) if away else total


def footprint(experiment: Experiment, index: int) -> Footprint:
    """What one phase of a run holds and does on each device.

    Args:
      index: of the phase.
    """
    mesh = mesh_of(experiment)
    with on(mesh):
        one, state = phase_loop(experiment, index, mesh)
        prompts = one.asked()
        one.prepare(state, prompts)
        (held, away), total = _held(one, state), _needed(one, state)
        single, asked = plan.of_one(one, state, prompts)
        rollout = {} if one.phase.recipe.rollout is None else _caches(one, single, asked)
        update = {"gradients": device_bytes(single.parameters, _shardings(one, single).parameters),
                  "kept for the backward pass": _kept(one, single, asked)}
        seeds = one.phase.scale.seeds
        rollout, update = ({name: size * seeds for name, size in part.items()} for part in (rollout, update))
        room = total - sum(held.values()) - update["gradients"]  # XLA keeps less than is handed over, where it can
        update["kept for the backward pass"] = max(min(update["kept for the backward pass"], room), 0)
        known = sum(held.values()) + max(sum(rollout.values()), sum(update.values()))
        return Footprint(held=held, away=away, rollout=rollout, update=update, rest=total - known, total=total,
                         flops=_flops(one, state, prompts))


def device_bytes(tree: Any, shardings: Any) -> int:
    """Bytes of arrays or shapes on one device.

    Args:
      shardings: of every leaf; None: all on one device.
    """
    leaves = jax.tree.leaves(tree)
    where = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
    return sum(math.prod(a.shape if s is None else s.shard_shape(a.shape)) * a.dtype.itemsize
               for a, s in zip(leaves, where, strict=True))


def _shardings(one: loop.PhaseLoop, state: TrainState) -> TrainState:
    """Those of a state's parts, each None on one device."""
    if one.mesh is None:
        return dataclasses.replace(state, **{field.name: None for field in dataclasses.fields(state)})
    return one.shardings(state)


def _held(one: loop.PhaseLoop, state: TrainState) -> tuple[dict[str, int], dict[str, int]]:
    """By role, on the device and in its host's memory."""
    where, held, away = _shardings(one, state), {}, {}

    def add(name: str, of: str, tree: Any, shardings: Any) -> None:
        if tree:
            (away if of in one.offload else held)[name] = device_bytes(tree, shardings)

    for name in state.parameters:
        add(f"{name}, trained", "", state.parameters[name], where.parameters and where.parameters[name])
    add("optimiser", "optimiser", state.optimiser, where.optimiser)
    for name in state.frozen:
        add(f"{name}, frozen", name, state.frozen[name], where.frozen and where.frozen[name])
    add("carried from step to step", "", state.carried, where.carried)
    return held, away


def _caches(one: loop.PhaseLoop, state: TrainState, prompts: Prompts) -> dict[str, int]:
    network, policy = one.network, roles.policy(state)
    rows = prompts.lengths.shape[0] // (1 + one.phase.recipe.rollout.resample)

    def size(length: int) -> int:
        cache = jax.eval_shape(lambda p: network.empty_cache(p, rows, length), policy)
        cut, mesh = (), meshes.current()
        if mesh is not None:
            cut = *meshes.row_axes(rows), meshes.axis_of("tensor", network.shape.key_heads)
        return device_bytes(cache, None) // math.prod(mesh.shape[axis] for axis in cut if axis is not None)

    return {"prompt cache": size(one.task.prompt_length),
            "answer cache": size(one.task.completion_length) * one.phase.recipe.group_size}


def _kept(one: loop.PhaseLoop, state: TrainState, prompts: Prompts) -> int:
    """Bytes that the forward pass of one micro-batch keeps for the backward pass, weights that are held anyhow left out."""
    recipe, network = one.phase.recipe, one.network
    pieces = one.phase.scale.microbatches * recipe.schedule.minibatches
    temperature = 1.0 if recipe.rollout is None else recipe.rollout.temperature
    count = max(prompts.lengths.shape[0] // pieces, 1)
    part = jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *a.shape[1:]), a.dtype), prompts)
    policy_of = evaluate.make_evaluate(network, temperature)

    def seen(state: TrainState, prompts: Prompts):
        x = plan.blank_experience(one, state, prompts)
        whole = roles.whole(state.parameters, state.frozen)
        x = assemble.with_advantage(recipe, evaluate.with_models(recipe, network, policy_of, whole, state.frozen, x))
        return x, recipe.weighting(x), update.token_share(x)

    def forward(parameters: Parameters, frozen: Any, x: Any, weight: Any, share: Any):
        objective = roles.bound(evaluate.make_objective(recipe, network, temperature), frozen)
        return jax.vjp(lambda p: objective(p, x, weight, share)[0], parameters)[1]

    arguments = (state.parameters, state.frozen, *jax.eval_shape(seen, state, part))
    traced = _placed(one, state, forward, arguments).trace(*arguments)
    inner = traced.jaxpr.jaxpr
    given = set(inner.invars)
    where = jax.tree.leaves(traced.lower().compile().output_shardings)
    kept = [(v.aval, s) for v, s in zip(inner.outvars, where, strict=True) if isinstance(v, Var) and v not in given]
    return sum(math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize for a, s in kept)


def _placed(one: loop.PhaseLoop, state: TrainState, function: Any, arguments: tuple) -> Any:
    if one.mesh is None:
        return jax.jit(function)
    where, rows = one.shardings(state), meshes.rows_sharding(one.mesh)
    pieces = math.prod(one.mesh.shape[axis] for axis in meshes.ROWS)

    def lies(a: Any) -> jax.sharding.NamedSharding:
        fits = a.ndim and a.shape[0] % pieces == 0
        return rows if fits else meshes.whole(one.mesh)

    return jax.jit(function, in_shardings=(where.parameters, where.frozen, *jax.tree.map(lies, arguments[2:])))


def _flops(one: loop.PhaseLoop, state: TrainState, prompts: Prompts) -> dict[str, float]:
    """By part; rows, heads and inner width are cut over all devices, the optimiser's numbers as the weights are."""
    devices = 1 if one.mesh is None else one.mesh.size
    found = {}
    for row in plan.rows(one, state, prompts):
        if row.flops:
            found[row.phase] = row.flops * one.phase.scale.seeds / devices
    if one.mesh is not None:
        single = plan.of_one(one, state, prompts)[0].parameters
        share = device_bytes(single, one.shardings(state).parameters) / device_bytes(single, None)
        found["optimiser"] *= devices * share
    return found
