"""Measurements that anyone can rerun; every speed claim of this repository is a row printed here.

python scripts/benchmark.py replicas   seeds=16 with steps_per_call=50 against 16 runs of single steps
python scripts/benchmark.py programs   two programs with the host scoring in between, against one with a callback
python scripts/benchmark.py recipes    a step of every recipe against a step of baselines.grpo, as many answers in each
python scripts/benchmark.py kernels    time and memory of every op of kernels_pallas; --write puts it into BENCHMARKS.md
python scripts/benchmark.py prefix     a step on one copy of each prompt, against a copy per completion; --write, too
python scripts/benchmark.py lengths    learning from answers of different lengths: whole rows, cut, packed; --write, too
python scripts/benchmark.py load       seconds and memory of loading a published checkpoint of 2 GB; --write, too
python scripts/benchmark.py memory     what training Qwen3-4B's shapes holds: all weights, or adapters; --write, too
python scripts/benchmark.py collectives  what devices compute and exchange as the mesh grows, table and plot; --write, too
python scripts/benchmark.py peers      a step beside trl's and tunix's on the same work, in turns; --write, too
python scripts/benchmark.py step       the phases of a step, each beside its floor, and what the host adds; --write, too
python scripts/benchmark.py rollout    tokens drawn per second beside what the device allows, 1 to 256 rows; --write, too
python scripts/benchmark.py scaling    a step as each of its sizes doubles, beside its FLOPs, table and plot; --write, too
python scripts/benchmark.py refill     answers of very different lengths in few slots, against all at once; --write, too

peers makes an environment for each peer (minutes, once); --environments=<folder with trl and tunix> takes what is there.
--only=<part of a row's name> measures just those rows: recipes --only=dr_grpo, kernels --only=policy_gate.
"""
# workers of a host verifier import this file: heavy imports stay inside the functions
import dataclasses
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence

