"""A step's phases, each beside the least that it must compute or move: the tables of `benchmark.py step`."""
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import benchmark_floor
import benchmark_table
import jax
import jax.numpy as jnp
import ml_collections
import rich.console
import rich.progress

from configs.benchmark import shared_toy
from rl_jax import experiment
from rl_jax.learner import assemble, evaluate, update
from rl_jax.models import shape as shapes
from rl_jax.models.network import Network
from rl_jax.rollout import decode
from rl_jax.tasks import judge
from rl_jax.train import loop

SHORTEST_PHASE_S, SHORTEST_STEPS_S = 0.02, 1.0
Clock = Callable[..., list[float]]  # sides -> median seconds of each, measured in turn


@dataclasses.dataclass(frozen=True)
class Targets:
    """The most that a step may take, of its floor, and the largest share of it that may be the host's; None: any."""

    step: float | None = None
    gap: float | None = None


TARGETS = {"first": Targets(step=1.35), "tiny": Targets(step=1.35, gap=0.02), "vocabulary": Targets(step=1.35)}


def workloads() -> dict[str, ml_collections.ConfigDict]:
    """The config of each workload, by name."""
    return {name: shared_toy.get_config(name) for name in shared_toy.TASK}


def tables(configs: dict[str, ml_collections.ConfigDict], clock: Clock,
           wanted: Callable[[str], bool]) -> list[benchmark_table.Table]:
    """One table for each workload.

    Args:
      configs: of the workloads, by name; a phase of one program, one replica and one update, of all weights, with a
        reference and a pure verifier.
      clock: alternates between the functions that it is given.
      wanted: which workloads, by name.
    """
    names = [name for name in configs if wanted(name)]
    shown = rich.progress.track(names, "workloads", console=rich.console.Console(stderr=True))
    return [_table(name, configs[name], TARGETS.get(name, Targets()), clock) for name in shown]


def _table(name: str, config: ml_collections.ConfigDict, targets: Targets, clock: Clock) -> benchmark_table.Table:
    parsed = experiment.parse(config)
    one = _loop(parsed)
    weights = jax.eval_shape(one.network.initialise, jax.random.key(0))
    work, rates = work_of(parsed), benchmark_floor.measured(shapes.parameter_count(weights))
    rows = phases(_seconds(one, clock), floors(work, rates))
    step, gap = rows[-1], rows[-3]
    missed = []
    if targets.step is not None and not step.seconds <= targets.step * step.floor:
        missed.append(f"{name}: a step takes {step.seconds / step.floor:.2f}x of its floor; target {targets.step:g}x")
    if targets.gap is not None and not gap.seconds < targets.gap * step.seconds:
        missed.append(f"{name}: the host gap is {gap.seconds / step.seconds:.1%} of a step; target {targets.gap:.0%}")
    wanted = {step.name: "" if targets.step is None else f"{targets.step:g}x",
              gap.name: "" if targets.gap is None else f"{targets.gap:.0%} of the step"}
    cells = tuple((*_cells(row, step.seconds), wanted.get(row.name, ""), row.bound) for row in rows)
    columns = "phase", "ms", "floor, ms", "of the floor", "of the step", "target", "remark"
    return benchmark_table.Table(_caption(name, parsed, work, rates), columns, cells, missed=tuple(missed))


def _loop(parsed: experiment.Experiment) -> loop.PhaseLoop:
    phase = parsed.phases[-1]
    endless = dataclasses.replace(phase, scale=dataclasses.replace(phase.scale, steps=10_000_000))
    return loop.PhaseLoop(endless, parsed.task, Network(parsed.shape), shown_groups=1, batching=parsed.batching)


def work_of(parsed: experiment.Experiment) -> benchmark_floor.Work:
    """What a step of the last phase does."""
    phase, task = parsed.phases[-1], parsed.task
    return benchmark_floor.Work(parsed.shape, phase.scale.prompts_per_step, phase.recipe.group_size, task.prompt_length,
                                task.completion_length)


