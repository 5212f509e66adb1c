"""A comparison as one figure and one table: `compare.png`, and `compare.html` that holds both and loads nothing."""
import base64
import html
import importlib.resources
import io
import math
import os
import pathlib
import string
from collections.abc import Mapping, Sequence

import rich.table
import rich.text
from matplotlib import figure as figures

from rl_jax.comparison import Comparison
from rl_jax.train import curves as of_replicas
from rl_jax.train.curves import Curve, Row

# Okabe and Ito's colours, told apart by colour-blind people; without the yellow, which is not seen on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--", ":", "-.")
INK, SOFT, LINE = "#1d1f23", "#63676f", "#e2e0da"


def figure(curves: Mapping[str, Curve], title: str = "") -> figures.Figure:
    """Mean score over steps, a line per recipe with a band of one standard error over replicas, named at its end.

    Args:
      curves: by recipe.
      title: what is seen.
    """
    steps, replicas = next(iter(curves.values())).score.shape
    window = of_replicas.window_of(steps)
    drawn = figures.Figure(figsize=(8.4, 4.6), dpi=90, layout="constrained")
    axes = drawn.add_subplot()
    ends = []
    for number, (name, curve) in enumerate(curves.items()):
        mean, error = of_replicas.mean_and_error(of_replicas.running_mean(curve.score, window))
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
        axes.plot(range(1, steps + 1), mean, style, color=colour, linewidth=1.9)
        axes.fill_between(range(1, steps + 1), mean - error, mean + error, color=colour, alpha=0.18, linewidth=0)
        ends.append((float(mean[-1]), name, colour))
    axes.set_xlim(1, max(steps, 2))
    _name_ends(axes, sorted(ends), steps)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_xlabel("step", color=SOFT)
    axes.set_ylabel(f"mean score of the drawn answers\n(running mean over {window} steps, ± 1 standard error)",
                    color=SOFT)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.tick_params(colors=SOFT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    return drawn


def budget(comparison: Comparison) -> str:
    """What every recipe was given, in one line."""
    scale = comparison.scale
    return (f"Learning {comparison.task.name}: {scale.steps} steps of {scale.answers_per_step} answers for each "
            f"recipe, {scale.seeds} replica{'s' if scale.seeds > 1 else ''}")


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as it takes to be `gap` apart, each crowd staying around its mean.

    Args:
      heights: in ascending order.
      gap: the smallest allowed distance between neighbours.
    """
    crowds: list[list[float]] = []  # of heights less what the gaps below them add: a crowd has one mean of those
    for number, height in enumerate(heights):
        crowds.append([height - gap * number])
        while len(crowds) > 1 and _mean(crowds[-2]) > _mean(crowds[-1]):
            crowds[-2:] = [crowds[-2] + crowds[-1]]
    level = [_mean(crowd) for crowd in crowds for _ in crowd]
    return [base + gap * number for number, base in enumerate(level)]


def cells(rows: Sequence[Row], baseline: str) -> tuple[list[str], list[list[str]]]:
    """The table's heads and its cells as text; optimiser steps and skipped updates are shown where they say something.

    Args:
      rows: from `curves.table`.
      baseline: the recipe that the others are compared with.
    """
    columns = {
        "recipe": [row.name for row in rows],
        "score": [_with_error(row.score, row.score_stderr) for row in rows],
        "share": ["" if math.isnan(row.share) else f"{100 * row.share:.0f} %" for row in rows],
        "difference": ["" if row.name == baseline else _with_error(row.difference, row.difference_stderr, "+")
                       for row in rows],
        "half way": ["never" if row.half_way is None else f"{row.half_way}" for row in rows],
        "step": [_seconds(row.step_s) for row in rows],
        "answers": [f"{row.answers:,.0f}" for row in rows]}
    if len({row.updates for row in rows}) > 1:
        columns["updates"] = [f"{row.updates:,}" for row in rows]
    if any(row.skipped for row in rows):
        columns["skipped"] = [f"{row.skipped}" for row in rows]
    return list(columns), [list(line) for line in zip(*columns.values(), strict=True)]


def legend(curves: Mapping[str, Curve], baseline: str) -> str:
    """What the lines, the bands and the columns are.

    Args:
      curves: by recipe.
      baseline: the recipe that the others are compared with.
    """
    replicas = next(iter(curves.values())).score.shape[1]
    lines = "One run of each recipe: nothing is known of its error."
    if replicas > 1:
        lines = (f"Lines are means over {replicas} replicas, bands and errors ± 1 standard error over them (they see the "
                 "same prompts, so it is the error of weights and draws).")
    return (f"{lines} score: over the last tenth of the steps; share, difference: of and from that of {baseline}, the "
            "difference replica by replica; half way: step at which the running mean is half way from the first step's "
            "score to the best; step: median time, of all replicas that are trained side by side; answers: asked per "
            "replica; updates: optimiser steps; skipped: updates whose gradient was not finite.")


def printed(rows: Sequence[Row], baseline: str) -> rich.table.Table:
    """The table for a terminal or a notebook.

    Args:
      rows: from `curves.table`.
      baseline: the recipe that the others are compared with.
    """
    heads, body = cells(rows, baseline)
    shown = rich.table.Table(box=None, pad_edge=False)
    for number, head in enumerate(heads):
        shown.add_column(head, justify="right" if number else "left", no_wrap=number > 0)
    for line in body:
        shown.add_row(*map(rich.text.Text, line))
    return shown


def write(workdir: pathlib.Path | str, comparison: Comparison, curves: Mapping[str, Curve]) -> pathlib.Path:
    """Writes `compare.png` and `compare.html` and returns the path of the page.

    Args:
      workdir: of the comparison.
      curves: from `compare.run`.
    """
    workdir, about = pathlib.Path(workdir), budget(comparison)
    picture = io.BytesIO()
    figure(curves, about).savefig(picture, format="png", dpi=160)
    heads, body = cells(of_replicas.table(curves, comparison.reference), comparison.reference)
    notes = of_replicas.skips(curves)
    page = string.Template((importlib.resources.files("rl_jax.train") / "compare_page.html").read_text("utf-8"))
    text = page.substitute(
        title=html.escape(workdir.resolve().name), budget=html.escape(about),
        legend=html.escape(legend(curves, comparison.reference)),
        picture=base64.b64encode(picture.getvalue()).decode(),
        described=html.escape(f"Mean score over steps of {', '.join(curves)}; the last values are in the table."),
        heads="".join(f"<th>{html.escape(head)}</th>" for head in heads),
        rows="\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in body),
        notes="\n".join(f"<li>{html.escape(note)}</li>" for note in notes or ["No update was skipped."]))
    for name, content in (("compare.png", picture.getvalue()), ("compare.html", text.encode())):
        unfinished = workdir / f"{name}.unfinished"
        unfinished.write_bytes(content)
        os.replace(unfinished, workdir / name)
    return workdir / "compare.html"


def _name_ends(axes, ends, steps):
    """Names beside the ends of the lines, moved apart where they would touch, with a lead to the line each."""
    low, high = axes.get_ylim()
    gap = 0.052 * (high - low)
    for (height, name, colour), place in zip(ends, spread([height for height, *_ in ends], gap), strict=True):
        axes.annotate(name, (steps, height), xytext=(1.035, (place - low) / (high - low)), textcoords="axes fraction",
                      va="center", fontsize=9.5, color=INK, annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1.4, "shrinkA": 2, "shrinkB": 0,
                                  "relpos": (0, 0.5)})


def _mean(values):
    return sum(values) / len(values)


def _with_error(value, error, sign=""):
    return f"{value:{sign}.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def _seconds(value):
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"