from absl import app, flags, logging

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
_REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements per row; the median is printed.", lower_bound=1)
_ONLY = flags.DEFINE_string("only", "", "Measure the rows whose names hold this.")
_WRITE = flags.DEFINE_bool("write", False, "Replace the table in BENCHMARKS.md, where the program above says so.")
_ENVIRONMENTS = flags.DEFINE_string("environments", "", "peers: a folder with environments trl and tunix, used as they are.")
_CHECK = flags.DEFINE_bool("check", False, "Exit with 1 if a row misses its target.")


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: seconds of both sides (medians of alternating measurements) and their ratio."""

    name: str
    ours_s: float
    other_s: float
    target: float | None = None
    remark: str = ""

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.other_s / self.ours_s


def main(arguments: list[str]) -> None:
    """Prints the rows of one benchmark."""
    import benchmark_table

    from kernels_pallas import dispatch
    from rl_jax.train import machine

    logging.set_verbosity(logging.WARNING)
    machine.keep_memory()  # as scripts/train.py does
    compared, tabulated = {"replicas": replicas, "programs": programs, "recipes": recipes}, {
        "kernels": kernels, "prefix": prefix, "load": load, "memory": memory, "collectives": collectives, "step": step,
        "rollout": rollout, "scaling": scaling, "refill": refill, "lengths": lengths,
        "peers": peers}
    if len(arguments) != 2 or arguments[1] not in compared | tabulated:
        names = ",".join(compared | tabulated)
        sys.exit(f"usage: benchmark.py {{{names}}} [--only=] [--repeats=] [--check] [--write]")
    name = arguments[1]
    if _WRITE.value and (_ONLY.value or name not in tabulated):
        sys.exit(f"--write is for all rows of {' or '.join(tabulated)}: without --only.")
    tables = tabulated[name]() if name in tabulated else [_as_table(name, compared[name]())]
    if not any(table.rows for table in tables):
        sys.exit(f"no row of {name} has {_ONLY.value!r} in its name.")
    for table in tables:
        benchmark_table.show(table)
    if _WRITE.value:
        benchmark_table.write(f"{name} {dispatch.platform()}", tables)
    missed = [one for table in tables for one in table.missed]
    if _CHECK.value and missed:
        sys.exit("\n".join(["missed:", *missed]))


def _as_table(name, rows):
    """Comparisons as a table of text."""
    import benchmark_table

    cells = tuple((row.name, f"{row.ours_s * 1e3:.3f}", f"{row.other_s * 1e3:.3f}", f"{row.ratio:.2f}x",
                   "" if row.target is None else f"{row.target:g}x", row.remark) for row in rows)
    return benchmark_table.Table(
        f"{name}: {benchmark_table.circumstances()}",
        ("workload", "ours, ms", "other, ms", "ratio", "target", "remark"), cells,
        missed=tuple(row.name for row in rows if row.target is not None and row.ratio < row.target))


def _wanted(name):
    return _ONLY.value in name


def alternating(*sides: Callable[[], None]) -> list[float]:
    """Median seconds of each side, measured in turn so that a noisy machine is noisy for all."""
    for side in sides:
        side()
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(_REPEATS.value):
        for side, spent in zip(sides, times, strict=True):
            began = time.perf_counter()
            side()
            spent.append(time.perf_counter() - began)
    return [statistics.median(spent) for spent in times]


def replicas() -> Sequence[Row]:
    """Seconds per step of one run: 16 replicas, 50 steps a dispatch, against 16 runs of single steps in turn."""
    import jax

    from rl_jax.models.network import Network
    from rl_jax.models.shape import Shape
    from rl_jax.recipes.baselines import reinforce
    from rl_jax.tasks.toys import addmod, bandit

    version = tuple(int(part) for part in jax.__version__.split(".")[:2])
    rows = []
    for task, prompts, recipe, target in (
            (bandit.bandit((0.0, 0.5, 1.0, 0.2)), 1, reinforce.reinforce(8), 12 if version < (0, 11) else 30),
            (addmod.addmod(10), 8, reinforce.reinforce(8), None)):
        name = f"{task.name}, {prompts * 8} rows: 16 seeds x 50 steps"
        if not _wanted(name):
            continue
        network = Network(Shape(vocabulary=task.tokenizer.size, width=8, layers=1, heads=1, key_heads=1, head_size=8,
                                inner=16))
        ours, other = _replica_sides(task, network, recipe, prompts, seeds=16, steps=50)
        a, b = alternating(ours, other)
        rows.append(Row(name, a / 800, b / 800, target))
    return rows


def _replica_sides(task, network, recipe, prompts, *, seeds, steps):
    """Both sides through the training loop as users run it: data pipeline, transfers and dispatch included."""
    import jax

    from rl_jax.experiment import Phase, Scale
    from rl_jax.learner.optimiser import Optimiser
    from rl_jax.train import loop

    def ticks(**scale):
        phase = Phase(recipe, Optimiser(), Scale(steps=10_000_000, prompts_per_step=prompts, **scale))
        one = loop.PhaseLoop(phase, task, network, shown_groups=1)
        return one.ticks(one.initial_state(jax.random.key(0)), one.stream(0))

    wide, narrow = ticks(seeds=seeds, steps_per_call=steps), ticks()

    def run(side, calls):
        for _ in range(calls):
            tick = next(side)
        jax.block_until_ready((tick.state, tick.metrics))

    return lambda: run(wide, 1), lambda: run(narrow, seeds * steps)


def programs() -> Sequence[Row]:
    """Seconds per step of the quickstart's GRPO phase in the two-program mode, against the one-program mode."""
    import dataclasses as dc

    import jax

    from configs import quickstart
    from rl_jax import experiment
    from rl_jax.models.network import Network
    from rl_jax.train import loop, session

    name = "chain_sum, 128 x 8 answers, host verifier: split"
    if not _wanted(name):
        return []
    parsed = experiment.parse(quickstart.get_config())
    phase, network = parsed.phases[-1], Network(parsed.shape)
    with session.host_workers(parsed.task, parsed.run.workers) as workers:
        def ticks(program):
            endless = dc.replace(phase, scale=dc.replace(phase.scale, program=program, steps=10_000_000))
            one = loop.PhaseLoop(endless, parsed.task, network, workers=workers, shown_groups=1)
            return one.ticks(one.initial_state(jax.random.key(0)), one.stream(0))

        def run(side):
            for _ in range(10):
                tick = next(side)
            jax.block_until_ready((tick.state, tick.metrics))

        split, one = ticks("split"), ticks("one")
        ours, other = alternating(lambda: run(split), lambda: run(one))
    return [Row(name, ours / 10, other / 10)]


def recipes() -> Sequence[Row]:
    """Seconds per step of every recipe ("other") against baselines.grpo's ("ours"): `chain`, 256 answers a step."""
    import rich.progress

    from rl_jax import sections
    from rl_jax.models.network import Network
    from rl_jax.models.shape import Shape
    from rl_jax.tasks.toys import chain

    names = [name for name in sections.names("rl_jax.recipes") if _wanted(name)]
    task = chain.chain(8)
    network = Network(Shape(vocabulary=task.tokenizer.size, width=128, layers=2, heads=4, key_heads=2, head_size=32,
                            inner=256))
    grpo, rows = _stepper(task, network, "baselines.grpo")[1] if names else None, []
    for name in rich.progress.track(names, "recipes"):
        recipe, one = _stepper(task, network, name)
        ours, other = alternating(grpo, one)
        rows.append(Row(name, ours / 4, other / 4, remark=_unlike_grpo(recipe)))
    return rows