def _caption(name: str, parsed: experiment.Experiment, work: benchmark_floor.Work, rates: benchmark_floor.Rates) -> str:
    shape, calls = work.shape, parsed.phases[-1].scale.steps_per_call
    copied = dataclasses.replace(work, prompts=work.rows, group=1)
    flops, of_copies = (sum(benchmark_floor.of_step(one).values()) / 1e9 for one in (work, copied))
    return (f"Workload `{name}`, {benchmark_table.circumstances()}: {shape.layers} layers of width {shape.width}, "
            f"V = {shape.vocabulary:,}, float32, {work.prompts} x {work.group} answers of {work.tokens} tokens to "
            f"prompts of {work.prompt_tokens}, {calls} step{'s' * (calls > 1)} a dispatch; {rates.words()}. "
            f"Floors are at these rates: FLOPs of the phase's matrix products ({flops:,.2f} GFLOP a step, every prompt "
            f"once; with a copy of it for each answer {of_copies:,.2f}), or bytes where they take longer. Phases are "
            "compiled apart; a step has more than the phases (random numbers, credit, metrics) and may be compiled into "
            "less. The host gap is a step of the loop less the compiled step called back to back.")


class Row(NamedTuple):
    """A line of the table; `floor` in seconds, nan where there is none."""

    name: str
    seconds: float
    floor: float
    bound: str


def floors(work: benchmark_floor.Work, rates: benchmark_floor.Rates) -> dict[str, tuple[float, str]]:
    """Seconds that each phase takes at least, and what binds it."""
    found = {name: (flops / rates.products, "arithmetic") for name, flops in benchmark_floor.of_step(work).items()}
    read = benchmark_floor.read_while_drawing(work) / rates.weights, "bandwidth"
    found["decoding"] = max(found["decoding"], read)
    found["optimiser"] = benchmark_floor.moved_by_adamw(rates.parameters) / rates.moments, "bandwidth"
    return found


def phases(seconds: dict[str, float], floor: dict[str, tuple[float, str]]) -> list[Row]:
    """The lines of the table; the last three are host gap, sum and step.

    Args:
      seconds: of "prefill", "draw" (prefill and decoding), "reward", "reference pass", "forward and backward",
        "optimiser", of the "program" of a step, and of a "step" of the loop.
      floor: from `floors`.
    """
    seconds = {**seconds, "decoding": seconds["draw"] - seconds["prefill"]}
    order = "prefill", "decoding", "reward", "reference pass", "forward and backward", "optimiser"
    rows = [Row(name, seconds[name], *floor.get(name, (math.nan, ""))) for name in order]
    rows.append(Row("host gap", seconds["step"] - seconds["program"], math.nan, ""))
    least = sum(at_least for at_least, _ in floor.values())
    rows.append(Row("sum of phases", sum(row.seconds for row in rows), least, ""))
    return [*rows, Row("step", seconds["step"], least, "")]


def _cells(row: Row, step: float) -> tuple[str, ...]:
    known = not math.isnan(row.floor)
    return (row.name, f"{row.seconds * 1e3:,.3f}", f"{row.floor * 1e3:,.3f}" if known else "",
            f"{row.seconds / row.floor:.2f}x" if known else "", f"{row.seconds / step:.1%}")


class Side(NamedTuple):
    """run() does the same `times` times and waits for it."""

    run: Callable[[], None]
    times: int


def repeated(call: Callable[[], Any], *, at_least: float, fewest: int = 1) -> Side:
    """A side that is measured for so long that the clock's grain and its own start do not matter.

    Args:
      call: returns arrays to wait for.
      at_least: seconds of a measurement.
      fewest: calls in it, however long they take.
    """
    jax.block_until_ready(call())
    began = time.perf_counter()
    jax.block_until_ready(call())
    times = max(fewest, min(50, math.ceil(at_least / (time.perf_counter() - began))))

    def run():
        for _ in range(times):
            out = call()
        jax.block_until_ready(out)

    return Side(run, times)


