"""The time of a step as each of its sizes doubles, beside its FLOPs: table and plot of `benchmark.py scaling`."""
import dataclasses
import pathlib
from collections.abc import Callable

import benchmark_floor
import benchmark_step
import benchmark_table
import rich.console
import rich.progress

from rl_jax.experiment import Phase, Scale
from rl_jax.learner.optimiser import Optimiser
from rl_jax.models.network import Network
from rl_jax.models.shape import Shape
from rl_jax.recipes.baselines import grpo
from rl_jax.tasks.toys import evens
from rl_jax.train import loop

DOUBLINGS, SHORTEST_S, NOISE = 4, 0.1, 1.1
AXES = ("prompts", "answers per prompt", "answer tokens", "prompt tokens", "vocabulary")
PLOT = pathlib.Path(__file__).resolve().parent.parent / "benchmarks" / "scaling.svg"
BASE = benchmark_floor.Work(Shape(vocabulary=512, width=128, layers=2, heads=4, key_heads=2, head_size=32, inner=512),
                            prompts=2, group=2, prompt_tokens=16, tokens=16)
Clock = Callable[..., list[float]]  # sides -> median seconds of each, measured in turn


@dataclasses.dataclass(frozen=True)
class Growth:
    """One size at its doublings, from the base on: seconds of a step, and its FLOPs."""

    axis: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    flops: tuple[int, ...]


def tables(base: benchmark_floor.Work, clock: Clock, wanted: Callable[[str], bool], *,
           plot: bool = False) -> list[benchmark_table.Table]:
    """Growth of the time and of the FLOPs with every doubling of every size.

    Args:
      base: the smallest step.
      clock: alternates between the functions that it is given.
      wanted: which sizes, by name.
      plot: whether to draw them, too, into benchmarks/scaling.svg.
    """
    axes = [axis for axis in AXES if wanted(axis)]
    if not axes:
        return []
    shown = rich.progress.track(axes, "sizes", console=rich.console.Console(stderr=True))
    made: dict[benchmark_floor.Work, benchmark_step.Side] = {}
    found = [_growth(base, axis, clock, made) for axis in shown]
    if plot:
        draw(found, PLOT)
    shape = base.shape
    caption = (f"{benchmark_table.circumstances()}: steps of baselines.grpo with its reference and AdamW, through the "
               f"training loop; {shape.layers} layers of width {shape.width}, float32. Each size doubles by itself, from "
               f"{base.prompts} prompts x {base.group} answers of {base.tokens} tokens to prompts of {base.prompt_tokens}, "
               f"V = {shape.vocabulary:,}. FLOPs are those of matrix products, every prompt once. A row misses its target "
               f"where the time grows by more than {NOISE:g} times what the FLOPs do.")
    columns = "size", "from", "to", "ms", "ms, doubled", "time", "FLOPs", "time / FLOPs"
    lines = [(growth.axis, line) for growth in found for line in doublings(growth)]
    missed = tuple(f"{axis} from {line[0]} to {line[1]}: the time grows {line[4]}, the FLOPs {line[5]}"
                   for axis, line in lines if not float(line[6]) <= NOISE)
    return [benchmark_table.Table(caption, columns, tuple((axis, *line) for axis, line in lines), missed=missed)]


def doublings(growth: Growth) -> list[tuple[str, ...]]:
    """The lines of one size: from, to, both times, how much time and FLOPs grow, and the ratio of that."""
    lines = []
    for i in range(len(growth.sizes) - 1):
        a, b = growth.seconds[i:i + 2]
        predicted = growth.flops[i + 1] / growth.flops[i]
        lines.append((f"{growth.sizes[i]:,}", f"{growth.sizes[i + 1]:,}", f"{a * 1e3:,.2f}", f"{b * 1e3:,.2f}",
                      f"{b / a:.2f}x", f"{predicted:.2f}x", f"{b / a / predicted:.2f}"))
    return lines


def _growth(base: benchmark_floor.Work, axis: str, clock: Clock,
            made: dict[benchmark_floor.Work, benchmark_step.Side]) -> Growth:
    """Measures the step at every doubling; adds the sides that it compiles to those that were made before."""
    works = [grown(base, axis, 2**i) for i in range(DOUBLINGS + 1)]
    for work in works:
        if work not in made:
            made[work] = benchmark_step.repeated(benchmark_step.step_of(_loop(work)), at_least=SHORTEST_S, fewest=2)
    sides = [made[work] for work in works]
    spent = clock(*(side.run for side in sides))
    return Growth(axis, tuple(size(work, axis) for work in works),
                  tuple(total / side.times for total, side in zip(spent, sides, strict=True)),
                  tuple(sum(benchmark_floor.of_step(work).values()) for work in works))


def size(work: benchmark_floor.Work, axis: str) -> int:
    """One of the AXES."""
    return {"prompts": work.prompts, "answers per prompt": work.group, "answer tokens": work.tokens,
            "prompt tokens": work.prompt_tokens, "vocabulary": work.shape.vocabulary}[axis]


def grown(base: benchmark_floor.Work, axis: str, times: int) -> benchmark_floor.Work:
    """The work with one of the AXES so many times as large."""
    new = times * size(base, axis)
    if axis == "vocabulary":
        return dataclasses.replace(base, shape=dataclasses.replace(base.shape, vocabulary=new))
    fields = {"prompts": "prompts", "answers per prompt": "group", "answer tokens": "tokens",
              "prompt tokens": "prompt_tokens"}
    return dataclasses.replace(base, **{fields[axis]: new})


def _loop(work: benchmark_floor.Work) -> loop.PhaseLoop:
    task = evens.evens(work.shape.vocabulary, prompt_length=work.prompt_tokens, completion_length=work.tokens)
    phase = Phase(grpo.grpo(work.group), Optimiser(), Scale(steps=10_000_000, prompts_per_step=work.prompts))
    return loop.PhaseLoop(phase, task, Network(work.shape), shown_groups=1)


def draw(found: list[Growth], path: pathlib.Path) -> None:
    """A panel for each size: the time as it grows, and as it would with the FLOPs."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "scaling"
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(2.4 * len(found), 2.6), layout="constrained", sharey=True,
                                  squeeze=False)
    for axes, growth in zip(panels[0], found, strict=True):
        axes.plot(growth.sizes, [seconds / growth.seconds[0] for seconds in growth.seconds], "o-", label="time")
        axes.plot(growth.sizes, [flops / growth.flops[0] for flops in growth.flops], "k--", label="FLOPs")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(growth.sizes, [f"{n}" for n in growth.sizes])
        axes.set_yticks([1, 2, 4, 8, 16], ["1x", "2x", "4x", "8x", "16x"])
        axes.set(xlabel=growth.axis)
        axes.grid(alpha=0.3)
    panels[0][0].legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
