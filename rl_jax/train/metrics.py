"""What a run leaves behind: `metrics.jsonl` and `rollouts.jsonl`, one JSON object per line.

Steps are counted over all phases of a run and never decrease, so "everything after step n" is
the end of a file: a run that was killed is cut back to the step it resumes from and then writes
the same lines again. Only the time fields (`timeless`) differ from a run that was never killed.
"""
import importlib
import json
import math
import pathlib
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rl_jax import types

HEAD = ("step", "phase", "time_s")
NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def to_json(value: Any) -> str:
    """Strictly valid JSON in one line; numbers that are not finite become "NaN", "Infinity", "-Infinity".

    Args:
      value: nested mappings, sequences, strings, numbers (NumPy and JAX scalars included), None.
    """
    return json.dumps(_plain(value), allow_nan=False, separators=(",", ":"))


def rows(path: str | pathlib.Path) -> Iterator[dict[str, Any]]:
    """The objects in a JSONL file, in order; a half-written last line is passed over.

    Raises:
      ValueError: a complete line is not a JSON object with a "step".
    """
    path = pathlib.Path(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield _parse(line, path, number)


def timeless(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `metrics.jsonl` without what depends on the clock: `time_s` and "speed/..."."""
    return {key: value for key, value in row.items() if key != "time_s" and not key.startswith("speed/")}


class Lines:
    """A JSONL file that is only ever appended to or cut off at a step. Rows hold "step".

    Opening it drops a half-written last line.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self.last = self._cut(math.inf)

    def append(self, added: Sequence[Mapping[str, Any]]) -> None:
        """Writes rows of one step in one piece; a process that is killed afterwards does not lose them."""
        written = "".join(to_json(row) + "\n" for row in added).encode()
        with self.path.open("ab") as file:
            file.write(written)
        self.last = dict(added[-1]) if added else self.last

    def truncate_to(self, step: int) -> None:
        """Drops the rows of every step after `step`."""
        self.last = self._cut(step)

    def _cut(self, step):
        """Keeps the whole rows up to `step` and returns the last of them, or None."""
        kept, last = 0, None
        with self.path.open("r+b") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                row = _parse(line, self.path, number)
                if row["step"] > step:
                    break
                kept, last = kept + len(line), row
            file.truncate(kept)
        return last


class Writer:
    """Writes the metrics and the sampled answers of a run; made in the process with index 0 alone.

    After opening the directory of an earlier run, call `truncate_to` before the first write. A
    checkpoint of step n is saved after everything of step n is written.

    Args:
      workdir: the run's directory; made if it is not there.
      tensorboard: also write event files to `workdir/tensorboard`.
      wandb: also log to Weights & Biases, resuming the run that `workdir` belongs to.

    Raises:
      ImportError: an extra was asked for and is not installed.
    """

    def __init__(self, workdir: str | pathlib.Path, *, tensorboard: bool = False, wandb: bool = False):
        extras = [(mirror, _optional(module, f"{name}=True")) for asked, mirror, module, name in (
            (tensorboard, _TensorBoard, "tensorboardX", "tensorboard"), (wandb, _WandB, "wandb", "wandb")) if asked]
        self.workdir = pathlib.Path(workdir)
        self._metrics = Lines(self.workdir / "metrics.jsonl")
        self._rollouts = Lines(self.workdir / "rollouts.jsonl")
        self._mirrors = [mirror(module, self.workdir, self.step) for mirror, module in extras]
        self._start_clock()

    @property
    def step(self) -> int:
        """The last step that was written, 0 before the first."""
        return max(lines.last["step"] if lines.last else 0 for lines in (self._metrics, self._rollouts))

    def metrics(self, step: int, phase: str, values: Mapping[str, Any]) -> None:
        """Adds one line of numbers; a step may have several.

        Args:
          step: counted over all phases, at least that of the line before.
          phase: name of the phase, "sft" or "rl" for instance.
          values: numbers by metric name, each a Python, NumPy or JAX scalar.

        Raises:
          ValueError: the step goes back, a value is not one number, or a name is reserved.
        """
        self._check_order(step)
        numbers = {name: _number(name, values[name]) for name in sorted(values)}
        time_s = round(time.monotonic() - self._started, 3)
        self._metrics.append([{"step": int(step), "phase": phase, "time_s": time_s} | numbers])
        for mirror in self._mirrors:
            mirror.write(int(step), numbers)

    def rollouts(self, step: int, phase: str, sampled: Sequence[Mapping[str, Any]]) -> None:
        """Adds a table of answers, one line each, as `rollout_rows` makes them.

        Args:
          step: counted over all phases, at least that of the line before.
          phase: name of the phase.
          sampled: one mapping per answer; keys keep their order.
        """
        self._check_order(step)
        self._rollouts.append([{"step": int(step), "phase": phase} | dict(row) for row in sampled])

    def truncate_to(self, step: int) -> None:
        """Drops everything that was written after `step`: the run resumes from there.

        Args:
          step: the last step that the restored checkpoint has seen; 0 starts afresh.
        """
        self._metrics.truncate_to(step)
        self._rollouts.truncate_to(step)
        for mirror in self._mirrors:
            mirror.truncate_to(step)
        self._start_clock()

    def close(self) -> None:
        """Finishes what TensorBoard and W&B still hold back; the JSONL files need no closing."""
        for mirror in self._mirrors:
            mirror.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception):
        self.close()

    def _start_clock(self):
        """Time goes on from the last kept line, so `time_s` is time spent training."""
        spent = self._metrics.last["time_s"] if self._metrics.last else 0.0
        self._started = time.monotonic() - spent

    def _check_order(self, step):
        if step < self.step:
            raise ValueError(f"step {step} after step {self.step} in {self.workdir}: steps are counted over all phases "
                             "and do not go back. A resumed run calls truncate_to first.")


def rollout_rows(x: types.Experience, prompts: Sequence[str], completions: Sequence[str], *,
                 drawn: np.ndarray | None = None, groups: int = 4) -> list[dict[str, Any]]:
    """The first `groups` groups of a batch as rows for `Writer.rollouts`.

    Per answer: its text and its prompt's, score, reward and reward parts, advantage (mean over the
    answer's tokens), log-probability (nats, sum and mean per token) and mean entropy (nats) under
    the distribution that drew it, tokens, whether it ended by itself, whether its verifier failed.

    Args:
      x: the batch, in host memory.
      prompts: P prompts as text; each has N / P samples, prompt-major.
      completions: N answers as text.
      drawn: [N, T], the tokens of those answers; None takes the batch's mask, which leaves out answers that
        are not learned from.
      groups: how many prompts to keep.

    Raises:
      ValueError: N is not a multiple of P, or not the batch's.
    """
    total = len(x.mask)
    if not prompts or total % len(prompts) or len(completions) != total:
        raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions for a batch of {total} sequences: "
                         "there must be one completion per sequence and the same number of sequences per prompt.")
    size = total // len(prompts)
    mask = np.asarray(x.mask if drawn is None else drawn)
    tokens = mask.sum(axis=1)
    summed = {"logp": np.sum(np.asarray(x.rollout_logp, np.float64), axis=1, where=mask),
              "entropy": np.sum(np.asarray(x.rollout_entropy, np.float64), axis=1, where=mask)}
    if "advantage" in x.given:
        credit = np.asarray(x.given["advantage"], np.float64)
        credit = np.broadcast_to(credit if credit.ndim == 2 else credit[:, None], mask.shape)
        summed["advantage"] = np.sum(credit, axis=1, where=mask)
    parts = {name: np.asarray(x.parts[name]) for name in sorted(x.parts)}

    def mean(name, n):
        return float(summed[name][n] / tokens[n]) if name in summed and tokens[n] else None

    return [{"group": n // size, "prompt": prompts[n // size], "completion": completions[n],
             "score": float(x.score[n]), "reward": float(x.reward[n]),
             "parts": {name: float(values[n]) for name, values in parts.items()},
             "advantage": mean("advantage", n), "logp_sum": float(summed["logp"][n]), "logp_mean": mean("logp", n),
             "entropy": mean("entropy", n), "tokens": int(tokens[n]), "finished": bool(x.finished[n]),
             "failed": bool(x.failed[n])} for n in range(min(groups, len(prompts)) * size)]


