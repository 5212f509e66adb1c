"""What a step will cost, from XLA's own analysis, before the first one runs."""
import dataclasses
import os
from typing import Any

import jax
import rich.table

from rl_jax.learner import ask as asking
from rl_jax.learner import assemble, evaluate, roles, update
from rl_jax.learner.step import SEED_AXIS
from rl_jax.train import flops
from rl_jax.train.loop import PhaseLoop
from rl_jax.types import Experience, Prompts, TrainState

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Row:
    """One phase of the step: floating-point operations, and bytes read and written or held."""

    phase: str
    flops: float
    bytes: float


def rows(loop: PhaseLoop, state: TrainState, prompts: Prompts) -> list[Row]:
    """FLOPs and bytes per part of one step of one replica, then the bytes that are held.

    Parts are analysed before XLA fuses them: bytes are those read and written by the unfused operations, an upper bound
    but for the rounds of loops, which count once. Decoding is one step times the budget T (the loop may stop earlier).
    What is held is of the compiled program.

    Args:
      state, prompts: arrays or shapes of one dispatch.
    """
    scale = loop.phase.scale
    compiled = loop.prepare(state, prompts)
    state, prompts = of_one(loop, state, prompts)
    found = []
    if loop.phase.recipe.rollout is not None:
        found += _rollout(loop, state, _first(prompts, scale.prompts_per_step))
    found += _learning(loop, state, prompts)
    held = {"held: parameters": state.parameters, "held: optimiser": state.optimiser, "held: frozen": state.frozen}
    found += [Row(name, 0.0, _size(tree) * scale.seeds) for name, tree in held.items()]
    return found + [Row(f"held: temporaries ({name})", 0.0, float(program.memory_analysis().temp_size_in_bytes))
                    for name, program in compiled.items()]


def of_one(loop: PhaseLoop, state: TrainState, prompts: Prompts) -> tuple[TrainState, Prompts]:
    """Shapes of one step of one replica, from those of a dispatch."""
    scale = loop.phase.scale
    if scale.seeds > 1:
        state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), state)
    if scale.steps_per_call > 1:
        prompts = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), prompts)
    return state, prompts


def needed_bytes(loop: PhaseLoop) -> int:
    """Arguments, results and temporaries of the largest compiled program, donated memory counted once."""
    def total(analysis):
        return (analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
                - analysis.alias_size_in_bytes)

    return max(total(program.memory_analysis()) for program in loop.compiled.values())


def check_memory(loop: PhaseLoop) -> None:
    """Refuses a step that cannot fit.

    Raises:
      ValueError: what is needed, what there is, and which knobs help.
    """
    scale = loop.phase.scale
    limit = scale.memory_limit_gib * GIB or device_bytes()
    needed = needed_bytes(loop)
    if needed > limit:
        raise ValueError(
            f"the step of {loop.phase.recipe.name} needs {needed / GIB:.2f} GiB and {limit / GIB:.2f} GiB are allowed. "
            f"Raise scale.microbatches (now {scale.microbatches}), set model.remat=True, or lower "
            f"scale.prompts_per_step (now {scale.prompts_per_step}), scale.seeds (now {scale.seeds}) or the task's "
            "prompt_length and completion_length. scale.memory_limit_gib sets the limit.")


