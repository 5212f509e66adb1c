"""The smallest real runs: what the tests of whole runs are made of."""
import contextlib
import dataclasses
import inspect
import io
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
import rich.console

from rl_jax import experiment, sections
from rl_jax.batching import Batching
from rl_jax.models import mesh as meshes
from rl_jax.tasks import task as tasks
from rl_jax.train import metrics, session

ROOT = pathlib.Path(__file__).resolve().parents[2]
NETWORK = {"width": 16, "layers": 1, "heads": 2, "key_heads": 1, "head_size": 8, "inner": 32}
CACHE_OPTIONS = {"jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": 0}


def config(task: str = "toys.addmod", recipe: str = "baselines.reinforce", *, task_args: dict = {}, recipe_args: dict = {},
           warm_start: int = 0, run: dict = {}, optimiser: dict = {}, mesh: dict = {}, model: dict = NETWORK,
           batching: dict = {}, **scale: Any) -> ml_collections.ConfigDict:
    """A locked config of the six sections; `warm_start` steps of SFT come first, where there are any.

    The default recipe has a gradient in every step, whatever the answers are worth.
    """
    sizes = {"steps": 4, "prompts_per_step": 4}
    has = inspect.signature(sections.find("recipe", "rl_jax.recipes", recipe)).parameters
    arguments = {"group_size": 2} if "group_size" in has else {}
    if recipe == "baselines.reinforce":
        arguments["baseline"] = 0.5  # so that there is something to learn before the first right answer

    def phase(recipe, recipe_args, **scale):
        return {"recipe": experiment.recipe_section(recipe, **recipe_args),
                "optimiser": experiment.section(experiment.Optimiser, learning_rate=1e-2, **optimiser),
                "scale": experiment.section(experiment.Scale, **sizes | scale)}

    before = (ml_collections.ConfigDict(phase("baselines.sft", {}, steps=warm_start)),) if warm_start else ()
    return ml_collections.ConfigDict({
        "task": experiment.task_section(task, **task_args), "model": experiment.model_section(**model),
        "before": before, **phase(recipe, arguments | recipe_args, **scale),
        "run": experiment.section(experiment.Run, **{"checkpoint_every": 2, "shown_groups": 1, "workers": 1} | run),
        **({"mesh": experiment.section(meshes.Sizes, **mesh)} if mesh else {}),
        **({"batching": experiment.section(Batching, **batching)} if batching else {}),
    }).lock()


def train(workdir: pathlib.Path, config: ml_collections.ConfigDict, *, task: tasks.Task | None = None,
          program: str | None = None) -> tuple[session.Finished, str]:
    """Claims, runs or resumes, as scripts/train.py does; returns what it returned and printed.

    Args:
      task: instead of the config's.
      program: of the last phase, instead of the config's.
    """
    parsed = experiment.parse(config)
    if program is not None:
        *before, last = parsed.phases
        last = dataclasses.replace(last, scale=dataclasses.replace(last.scale, program=program))
        parsed = dataclasses.replace(parsed, phases=(*before, last))
    session.claim(workdir, sections.plain(config))
    said = io.StringIO()
    one = session.Session(dataclasses.replace(parsed, task=task or parsed.task), workdir,
                          console=rich.console.Console(file=said, width=200))
    return one.go(), said.getvalue()


@contextlib.contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """Sends this process Ctrl-C as soon as a run has written the metrics of a step."""
    written = metrics.Writer.metrics

    def write(writer, number, *rest):
        written(writer, number, *rest)
        if number == step and metrics.Writer.metrics is write:
            metrics.Writer.metrics = written
            os.kill(os.getpid(), signal.SIGINT)

    metrics.Writer.metrics = write
    try:
        yield
    finally:
        metrics.Writer.metrics = written


def left_behind(workdir: pathlib.Path) -> tuple[list[dict[str, Any]], bytes]:
    """Metrics without the clock, and the rollout table."""
    return [metrics.timeless(row) for row in metrics.rows(workdir / "metrics.jsonl")], (
        workdir / "rollouts.jsonl").read_bytes()


def bits(tree: Any) -> list[tuple[str, bytes]]:
    """Every leaf as its dtype and bytes: equal only if nothing differs."""
    leaves = [jax.random.key_data(a) if jax.dtypes.issubdtype(getattr(a, "dtype", float), jax.dtypes.prng_key) else a
              for a in jax.tree.leaves(tree)]
    return [(str(np.asarray(a).dtype), np.asarray(a).tobytes()) for a in leaves]


class Script:
    """A script of this repository as a process in a group of its own."""

    def __init__(self, name: str, *arguments: Any, cache: pathlib.Path, optimised: bool = False):
        """Starts it; `optimised` compiles it as users do, which pays for minutes of computing only."""
        environment = {name: value for name, value in os.environ.items() if not (optimised and name == "XLA_FLAGS")}
        environment |= {
            "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache), "COLUMNS": "200",
            **{option.upper(): str(value) for option, value in CACHE_OPTIONS.items()}}
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "scripts" / name, *map(str, arguments)], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)

    def end(self, timeout_s: float = 180.0) -> tuple[int, str]:
        """Waits; returns the exit status and what was printed."""
        try:
            said, _ = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self.process.returncode, said

    def until(self, happened: Callable[[], bool], timeout_s: float = 180.0) -> None:
        """Waits until something has happened while the process still runs."""
        limit = time.monotonic() + timeout_s
        while not happened():
            if self.process.poll() is not None or time.monotonic() > limit:
                raise AssertionError(f"it did not happen; the process (status {self.process.poll()}) said:\n"
                                     f"{self.end()[1]}")
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        """Sends a signal to the process and all that it started, as a terminal does."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        self.signal(signal.SIGKILL)
        self.process.communicate()

    def workers(self) -> list[int]:
        """Process ids of the verifier's workers."""
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent == self.process.pid and "spawn_main" in (entry / "cmdline").read_text():
                    found.append(int(entry.name))
        return found


def last_step(workdir: pathlib.Path) -> int:
    """The last step in metrics.jsonl, 0 if there is none yet."""
    path = workdir / "metrics.jsonl"
    rows = list(metrics.rows(path)) if path.exists() else []
    return rows[-1]["step"] if rows else 0
