"""Learning curves of several replicas of several recipes, and what they say: errors are over replicas."""
import dataclasses
import math
import pathlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from rl_jax.train import metrics

SCORE, SKIPPED = "reward/score", "gradient/skipped"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """What one recipe did in K steps of R replicas.

    Attributes:
      values: every metric of the step, by name.
      answers: drawn in each step, those that a recipe replaced included.
      step_s: seconds per step, of all replicas that are trained side by side.
      updates: optimiser steps in a step.
    """

    values: dict[str, Float[np.ndarray, "K R"]]
    answers: Float[np.ndarray, "K R"]
    step_s: Float[np.ndarray, " K"]
    updates: int

    @property
    def score(self) -> Float[np.ndarray, "K R"]:
        """Mean score of the step's answers: what the verifier said, not what the recipe made of it."""
        return self.values[SCORE]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe in a table.

    Attributes:
      name: of the recipe.
      score, score_stderr: mean over the last tenth of the steps.
      share: of the baseline's score.
      difference, difference_stderr: from the baseline's score, replica by replica: those share weights and keys.
      half_way: step at which the running mean is first half way from the baseline's score in the first step to the
        best recipe's in the last tenth; None if never.
      step_s: median seconds per step.
      answers: asked, per replica.
      updates: optimiser steps.
      skipped: updates that were not made because the gradient was not finite, over all replicas.
    """

    name: str
    score: float
    score_stderr: float
    share: float
    difference: float
    difference_stderr: float
    half_way: int | None
    step_s: float
    answers: float
    updates: int
    skipped: int


def write(path: pathlib.Path, curve: Curve) -> None:
    """Writes a curve whole or not at all: one JSON object per step, a list over replicas for each metric."""
    lines = []
    for k, seconds in enumerate(curve.step_s):
        values = {name: values[k].tolist() for name, values in sorted(curve.values.items())}
        lines.append(metrics.to_json({"step": k + 1, "step_s": float(seconds), "updates": curve.updates,
                                      "answers": curve.answers[k].tolist(), **values}))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(line + "\n" for line in lines))
    unfinished.replace(path)


def read(path: pathlib.Path) -> Curve:
    """The curve that `write` wrote.

    Raises:
      ValueError: if the file was changed by something else.
    """
    rows = list(metrics.rows(path))
    columns = {name: np.array([row[name] for row in rows], np.float64) for name in rows[0] if name != "step"}
    return Curve(updates=int(columns.pop("updates")[0]), step_s=columns.pop("step_s"), answers=columns.pop("answers"),
                 values=columns)


def running_mean(values: Float[np.ndarray, "K R"], window: int) -> Float[np.ndarray, "K R"]:
    """Mean over each step and the up to `window` - 1 steps before it."""
    total = np.cumsum(np.concatenate([np.zeros((1, values.shape[1])), values]), axis=0)
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)[:, None]


def mean_and_error(values: Float[np.ndarray, "*K R"]) -> tuple[Float[np.ndarray, "*K"], Float[np.ndarray, "*K"]]:
    """Mean over replicas and its standard error, std(ddof=1) / sqrt(R); the error of one replica is unknown (nan)."""
    replicas = values.shape[-1]
    if replicas == 1:
        return np.asarray(values[..., 0]), np.full(values.shape[:-1], np.nan)
    return np.asarray(values.mean(axis=-1)), np.asarray(values.std(axis=-1, ddof=1) / math.sqrt(replicas))


def window_of(steps: int) -> int:
    """Steps that the running mean of a figure goes over: a twenty-fifth of all."""
    return max(1, steps // 25)


def last_tenth(curve: Curve) -> Float[np.ndarray, " R"]:
    """Each replica's mean score over the last tenth of the steps."""
    return curve.score[-max(1, len(curve.score) // 10):].mean(axis=0)


def table(curves: Mapping[str, Curve], baseline: str) -> list[Row]:
    """A row per recipe, the best score first.

    Args:
      curves: by recipe, of equally many replicas.
      baseline: the recipe that the others are compared with.
    """
    best = max(float(last_tenth(curve).mean()) for curve in curves.values())
    rows = [_row(name, curve, curves[baseline], best) for name, curve in curves.items()]
    return sorted(rows, key=lambda row: -row.score)


def _row(name: str, curve: Curve, baseline: Curve, best: float) -> Row:
    (score, error), reference = mean_and_error(last_tenth(curve)), last_tenth(baseline)
    difference, difference_error = mean_and_error(last_tenth(curve) - reference)
    start = float(baseline.score[0].mean())
    reached = running_mean(curve.score, window_of(len(curve.score))).mean(axis=1) >= (start + best) / 2
    return Row(
        name=name, score=float(score), score_stderr=float(error),
        share=float(score / reference.mean()) if reference.mean() != 0 else math.nan,
        difference=float(difference), difference_stderr=float(difference_error),
        half_way=int(reached.argmax()) + 1 if best > start and reached.any() else None,
        step_s=float(np.median(curve.step_s)), answers=float(curve.answers.sum(axis=0).mean()),
        updates=curve.updates * len(curve.step_s), skipped=int(curve.values[SKIPPED].sum()))


def skips(curves: Mapping[str, Curve]) -> list[str]:
    """Where updates were skipped because a gradient was not finite, a line per recipe and replica."""
    found = []
    for name, curve in curves.items():
        for replica, skipped in enumerate(curve.values[SKIPPED].T):
            steps = np.flatnonzero(skipped > 0) + 1
            if len(steps):
                shown = ", ".join(map(str, steps[:5])) + (", ..." if len(steps) > 5 else "")
                found.append(f"{name}: {skipped.sum():.0f} updates of replica {replica + 1} skipped, the gradient was "
                             f"not finite, in {len(steps)} steps ({shown}).")
    return found
