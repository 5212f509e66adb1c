"""How good a policy is: pass@k, avg@k and maj@k over P problems with K samples each.

A sample is correct when its score is exactly 1: partial credit is never pass@1. A sample whose
verification failed (or whose score is not finite) is neither right nor wrong: it is left out, so
the number of scored samples n <= K differs between problems. Standard errors are over problems.
"""
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import rich.table
from jaxtyping import Array, Bool, Shaped

Scores = Shaped[np.ndarray, "P K"] | Shaped[Array, "P K"]
Failed = Bool[np.ndarray, "P K"] | Bool[Array, "P K"]
Answers = Sequence[Sequence[str | None]]


class Estimate(NamedTuple):
    """A mean over problems and its standard error (NaN where there are too few problems to say)."""

    value: float
    stderr: float


def pass_at_k(scores: Scores, k: int, failed: Failed | None = None) -> Estimate:
    """1 - C(n - c, k) / C(n, k): the chance that k of a problem's n samples hold one of its c correct ones.

    Unbiased. A problem with fewer than k scored samples is left out.

    Args:
      scores: what the verifier said; 1 (or True) means correct.
      k: samples allowed per problem, 1 to K.
      failed: True where the verification failed; None: nowhere.

    Raises:
      ValueError: k is not in 1..K.

    Source: Chen et al. 2021, arXiv:2107.03374, section 2.1.
    """
    n, c = _counts(scores, failed)
    if not 1 <= k <= np.shape(scores)[1]:
        raise ValueError(f"pass@{k} with {np.shape(scores)[1]} samples per problem: k must be 1 to the number of "
                         "samples. Draw more samples, or ask for a smaller k.")
    n, c = n[n >= k], c[n >= k]
    drawn = np.arange(k)
    all_wrong = np.prod(np.maximum(n[:, None] - c[:, None] - drawn, 0) / (n[:, None] - drawn), axis=1)
    return _over_problems(1 - all_wrong)


def average_at_k(scores: Scores, failed: Failed | None = None) -> Estimate:
    """The share c / n of correct samples, averaged over problems that have a scored sample.

    Args:
      scores: what the verifier said; 1 (or True) means correct.
      failed: True where the verification failed; None: nowhere.
    """
    n, c = _counts(scores, failed)
    return _over_problems(c[n > 0] / n[n > 0])


def majority_at_k(answers: Answers, scores: Scores, failed: Failed | None = None) -> Estimate:
    """The share of problems whose most frequent answer is correct, over all K samples.

    Answers that tie for most frequent count as if one of them were drawn at random. An answer that
    the verifier did not judge the same way each time counts by its share of correct samples.
    A problem of which every scored sample gave no answer is wrong.

    Args:
      answers: [P][K] normalised answers; None or "" where none could be read, which casts no vote.
      scores: what the verifier said; 1 (or True) means correct.
      failed: True where the verification failed; None: nowhere.

    Raises:
      ValueError: `answers` is not [P][K].

    Source: Wang et al. 2022, arXiv:2203.11171 (self-consistency).
    """
    scored, correct = _scored(scores, failed)
    if [len(row) for row in answers] != [scored.shape[1]] * scored.shape[0]:
        raise ValueError(f"answers must be a [P][K] table like the scores, {scored.shape[0]} problems with "
                         f"{scored.shape[1]} each; got rows of {sorted({len(row) for row in answers})}, {len(answers)} "
                         "of them.")
    judged = [_majority(row, scored[p], correct[p]) for p, row in enumerate(answers) if scored[p].any()]
    return _over_problems(np.asarray(judged, np.float64))