def _stepper(task, network, name):
    """A recipe with 8 answers to each of 32 prompts where it lets one choose, and a function that makes 4 steps."""
    import inspect

    import jax

    from rl_jax import sections
    from rl_jax.experiment import Phase, Scale
    from rl_jax.learner.optimiser import Optimiser
    from rl_jax.train import loop

    factory = sections.find("recipe", "rl_jax.recipes", name)
    recipe = factory(**{"group_size": 8} if "group_size" in inspect.signature(factory).parameters else {})
    phase = Phase(recipe, Optimiser(), Scale(steps=10_000_000, prompts_per_step=256 // recipe.group_size))
    one = loop.PhaseLoop(phase, task, network, shown_groups=1)
    ticks = one.ticks(one.initial_state(jax.random.key(0)), one.stream(0))

    def four_steps():
        for _ in range(4):
            tick = next(ticks)
        jax.block_until_ready((tick.state, tick.metrics))

    return recipe, four_steps


def _unlike_grpo(recipe):
    """What a recipe does per batch that baselines.grpo does not, or the other way round."""
    found = [] if recipe.schedule.updates == 1 else [f"{recipe.schedule.updates} optimiser steps"]
    found += [f"+{model}" for model in recipe.models if model != "reference"]
    found += [] if "reference" in recipe.models else ["no reference"]
    found += [f"+view {name}" for name in recipe.views]
    if recipe.rollout is None:
        return ", ".join([*found, "draws nothing"])
    found += [f"up to {1 + recipe.rollout.resample} waves of prompts"] if recipe.rollout.resample else []
    found += [f"{recipe.rollout.replay} earlier batches"] if recipe.rollout.replay else []
    found += [f"windows of {recipe.rollout.window} tokens"] if recipe.rollout.window else []
    found += ["no shared prompts"] if recipe.group_size == 1 else []
    return ", ".join(found)


def kernels():
    """Time and memory of every op (`benchmark_kernels`)."""
    import benchmark_kernels

    from kernels_pallas import dispatch

    return benchmark_kernels.tables(benchmark_kernels.SIZES[dispatch.platform()], alternating, _wanted)


def prefix():
    """A step on one copy of each prompt against a copy per completion (`benchmark_prefix`)."""
    import benchmark_prefix

    from kernels_pallas import dispatch

    return benchmark_prefix.tables(benchmark_prefix.SIZES[dispatch.platform()], alternating, _wanted)


def lengths():
    """Learning from answers of different lengths, in every shape (`benchmark_lengths`)."""
    import benchmark_lengths

    from kernels_pallas import dispatch

    return benchmark_lengths.tables(benchmark_lengths.SIZES[dispatch.platform()], alternating, _wanted)


def load():
    """Time and memory of loading a published checkpoint (`benchmark_load`)."""
    import benchmark_load

    return benchmark_load.tables(benchmark_load.SIZES, _wanted)


def memory():
    """What training holds on a device, all weights against adapters (`benchmark_memory`)."""
    import benchmark_memory

    return benchmark_memory.tables(benchmark_memory.SIZES, _wanted)


def collectives():
    """FLOPs and bytes exchanged per device as the mesh grows (`benchmark_collectives`)."""
    import benchmark_collectives

    return benchmark_collectives.tables(_wanted, plot=_WRITE.value)


def step():
    """The phases of a step, each beside its floor (`benchmark_step`)."""
    import benchmark_step

    return benchmark_step.tables(benchmark_step.workloads(), alternating, _wanted)


def rollout():
    """Tokens drawn per second beside what the device allows (`benchmark_rollout`)."""
    import benchmark_rollout

    return benchmark_rollout.tables(benchmark_rollout.SIZES, alternating, _wanted)


def scaling():
    """A step as each of its sizes doubles, beside its FLOPs (`benchmark_scaling`)."""
    import benchmark_scaling

    return benchmark_scaling.tables(benchmark_scaling.BASE, alternating, _wanted, plot=_WRITE.value)


def refill():
    """Tokens per second of answers in few slots against all at once (`benchmark_refill`)."""
    import benchmark_refill

    from kernels_pallas import dispatch

    return benchmark_refill.tables(benchmark_refill.SIZES[dispatch.platform()], alternating, _wanted)


def peers():
    """A step beside those of trl and tunix (`benchmark_peers`)."""
    import benchmark_peers

    return benchmark_peers.tables(_wanted, _REPEATS.value, _ENVIRONMENTS.value)


if __name__ == "__main__":
    app.run(main)
