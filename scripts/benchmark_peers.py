"""A training step beside trl's and tunix's on the same work, in turns: the table of `benchmark.py peers`.

Every side is a process of its own (`peers/*_steps.py`) that waits while the others have their turn. Nothing is compared
before it is certain that all sides did the same work.
"""
import contextlib
import dataclasses
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import benchmark_table  # noqa: E402  (beside this file)
from peers import environment, turns  # noqa: E402  (beside this file)

from configs.benchmark import shared_toy  # noqa: E402
from rl_jax import experiment, sections  # noqa: E402

OURS = "rl_jax"
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
WARM_UP = 2  # turns of a step that are not measured: the first compiles, and JAX may compile again for the second
UPDATES_TO_LEARN, MEAN_OF = 20, 5  # from so many updates on, the last few rewards must lie above the first few
STEPS_TO_CHOOSE = 3  # at most, with each number of threads
STEPS_PER_TURN = {"first": 5, "tiny": 10, "vocabulary": 1}


@dataclasses.dataclass(frozen=True)
class Target:
    """How many times faster than a peer a step must be, and the largest share of its memory; None for no bound."""

    speed: float
    memory: float | None = None


TARGETS = {"first": {"trl": Target(1.7, 1.0), "tunix": Target(3.0, 1.0)},
           "tiny": {"trl": Target(4.0), "tunix": Target(6.0)},
           "vocabulary": {"trl": Target(3.0, 0.45), "tunix": Target(2.5, 0.25)}}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the turns of one side came to.

    Attributes:
      step_s: seconds per step, of each turn.
      start_s, first_s: seconds of building the work, and of the first turn, which compiles.
      peak_bytes: memory that the process held at most.
      updates: that were made in all.
      threads: with which the side was fastest; 0 where it has no choice.
    """

    step_s: tuple[float, ...]
    start_s: float
    first_s: float
    peak_bytes: float
    updates: int
    threads: int = 0

    @property
    def median_s(self) -> float:
        """Seconds per step."""
        return statistics.median(self.step_s)


def tables(wanted: Callable[[str], bool], repeats: int, environments: str = "") -> list[benchmark_table.Table]:
    """Seconds per step and peak memory of rl_jax, trl and tunix.

    Args:
      wanted: which workloads, by name.
      repeats: turns of each side.
      environments: see `peers.environment.python_of`.
    """
    import rich.console
    import rich.progress

    names = [name for name in TARGETS if wanted(name)]
    if not names:
        return []
    found = {}
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as progress:
        bar = progress.add_task("environments", total=len(names) * 3 * (1 + WARM_UP + repeats))

        def done(what: str) -> None:
            progress.update(bar, advance=1, description=what)

        pythons = {peer: environment.python_of(peer, environments) for peer in environment.PYTHONS}
        for name in names:
            config = sections.plain(shared_toy.get_config(name))
            with started(config, pythons, lambda side, name=name: done(f"{name}: {side}")) as sides:
                found[name] = measured(sides, work_of(config), STEPS_PER_TURN[name], repeats,
                                       lambda side, name=name: done(f"{name}: {side}"))
    return [table(found)]


def work_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """All numbers of a config that its work depends on, and the prompts' ids: what the peers build.

    Args:
      config: plain values.
    """
    parsed = experiment.parse(config)
    shape, optimiser, recipe = vars(parsed.shape), vars(parsed.phases[-1].optimiser), config["recipe"]["args"]
    sizes = ("vocabulary", "width", "layers", "heads", "key_heads", "head_size", "inner", "rotary_base", "norm_epsilon")
    rates = ("learning_rate", "beta1", "beta2", "epsilon", "weight_decay", "clip_norm")
    return {**{name: shape[name] for name in sizes}, **{name: optimiser[name] for name in rates},
            **{name: recipe[name] for name in ("group_size", "beta", "clip")},
            "prompts_per_step": config["scale"]["prompts_per_step"], "prompt_length": parsed.task.prompt_length,
            "completion_length": parsed.task.completion_length,
            "prompts": [list(example.prompt) for example in parsed.task.splits["train"]]}


@contextlib.contextmanager
def started(config: Mapping[str, Any], pythons: Mapping[str, pathlib.Path],
            done: Callable[[str], None]) -> Iterator[dict[str, turns.Side]]:
    """The processes of all sides, which have built their work; they end with the context.

    Args:
      config: the work, plain values.
      pythons: of the peers that take part, by name.
      done: told the side that is ready.
    """
    work = work_of(config)
    with contextlib.ExitStack() as stack:
        sides = {}
        for name, python in {OURS: pathlib.Path(sys.executable), **pythons}.items():
            ours = name == OURS
            variables = {**QUIET, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT) if ours else ""}
            command = (str(python), str(ROOT / "scripts" / "peers" / f"{name}_steps.py"))
            sides[name] = stack.enter_context(turns.Side(name, command, config if ours else work, variables))
            done(name)
        yield sides


def measured(sides: Mapping[str, turns.Side], work: Mapping[str, Any], steps: int, repeats: int,
             done: Callable[[str], None]) -> dict[str, Measured]:
    """What the sides come to, turn about, by name.

    Args:
      sides: which wait for their turns.
      work: of `work_of`.
      steps: of a turn.
      repeats: turns of each, besides those that warm up.
      done: told the side whose turn is over.

    Raises:
      ValueError: if a side did other work than the work given.
    """
    said: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    threads = {name: side.built["threads"][-1] for name, side in sides.items()}

    def turn(name: str, steps: int, threads: int) -> float:
        told = sides[name].turn(steps, threads)
        check_turn(name, work, told)
        said[name].append(told)
        return told["seconds"] / told["steps"]

    for number in range(WARM_UP + repeats):
        for name, side in sides.items():
            if number == WARM_UP and len(side.built["threads"]) > 1:
                threads[name] = min(side.built["threads"],
                                    key=lambda n, name=name: turn(name, min(steps, STEPS_TO_CHOOSE), n))
            turn(name, steps if number >= WARM_UP else 1, threads[name])
            done(name)
    check_sides({name: side.built for name, side in sides.items()}, said)
    return {name: _measured(side.built, said[name], repeats, threads[name]) for name, side in sides.items()}


def _measured(built: Mapping[str, Any], told: Sequence[Mapping[str, Any]], repeats: int, threads: int) -> Measured:
    return Measured(step_s=tuple(one["seconds"] / one["steps"] for one in told[-repeats:]), start_s=built["seconds"],
                    first_s=told[0]["seconds"], peak_bytes=told[-1]["peak_bytes"],
                    updates=sum(one["steps"] for one in told), threads=threads)


def check_turn(name: str, work: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Refuses a turn in which not exactly the tokens of its steps were generated.

    Raises:
      ValueError: saying how many they were.
    """
    each = work["prompts_per_step"] * work["group_size"] * work["completion_length"]
    if told["tokens"] != each * told["steps"]:
        raise ValueError(f"{name} generated {told['tokens']:,} tokens in {told['steps']} steps; the work is {each:,} a "
                         "step.")