def alone(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with the wait for what it returns, so that calls which need nothing of each other do not overlap."""
    return lambda: jax.block_until_ready(call())


def _seconds(one: loop.PhaseLoop, clock: Clock) -> dict[str, float]:
    """Of every phase, of a step's compiled program and of a step of the loop, measured in turn."""
    sides = {name: repeated(alone(call), at_least=SHORTEST_PHASE_S) for name, call in _apart(one).items()}
    per_call = one.phase.scale.steps_per_call
    for name, call in ("step", step_of(one)), ("program", _program(one)):
        # from the second call on, the host prepares one while the device runs the one before
        sides[name] = repeated(call, at_least=SHORTEST_STEPS_S, fewest=2)
    spent = clock(*(side.run for side in sides.values()))
    calls = {name: side.times * (per_call if name in ("step", "program") else 1) for name, side in sides.items()}
    return {name: total / calls[name] for name, total in zip(sides, spent, strict=True)}


def step_of(one: loop.PhaseLoop) -> Callable[[], Any]:
    """A dispatch as training makes it: the data pipeline, the transfer, the compiled step."""
    ticks = one.ticks(one.initial_state(jax.random.key(0)), one.stream(0))

    def call():
        tick = next(ticks)
        return tick.state.step, tick.metrics

    return call


def _program(one: loop.PhaseLoop) -> Callable[[], Any]:
    """The same compiled step on prompts that are there already."""
    prompts = one.place(loop.batches(one.stream(0), one.phase.scale.steps_per_call))
    state = one.initial_state(jax.random.key(0))
    program = one.prepare(state, prompts)["step"]

    def call():
        nonlocal state
        state, metrics, _ = program(state, prompts)
        return state.step, metrics

    return call


def _apart(one: loop.PhaseLoop) -> dict[str, Callable[[], Any]]:
    """The phases of a step, each compiled for itself from the functions that the step is composed of."""
    recipe, network, task, pieces = one.phase.recipe, one.network, one.task, one.phase.scale.microbatches
    state, prompts = one.initial_state(jax.random.key(0)), jax.device_put(next(one.stream(0)))
    policy, version = state.parameters["policy"], jnp.zeros((), jnp.int32)
    uniforms = one.pieces.uniforms(state.key, version, prompts.lengths.shape[0])
    prefill, draw = jax.jit(network.prefill), jax.jit(draw_of(one))
    samples = draw(policy, prompts, uniforms, version)
    score = jax.jit(judge.pure(task.verifier))
    verdict = score(prompts, samples)
    policy_of = evaluate.make_evaluate(network, recipe.rollout.temperature)
    objective = evaluate.make_objective(recipe, network, recipe.rollout.temperature)
    drawn = assemble.experience(prompts, samples, verdict)

    def reference(parameters, frozen, x):
        return evaluate.with_models(recipe, network, policy_of, parameters, frozen, x, pieces)

    known = jax.jit(reference)(state.parameters, state.frozen, drawn)
    logp = jax.jit(lambda *given: reference(*given).given["reference_logp"])
    x = jax.jit(lambda x: assemble.with_advantage(recipe, x))(known)
    gradient = jax.jit(update.make_gradient(recipe, policy_of, pieces, objective))
    return {"prefill": lambda: prefill(policy, prompts.tokens),
            "draw": lambda: draw(policy, prompts, uniforms, version),
            "reward": lambda: score(prompts, samples),
            "reference pass": lambda: logp(state.parameters, state.frozen, drawn),
            "forward and backward": lambda: gradient(state.parameters, x),
            "optimiser": _optimiser_step(one, gradient(state.parameters, x)[0], x)}


def draw_of(one: loop.PhaseLoop) -> Callable[..., Any]:
    """Prefill and decoding of a phase, not compiled."""
    ends = one.task.tokenizer
    return decode.make_rollout(one.network, one.phase.recipe.rollout, completion_length=one.task.completion_length,
                               stop_ids=ends.stop_ids, pad_id=ends.pad_id)


def _optimiser_step(one: loop.PhaseLoop, gradient: Any, x: Any) -> Callable[[], Any]:
    """The update with the gradient given: that of a loss that is linear in the weights is its slope."""
    recipe = one.phase.recipe
    unused = evaluate.make_evaluate(one.network, recipe.rollout.temperature)

    def stepped(parameters, optimiser_state, gradient, x):
        def linear(parameters, x, weight, share):
            products = jax.tree.map(jnp.vdot, parameters, gradient)
            return sum(jax.tree.leaves(products)), {}

        return update.make_update(recipe, unused, one.optimiser, objective=linear)(parameters, optimiser_state, x)

    program, state = jax.jit(stepped, donate_argnums=(0, 1)), one.initial_state(jax.random.key(0))
    parameters, moments = state.parameters, state.optimiser

    def call():
        nonlocal parameters, moments
        parameters, moments, metrics = program(parameters, moments, gradient, x)
        return metrics

    return call