def device_bytes() -> int:
    """Memory of the first device; of the machine, where the device is its CPU."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def table(found: list[Row], title: str) -> rich.table.Table:
    """The rows for the terminal."""
    shown = rich.table.Table(title=title, title_justify="left")
    shown.add_column("part of the step")
    shown.add_column("GFLOP", justify="right")
    shown.add_column("MiB", justify="right")
    for row in found:
        shown.add_row(row.phase, f"{row.flops / 1e9:.3f}" if row.flops else "", f"{row.bytes / 2**20:.2f}")
    return shown


def _rollout(loop: PhaseLoop, state: TrainState, prompts: Prompts) -> list[Row]:
    network, count = loop.network, prompts.lengths.shape[0]
    rows_of_group = count * loop.phase.recipe.group_size
    policy, length = roles.policy(state), loop.task.completion_length

    def prefill(policy, tokens):
        return network.prefill(policy, tokens)[0]

    def decode(policy, prompt_cache, cache, token, lengths, now):
        turns = network.turns(prompts.tokens.shape[1] + length)
        hidden, cache, _ = network.decode(policy, prompt_cache, cache, token, lengths, now, turns)
        return network.logits(hidden, network.vocabulary(policy)), cache

    one_per_prompt = (policy, jax.eval_shape(prefill, policy, prompts.tokens),
                      jax.eval_shape(lambda p: network.empty_cache(p, count, length), policy),
                      prompts.lengths, prompts.lengths, jax.ShapeDtypeStruct((), "int32"))
    first = _analysed("prefill", prefill, policy, prompts.tokens)
    step = _analysed(f"decode, {length} steps", decode, *one_per_prompt)
    times = length * rows_of_group / count
    return [first, Row(step.phase, step.flops * times, step.bytes * times)]


def _learning(loop: PhaseLoop, state: TrainState, prompts: Prompts) -> list[Row]:
    recipe = loop.phase.recipe
    temperature = 1.0 if recipe.rollout is None else recipe.rollout.temperature
    policy_of = evaluate.make_evaluate(loop.network, temperature)
    x = jax.eval_shape(lambda s, p: blank_experience(loop, s, p), state, prompts)
    found, whole = [], roles.whole(state.parameters, state.frozen)
    for role in recipe.models:
        of_role = role in ("reference", "teacher")
        weights = {"policy": roles.frozen_weights(role, state.frozen)} if of_role else whole
        found.append(_analysed(f"{role} forward", policy_of, weights, x))

    def gradient(parameters, frozen, x):
        whole = roles.whole(parameters, frozen)
        full = evaluate.with_models(recipe, loop.network, policy_of, whole, frozen, x)
        gradient_of = update.make_gradient(recipe, roles.bound(policy_of, frozen))
        return gradient_of(parameters, assemble.with_advantage(recipe, full))

    forwards = sum(row.flops for row in found), sum(row.bytes for row in found)
    whole = _analysed("update: forward and backward", gradient, state.parameters, state.frozen, x)
    passes = recipe.schedule.epochs
    found.append(Row(whole.phase, (whole.flops - forwards[0]) * passes, max(whole.bytes - forwards[1], 0.0) * passes))

    def apply(gradient, optimiser, parameters):
        return loop.optimiser.update(gradient, optimiser, parameters)

    step = _analysed("optimiser", apply, state.parameters, state.optimiser, state.parameters)
    times = recipe.schedule.updates
    return [*found, Row(step.phase, step.flops * times, step.bytes * times)]


def blank_experience(loop: PhaseLoop, state: TrainState, prompts: Prompts) -> Experience:
    """What is drawn and scored in one step of one replica, to be traced for its shapes."""
    uniforms = loop.pieces.uniforms(state.key, state.step, prompts.lengths.shape[0])
    # the replicas' axis must have a name here too: the sampling loop asks it whether any is unfinished
    ask = jax.vmap(loop.pieces.ask, in_axes=None, out_axes=None, axis_name=SEED_AXIS, axis_size=1)
    prompts, samples, verdict, *_ = ask(state, prompts, uniforms, state.step)
    coefficients = asking.coefficients_of(loop.phase.recipe, state.control)
    return assemble.experience(prompts, samples, verdict, coefficients=coefficients)


def _analysed(name: str, function: Any, *shapes: Any) -> Row:
    traced = jax.jit(function).trace(*shapes)
    cost = traced.lower().cost_analysis() or {}
    return Row(name, flops.count(traced.jaxpr), float(cost.get("bytes accessed", 0.0)))


def _first(prompts: Prompts, count: int) -> Prompts:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *a.shape[1:]), a.dtype), prompts)


def _size(tree: Any) -> float:
    return float(sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree)))
