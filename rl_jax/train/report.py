"""One self-contained HTML page about a run: curves, estimates, sampled groups, costs, configuration.

The page is read from what a run leaves behind (`metrics.jsonl`, and where they are there
`rollouts.jsonl`, `evaluation.json`, `plan.json`, `config.json`), holds everything inline, and
forbids itself the network.
"""
import dataclasses
import html
import importlib.resources
import json
import math
import os
import pathlib
import statistics
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rl_jax.train import metrics, progress

POINTS = 1500
GROUP_STEPS = 80
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Chart:
    """One set of axes.

    Attributes:
      title: what is shown.
      series: metric names drawn together.
      note: how to read it, one sentence.
      unit: of the vertical axis; "share" is shown in percent.
      log: logarithmic, when all values are positive and span more than a decade.
      smooth: whether a running mean says more than the values themselves.
    """

    title: str
    series: tuple[str, ...]
    note: str = ""
    unit: str = ""
    log: bool = False
    smooth: bool = True


CHARTS = (
    Chart("Reward", ("reward/mean", "reward/score"),
          "What the recipe learns from (mean) and what the verifier said (score)."),
    Chart("Validation pass@1", ("validation/pass@1",), "Held-out problems; the band is ± 1 standard error.", "share"),
    Chart("Pass rate", ("reward/solved",), "Share of sampled answers with a score of 1.", "share"),
    Chart("Loss", ("loss/total",), "Phases minimise different losses; compare within a phase."),
    Chart("Entropy", ("policy/entropy", "rollout/entropy"), "Per token; a fall to 0 is a collapse.", "nats"),
    Chart("KL", ("policy/kl_reference", "policy/kl_rollout"),
          "Distance to the reference, and to the weights that sampled.", "nats"),
    Chart("Clipped tokens", ("policy/clip_share",), "Tokens with credit whose loss has no gradient.", "share"),
    Chart("Probability ratio", ("policy/ratio_max", "policy/ratio_min"), "Extremes over the batch.", log=True),
    Chart("Gradient norm", ("gradient/norm",), "Before clipping.", log=True),
    Chart("Skipped updates", ("gradient/skipped",), "Updates whose gradient was not finite.", smooth=False),
    Chart("Sampler against learner", ("rollout/logp_gap_nats",),
          "Largest difference of the log-probabilities of the same tokens.", "nats", log=True),
    Chart("Load of the experts", ("routing/load", "routing/load_max"),
          "Of the busiest expert, where an even load is 1: mean over the layers, and the worst layer."),
    Chart("Answer length", ("rollout/length",), "", "tokens"),
    Chart("Answers that end", ("rollout/finished",), "The rest is cut off at the budget.", "share"),
    Chart("Failed verifications", ("reward/failed",), "Answers left out of the statistics, never scored 0.",
          smooth=False),
    Chart("Discarded groups", ("rollout/groups_discarded",), "Groups that the selection rejected."),
    Chart("Learning rate", ("optimiser/learning_rate",), smooth=False),
    Chart("Throughput", ("speed/tokens_per_s",), "", "tokens/s"),
    Chart("Time per step", ("speed/step_s",), "", "s"),
)