def check_sides(built: Mapping[str, Mapping[str, Any]], said: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Refuses sides with networks of different sizes, or one whose weights stood still or which learned nothing.

    Args:
      built: what each side said at the start.
      said: what it said in its turns.

    Raises:
      ValueError: saying what differs.
    """
    if len({one["parameters"] for one in built.values()}) > 1:
        raise ValueError("the networks differ: " + ", ".join(f"{name} trains {one['parameters']:,} parameters"
                                                             for name, one in built.items()) + ".")
    for name, told in said.items():
        if any(a["weights"] == b["weights"] for a, b in zip([built[name], *told], told, strict=False)):
            raise ValueError(f"{name}: a turn left the weights as they were: {told[-1]['weights']}.")
        rewards = [reward for one in told for reward in one["rewards"]]
        first, last = statistics.fmean(rewards[:MEAN_OF]), statistics.fmean(rewards[-MEAN_OF:])
        if len(rewards) >= UPDATES_TO_LEARN and last <= first:
            raise ValueError(f"{name} learned nothing in {len(rewards)} updates: the mean reward was {first:.4f} in the "
                             f"first {MEAN_OF} and {last:.4f} in the last.")


def table(found: Mapping[str, Mapping[str, Measured]]) -> benchmark_table.Table:
    """Everything that was measured, beside the targets, by workload and side."""
    rows, missed = [], []
    for workload, sides in found.items():
        ours = sides[OURS]
        for name, one in sides.items():
            target = TARGETS[workload].get(name)
            numbers = (f"{one.median_s:.3g}", f"{min(one.step_s):.3g} to {max(one.step_s):.3g}")
            rest = (f"{one.peak_bytes / turns.MIB:,.0f}",)
            ends = (f"{one.first_s:.1f}", f"{one.start_s:.1f}", str(one.updates), str(one.threads or "default"))
            if target is None:
                rows.append((workload, name, *numbers, "", "", *rest, "", "", *ends))
                continue
            speed, share = one.median_s / ours.median_s, ours.peak_bytes / one.peak_bytes
            bound = "" if target.memory is None else f"at most {target.memory:g}x"
            rows.append((workload, f"{name} {environment.version(name)}", *numbers, f"{speed:.2f}x", f"{target.speed:g}x",
                         *rest, f"{share:.2f}x", bound, *ends))
            missed += _missed(f"{workload}, {name}", target, speed, share)
    columns = ("workload", "side", "s a step", "least to most", "of rl_jax's", "target", "peak, MiB", "rl_jax's of it",
               "target", "first turn, s", "start, s", "updates", "threads")
    return benchmark_table.Table(_caption(found), columns, tuple(rows), words=2, missed=tuple(missed))


def _missed(name: str, target: Target, speed: float, share: float) -> list[str]:
    slow = [f"{name}: {speed:.2f}x as fast, and the target is {target.speed:g}x"] if speed < target.speed else []
    large = target.memory is not None and share > target.memory
    return slow + ([f"{name}: {share:.2f}x of its memory, and the target is {target.memory:g}x"] if large else [])


def _caption(found: Mapping[str, Mapping[str, Measured]]) -> str:
    updates = min(one.updates for sides in found.values() for one in sides.values())
    learned = (f"the last {MEAN_OF} rewards above the first {MEAN_OF} wherever {UPDATES_TO_LEARN} updates were made"
               + ("" if updates >= UPDATES_TO_LEARN else " (not everywhere here)"))
    turns_made = len(next(iter(next(iter(found.values())).values())).step_s)
    versions = "; ".join(f"{peer}: " + ", ".join(f"{name} {version}" for name, version in environment.pins(peer).items())
                         for peer in environment.PYTHONS)
    return (f"{benchmark_table.circumstances()}; {versions}. GRPO with a reference, the same architecture, prompts, sizes "
            "and optimiser (`configs/benchmark/shared_toy.py`), float32, all on the CPU; trl with its default number of "
            f"threads or with one, whichever was faster. Medians of {turns_made} turns, which alternate between the three "
            "processes; the first turn compiles and is not among them. Memory is the most that each process held. Checked: "
            "the tokens of every step, equal numbers of parameters, weights that moved in every turn, and "
            f"{learned}.")