class Silent:
    """The writer of every other process: says nothing."""

    def metrics(self, step: int, phase: str, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def rollouts(self, step: int, phase: str, sampled: Sequence[Mapping[str, Any]]) -> None:
        """Nothing."""

    def truncate_to(self, step: int) -> None:
        """Nothing."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: Any) -> None:
        """Nothing."""


class _TensorBoard:
    """Event files; `purge_step` hides what a killed run wrote after the step it resumes from."""

    def __init__(self, module, workdir, step):
        self._module = module
        self._directory = str(workdir / "tensorboard")
        self._open(step + 1 if step else None)

    def _open(self, purge_step):
        self._writer = self._module.SummaryWriter(self._directory, purge_step=purge_step)

    def write(self, step, numbers):
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def truncate_to(self, step):
        self._writer.close()
        self._open(step + 1)

    def close(self):
        self._writer.close()


class _WandB:
    """One run per work directory. The service keeps the first value of a step that is sent twice."""

    def __init__(self, module, workdir, step):
        identity = workdir / "wandb_run_id"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex)
        self._run = module.init(project="rl_jax", name=workdir.resolve().name, dir=str(workdir),
                                id=identity.read_text().strip(), resume="allow")

    def write(self, step, numbers):
        self._run.log(numbers, step=step)

    def truncate_to(self, step):
        """Nothing to do: a resumed run sends the same numbers again."""

    def close(self):
        self._run.finish()


def _optional(module, asked_by):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{asked_by} needs the package {module}, which cannot be imported ({error}). Install it "
                          "with: pip install 'rl_jax[log]'") from error


def _number(name, value):
    if name in HEAD:
        raise ValueError(f"a metric cannot be named {name!r}: every line already has {HEAD}.")
    if np.shape(value) != ():
        raise ValueError(f"metric {name!r} has shape {np.shape(value)}, and a metric is one number: take its mean, or "
                         "log each entry under its own name.")
    return float(value)


def _plain(value):
    """Python values that JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if np.shape(value) == () and np.asarray(value).dtype.kind in "biuf":
        return _plain(np.asarray(value).item())
    raise ValueError(f"{type(value).__name__} is not a value for JSON: give numbers, strings, lists and mappings.")


def _parse(line, path, number):
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is not JSON ({error}): the file was changed by something else; "
                         "repair or move it.") from error
    if not isinstance(row, dict) or "step" not in row:
        raise ValueError(f"{path}, line {number} is not a JSON object with a \"step\": the file was changed by "
                         "something else; repair or move it.")
    return row