def write(workdir: str | pathlib.Path) -> pathlib.Path:
    """Writes `report.html` into a run's directory and returns its path.

    Args:
      workdir: holds `metrics.jsonl`; a run that is still going is fine.

    Raises:
      FileNotFoundError: there is no `metrics.jsonl`.
      ValueError: a file of the run is damaged.
    """
    workdir = pathlib.Path(workdir)
    if not (workdir / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{workdir} has no metrics.jsonl: give the --workdir of a run that has started.")
    content = payload(workdir)
    files = importlib.resources.files("rl_jax.train")
    parts = {name: (files / f"report_page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    page = string.Template(parts["html"]).substitute(
        title=html.escape(content["name"]), style=parts["css"], script=parts["js"], data=_for_script(content))
    path, unfinished = workdir / "report.html", workdir / "report.html.unfinished"
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def payload(workdir: pathlib.Path) -> dict[str, Any]:
    """Everything that the page shows, as plain values.

    Args:
      workdir: holds `metrics.jsonl`.
    """
    rows = _joined(metrics.rows(workdir / "metrics.jsonl"))
    config = _json(workdir / "config.json", {})
    evaluation = _json(workdir / "evaluation.json", [])
    sampled = workdir / "rollouts.jsonl"
    found, left_out = groups(metrics.rows(sampled), GROUP_STEPS) if sampled.is_file() else ([], 0)
    shown, per_point = thin(rows, POINTS)
    return {"name": workdir.resolve().name, "subtitle": _subtitle(config, rows), "tiles": tiles(rows, evaluation),
            "notes": notes(rows), "phases": _phases(rows), "per_point": per_point, "rows": shown,
            "charts": [dataclasses.asdict(chart) for chart in charts(rows)], "groups": found,
            "group_steps_left_out": left_out, "evaluation": evaluation, "plan": _json(workdir / "plan.json", []),
            "config": config}


def charts(rows: Sequence[Row]) -> list[Chart]:
    """The charts that a run has metrics for: the known ones, reward parts together, then one per other metric.

    Args:
      rows: of `metrics.jsonl`.
    """
    names = sorted({name for row in rows for name in row if name not in metrics.HEAD})
    known = {name for chart in CHARTS for name in chart.series}
    present = [dataclasses.replace(chart, series=tuple(name for name in chart.series if name in names))
               for chart in CHARTS if any(name in names for name in chart.series)]
    rest = [name for name in names if name not in known and not name.endswith("_stderr")]
    parts = tuple(name for name in rest if name.startswith("reward/"))
    if parts:
        after = sum(chart.title in ("Reward", "Validation pass@1", "Pass rate") for chart in present)
        present.insert(after, Chart("Reward parts", parts, "Mean over the scored answers."))
    return present + [Chart(name, (name,)) for name in rest if name not in parts]


def thin(rows: Sequence[Row], points: int) -> tuple[list[dict[str, Any]], int]:
    """Means over runs of neighbouring rows of one phase, so that about `points` are left, and how many went in each.

    Args:
      rows: of `metrics.jsonl`, in order.
      points: how many rows the page may hold.
    """
    per_point = max(1, math.ceil(len(rows) / points))
    runs: list[list[Row]] = []
    for row in rows:
        if not runs or len(runs[-1]) == per_point or runs[-1][0]["phase"] != row["phase"]:
            runs.append([])
        runs[-1].append(row)
    return [_mean_row(run) for run in runs], per_point


def groups(rows: Iterable[Row], steps: int) -> tuple[list[dict[str, Any]], int]:
    """Sampled answers by step and group, from at most `steps` steps spread evenly, and how many steps were left out.

    Args:
      rows: of `rollouts.jsonl`, in order.
      steps: how many steps the page may hold; the first and the last are kept.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for row in rows:
        step = by_step.setdefault(row["step"], {"step": row["step"], "phase": row.get("phase", ""), "groups": {}})
        group = step["groups"].setdefault(row.get("group", 0), {"prompt": row.get("prompt", ""), "samples": []})
        group["samples"].append({key: value for key, value in row.items()
                                 if key not in ("step", "phase", "group", "prompt")})
    found = [step | {"groups": list(step["groups"].values())} for step in by_step.values()]
    if len(found) <= steps:
        return found, 0
    kept = [found[round(i * (len(found) - 1) / (steps - 1))] for i in range(steps)]
    return kept, len(found) - steps


def tiles(rows: Sequence[Row], evaluation: Sequence[Row]) -> list[dict[str, str]]:
    """The few numbers at the top of the page, each with a label and a detail.

    Args:
      rows: of `metrics.jsonl`.
      evaluation: `{name, value, stderr}` each.
    """
    def tile(label, value, detail=""):
        return {"label": label, "value": value, "detail": detail}

    last = rows[-1] if rows else {"step": 0, "time_s": 0}
    shown = [tile("steps", f"{last['step']:,}", " → ".join(phase["name"] for phase in _phases(rows)))]
    if rows:
        shown.append(tile("time", progress.duration(last["time_s"])))
    for estimate in evaluation[:1]:
        if estimate["value"] is not None:
            error = "" if estimate["stderr"] is None else f"± {100 * estimate['stderr']:.1f} standard error"
            shown.append(tile(f"held-out {estimate['name']}", f"{100 * estimate['value']:.1f} %", error))
    validation = _values(rows, "validation/pass@1")
    if validation:
        best = max(validation, key=lambda point: point[1])
        shown.append(tile("best validation pass@1", f"{100 * best[1]:.1f} %",
                          f"at step {best[0]:,}, first {100 * validation[0][1]:.1f} %"))
    reward = [value for _, value in _values(rows, "reward/mean") or _values(rows, "reward/score")]
    if reward:
        tenth = max(1, len(reward) // 10)
        shown.append(tile("reward", f"{statistics.fmean(reward[-tenth:]):.3f}",
                          f"last tenth of the steps; first: {statistics.fmean(reward[:tenth]):.3f}"))
    speed = [value for _, value in _values(rows, "speed/tokens_per_s")]
    if speed:
        shown.append(tile("tokens/s", f"{statistics.median(speed):,.0f}", "median over steps"))
    return shown


def notes(rows: Sequence[Row]) -> list[str]:
    """What a careful reader would ask about: values that are not finite, skipped updates, failures, disagreement.

    Args:
      rows: of `metrics.jsonl`.
    """
    found = [] if rows else ["No step is done yet."]
    for name in sorted({name for row in rows for name in row}):
        wrong = [row["step"] for row in rows if row.get(name) in metrics.NOT_FINITE]
        if wrong and name != "phase":
            found.append(f"{name} is not finite in {len(wrong)} of {len(rows)} steps, first in step {wrong[0]}.")
    skipped = [step for step, value in _values(rows, "gradient/skipped") if value > 0]
    if skipped:
        found.append(f"Updates were skipped because the gradient was not finite, in {len(skipped)} steps, first in "
                     f"step {skipped[0]}.")
    failed = [(step, value) for step, value in _values(rows, "reward/failed") if value > 0]
    if failed:
        found.append(f"The verifier failed in {len(failed)} steps ({sum(value for _, value in failed):g} answers, left "
                     f"out of the statistics), first in step {failed[0][0]}.")
    gap = max(_values(rows, "rollout/logp_gap_nats"), key=lambda point: point[1], default=(0, 0.0))
    if gap[1] > 0.01:
        found.append(f"Sampler and learner disagree by up to {gap[1]:.2g} nats on the same token (step {gap[0]}).")
    return found


def _joined(rows):
    """Lines of the same step and phase as one row."""
    joined: list[dict[str, Any]] = []
    for row in rows:
        if joined and (joined[-1]["step"], joined[-1]["phase"]) == (row["step"], row["phase"]):
            joined[-1].update(row)
        else:
            joined.append(dict(row))
    return joined


def _mean_row(run):
    """The last row of a run with the mean of each metric's finite values; a name is kept if none is finite."""
    if len(run) == 1:
        return dict(run[0])
    mean = {key: run[-1][key] for key in metrics.HEAD}
    for name in sorted({name for row in run for name in row if name not in metrics.HEAD}):
        given = [row[name] for row in run if row.get(name) is not None]
        finite = [value for value in given if isinstance(value, (int, float))]
        mean[name] = statistics.fmean(finite) if finite else given[0] if given else None
    return mean


def _values(rows, name):
    """(step, value) where a metric is there and finite."""
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]


def _phases(rows):
    """Stretches of steps of one phase: name, first and last step, first and last time."""
    found: list[dict[str, Any]] = []
    for row in rows:
        if not found or found[-1]["name"] != row["phase"]:
            found.append({"name": row["phase"], "first": row["step"], "start_s": row["time_s"]})
        found[-1] |= {"last": row["step"], "end_s": row["time_s"]}
    return found


def _subtitle(config, rows):
    """Task and recipe where the configuration names them, and the phases."""
    named = [config[section].get("name") for section in ("task", "model", "recipe")
             if isinstance(config, dict) and isinstance(config.get(section), dict)]
    phases = " → ".join(phase["name"] for phase in _phases(rows))
    return " · ".join(str(part) for part in [*named, phases] if part)


def _json(path, otherwise):
    if not path.is_file():
        return otherwise
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): repair or remove it.") from error


def _for_script(content):
    """JSON that cannot end the script element it stands in."""
    text = metrics.to_json(content)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
