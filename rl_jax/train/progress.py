"""How far a run is: a live bar on a terminal, a plain line every few seconds elsewhere."""
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import rich.console
import rich.progress
import rich.text

SHOWN = (("reward", ("reward/mean", "reward/score"), 3),
         ("loss", ("loss/total",), 3),
         ("pass@1", ("validation/pass@1",), 3),
         ("entropy", ("policy/entropy", "rollout/entropy"), 3),
         ("kl", ("policy/kl_reference", "policy/kl_rollout"), 4),
         ("tok/s", ("speed/tokens_per_s",), 0))


class Progress:
    """Shows step k of n, time left, reward, entropy, KL and tokens/s while a run goes on.

    Time left comes from the last minutes of this process: steps done before a resume, and the
    first step, which compiles, do not count. A context manager.

    Args:
      total: n, steps of all phases together.
      done: steps that were done before this process started.
      every_s: seconds between two lines where there is no terminal (a log, a notebook).
      console: where to write; None is the standard output.
      clock: seconds, from any origin.
    """

    def __init__(self, total: int, *, done: int = 0, every_s: int | float = 5.0,
                 console: rich.console.Console | None = None, clock: Callable[[], int | float] = time.monotonic):
        self.console = console or rich.console.Console()
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._every_s, self._clock, self._said = every_s, clock, -math.inf
        column = rich.progress.TextColumn
        self._bar = rich.progress.Progress(
            column("{task.description}", style="bold", markup=False), rich.progress.BarColumn(bar_width=16),
            rich.progress.MofNCompleteColumn(), rich.progress.TimeRemainingColumn(compact=True),
            column("{task.fields[numbers]}", markup=False),
            console=self.console, disable=not self.live, get_time=clock, speed_estimate_period=180,
            refresh_per_second=4)
        self._task = self._bar.add_task("start", total=total, completed=done, numbers="")

    def update(self, step: int, phase: str, metrics: Mapping[str, Any]) -> None:
        """Says that `step` is done.

        Args:
          step: counted over all phases.
          phase: name of the phase.
          metrics: numbers by metric name; those that matter and are there are shown.
        """
        self._bar.update(self._task, completed=step, description=phase, numbers=numbers(metrics))
        now = self._clock()
        if not self.live and (now - self._said >= self._every_s or step >= self._state.total):
            self._said = now
            self.note(self._line(phase))

    def note(self, message: str) -> None:
        """Prints a line above the bar, word for word.

        Args:
          message: plain text.
        """
        self.console.print(rich.text.Text(message), soft_wrap=True)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *exception):
        self._bar.stop()

    @property
    def _state(self):
        return self._bar.tasks[0]

    def _line(self, phase):
        state = self._state
        left = state.time_remaining
        parts = [f"{phase} step {state.completed:.0f}/{state.total:.0f}",
                 "" if left is None or state.finished else f"{duration(left)} left", state.fields["numbers"]]
        return "  ".join(part for part in parts if part)


def numbers(metrics: Mapping[str, Any]) -> str:
    """The few numbers that a person watches, in one line: "reward 0.512  entropy 0.730  tok/s 8,123".

    Args:
      metrics: numbers by metric name.
    """
    shown = []
    for label, names, digits in SHOWN:
        value = next((float(metrics[name]) for name in names if name in metrics), None)
        if value is not None:
            shown.append(f"{label} {value:,.{digits}f}")
    return "  ".join(shown)


def duration(seconds: int | float) -> str:
    """A time as a person says it: "42 s", "3 min 20 s", "2 h 5 min", "3 d 4 h".

    Args:
      seconds: at least 0.
    """
    whole = int(round(seconds))
    for upper, unit, lower, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= upper:
            return f"{whole // upper} {unit} {whole % upper // lower} {name}"
    return f"{whole} s"