def summary(scores: Scores, failed: Failed | None = None, answers: Answers | None = None,
            ks: Sequence[int] = (1,)) -> dict[str, Estimate]:
    """Every estimate by name ("pass@1", "avg@8", "maj@8"), then what was counted ("count/...").

    Args:
      scores: what the verifier said; 1 (or True) means correct.
      failed: True where the verification failed; None: nowhere.
      answers: [P][K] normalised answers, None for no answer; without them there is no maj@K.
      ks: the k of pass@k, each 1 to K.
    """
    problems, samples = np.shape(scores)
    n, _ = _counts(scores, failed)
    result = {f"pass@{k}": pass_at_k(scores, k, failed) for k in ks}
    result[f"avg@{samples}"] = average_at_k(scores, failed)
    if answers is not None:
        result[f"maj@{samples}"] = majority_at_k(answers, scores, failed)
    counts = {"problems": problems, "samples": problems * samples, "failed": problems * samples - int(n.sum())}
    counts |= {f"left_out@{k}": int((n < k).sum()) for k in ks}
    return result | {f"count/{name}": Estimate(float(count), 0.0) for name, count in counts.items()}


def table(results: Mapping[str, Mapping[str, tuple[float, float]]], title: str = "Evaluation") -> rich.table.Table:
    """Policies side by side: what `summary` found for each, in percent with standard errors, counts below.

    Counts of losses that are zero everywhere are left out.

    Args:
      results: by the policy's name, estimates as (value, stderr) by name.
      title: stands above the table.
    """
    shown = rich.table.Table(title=title, title_justify="left")
    shown.add_column("estimate")
    for policy in results:
        shown.add_column(policy, justify="right")
    names = list(dict.fromkeys(name for estimates in results.values() for name in estimates))
    for name in (n for n in names if not n.startswith("count/")):
        found = [estimates.get(name, (math.nan, math.nan)) for estimates in results.values()]
        shown.add_row(name, *(f"{_percent(value)} ± {_percent(stderr)}" for value, stderr in found))
    shown.add_section()
    for name in (n for n in names if n.startswith("count/")):
        counts = [estimates.get(name, (0.0, 0.0))[0] for estimates in results.values()]
        if any(counts) or name in ("count/problems", "count/samples"):
            shown.add_row(_count_label(name), *(f"{count:.0f}" for count in counts))
    return shown


def write(workdir: str | pathlib.Path, estimates: Mapping[str, tuple[float, float]]) -> pathlib.Path:
    """Keeps `estimates` as `evaluation.json` in the work directory, where the report looks for it.

    Args:
      workdir: the run's directory.
      estimates: (value, stderr) by name; what is not finite is kept as null.
    """
    path = pathlib.Path(workdir) / "evaluation.json"
    rows = [{"name": name, "value": _finite(value), "stderr": _finite(stderr)}
            for name, (value, stderr) in estimates.items()]
    path.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _scored(scores, failed):
    """Which samples were scored, and which of those are correct: two bool [P, K]."""
    scores = np.asarray(scores, np.float64)
    scored = np.isfinite(scores)
    if failed is not None:
        scored &= ~np.asarray(failed)
    return scored, scored & (scores == 1)


def _counts(scores, failed):
    """n, scored samples, and c, correct ones, per problem."""
    scored, correct = _scored(scores, failed)
    return scored.sum(axis=1), correct.sum(axis=1)


def _majority(answers, scored, correct):
    """The chance that an answer drawn from a problem's most frequent ones is correct."""
    votes: dict[str, list[bool]] = {}
    for k, answer in enumerate(answers):
        if answer and scored[k]:
            votes.setdefault(answer, []).append(bool(correct[k]))
    most = max((len(cast) for cast in votes.values()), default=0)
    tied = [sum(cast) / len(cast) for cast in votes.values() if len(cast) == most]
    return sum(tied) / len(tied) if tied else 0.0


def _over_problems(values):
    """The mean over problems with its standard error, the spread estimated with P - 1."""
    problems = len(values)
    value = float(np.mean(values)) if problems else math.nan
    stderr = float(np.std(values, ddof=1) / math.sqrt(problems)) if problems > 1 else math.nan
    return Estimate(value, stderr)


def _finite(value):
    return float(value) if math.isfinite(value) else None


def _percent(value):
    return f"{100 * value:.1f} %" if math.isfinite(value) else "-"


def _count_label(name):
    name = name.removeprefix("count/")
    if name.startswith("left_out@"):
        return f"problems left out of pass@{name.removeprefix('left_out@')}"
    return {"failed": "verifications failed"}.get(name, name)
