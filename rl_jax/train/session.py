"""A run from a config: phases in order, written down, saved, validated, resumable, interruptible."""
import contextlib
import dataclasses
import functools
import json
import pathlib
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import rich.console

from rl_jax import sections
from rl_jax.experiment import Experiment, Phase, Pretrained
from rl_jax.learner import roles
from rl_jax.learner import step as steps
from rl_jax.models import lora, pretrained
from rl_jax.models import mesh as meshes
from rl_jax.models.network import Network
from rl_jax.recipe import Rollout
from rl_jax.reward import worker
from rl_jax.tasks import judge
from rl_jax.tasks import task as tasks
from rl_jax.train import checkpoint, evaluation, examine, loop, metrics, plan, processes, progress, report


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a run ended.

    Attributes:
      step: of the whole run, the last one done.
      interrupted: whether it was asked to stop before its end.
      report: the HTML file.
      checkpoint: the directory of the last checkpoint.
      policy: the weights, with adapters where the last phase trained some; one replica each on a leading axis if
        there are several.
    """

    step: int
    interrupted: bool
    report: pathlib.Path | None
    checkpoint: pathlib.Path
    policy: Any


def claim(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Writes `config.json`, or checks that the run in `workdir` has the same one; its mesh may be another.

    Raises:
      ValueError: if it has another; shows the difference.
    """
    path, text = workdir / "config.json", json.dumps(config, indent=2, sort_keys=True, default=list)
    if path.exists():
        before, now = (sections.flat(json.loads(one)) for one in (path.read_text(), text))
        differ = [f"  {name}: there {before.get(name, 'absent')!r}, now {now.get(name, 'absent')!r}"
                  for name in sorted(before.keys() | now.keys())
                  if before.get(name) != now.get(name) and not name.startswith("config.mesh.")]
        if differ:
            raise ValueError(f"{workdir} holds a run with another config:\n" + "\n".join(differ) +
                             "\nGive the same config to continue it, or another --workdir to start a new run.")
    workdir.mkdir(parents=True, exist_ok=True)
    _put(path, text)


def _put(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


@contextlib.contextmanager
def host_workers(task: tasks.Task, count: int) -> Iterator[worker.Workers | None]:
    """The processes of a host verifier, started now; None for a pure verifier."""
    if isinstance(task.verifier, tasks.PureVerifier):
        yield None
        return
    with worker.Workers(task.verifier, count) as workers:
        yield workers


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop between steps; a second Ctrl-C stops at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Interrupt":
        self._before = {}
        with contextlib.suppress(ValueError):  # not the main thread: nobody can be interrupted
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


class Session:
    """One run in one directory. `go` runs or resumes it."""

    def __init__(self, experiment: Experiment, workdir: pathlib.Path | str, *,
                 console: rich.console.Console | None = None):
        """Prepares; nothing is written yet.

        Args:
          workdir: holds the run; `claim` it first.
        """
        self.experiment, self.workdir = experiment, pathlib.Path(workdir)
        self.console = console or rich.console.Console(quiet=not processes.first())
        processes.check(experiment.mesh, [phase.scale.program for phase in experiment.phases])
        self.network = Network(experiment.shape)
        others = experiment.asynchronous.sampler_devices
        several = experiment.mesh.devices > 1 or others or experiment.mesh.offload
        self.mesh = meshes.make(experiment.mesh, behind=others) if several else None
        self.names = phase_names(experiment)
        self._key = jax.random.key(experiment.run.seed)
        self._examiner = None
        self._last_time = time.monotonic()

    @property
    def total(self) -> int:
        """Steps of all phases."""
        return sum(phase.scale.steps for phase in self.experiment.phases)

    def go(self) -> Finished:
        """Runs every phase to its end, from the newest checkpoint if there is one."""
        run = self.experiment.run
        with contextlib.ExitStack() as stack:
            if self.mesh is not None:
                stack.enter_context(jax.set_mesh(self.mesh))
            # the workers come first: they are forked from a process that has no threads of jax yet
            self._workers = stack.enter_context(host_workers(self.experiment.task, run.workers))
            self._saved = stack.enter_context(
                checkpoint.Checkpoints(self.workdir, keep_last=run.keep_last, keep_best=run.keep_best,
                                       keep_steps=phase_ends(self.experiment)))
            self._writer = stack.enter_context(metrics.Silent() if not processes.first() else metrics.Writer(
                self.workdir, tensorboard="tensorboard" in run.trackers, wandb="wandb" in run.trackers))
            latest = self._saved.latest()
            cursor = {"phase": 0, "done": 0} if latest is None else self._saved.cursor(latest)
            self._writer.truncate_to(latest or 0)
            interrupt = stack.enter_context(Interrupt())
            self._stop = processes.Stop(lambda: interrupt.asked)
            self._progress = stack.enter_context(progress.Progress(self.total, done=latest or 0, console=self.console))
            stack.enter_context(processes.telling())
            self._say_start(latest)
            finished = self._phases(latest, cursor)
        written = report.write(self.workdir) if finished.step and processes.first() else None
        return dataclasses.replace(finished, report=written)

    def _say_start(self, latest: int | None) -> None:
        if self.experiment.task.report:
            self._progress.note(self.experiment.task.report)
        if latest is not None:
            self._progress.note(f"resuming {self.workdir} after step {latest}")

    def _phases(self, latest: int | None, cursor: dict[str, Any]) -> Finished:
        policy, reached = self._start() if latest is None else None, latest or 0
        for index in range(cursor["phase"], len(self.experiment.phases)):
            at = cursor if latest is not None and index == cursor["phase"] else None
            state, reached = self._phase(index, policy, at, latest)
            policy = roles.policy(state)
            if self._stop.reached:
                self._progress.note(f"stopped after step {reached}; the same command continues from there")
                break
        where = self.workdir / "checkpoints" / str(reached)
        return Finished(step=reached, interrupted=self._stop.reached, report=None, checkpoint=where, policy=policy)

    def _phase(self, index: int, policy: Any, at: dict[str, Any] | None, latest: int | None):
        """Runs one phase; returns its last state and the number of the last step."""
        phase = self.experiment.phases[index]
        offset = sum(before.scale.steps for before in self.experiment.phases[:index])
        one = loop.PhaseLoop(phase, self.experiment.task, self.network, workers=self._workers,
                             shown_groups=self.experiment.run.shown_groups or 1, mesh=self.mesh,
                             ahead=self.experiment.asynchronous, offload=self.experiment.mesh.offload,
                             batching=self.experiment.batching)
        key = jax.random.fold_in(self._key, index)
        stream = one.stream(self.experiment.run.seed + index)
        done, pending = 0, None
        if at is None:
            state = one.initial_state(key, self._merged(index, policy))
        else:
            state, done, pending = self._restored(one, key, stream, at, latest)
        self._skipped = np.asarray(state.skipped)
        if done < phase.scale.steps:
            self._plan(one, index, state)
            state, done = self._ticks(one, index, offset, state, stream, done, pending)
        return state, offset + done

    def _start(self) -> Any:
        """The weights that the first phase starts from; None for fresh ones."""
        start, scale = self.experiment.pretrained, self.experiment.phases[0].scale
        if start is None:
            return None
        self._progress.note(f"loading {start.path}")
        found = pretrained_weights(start, self.mesh)
        if scale.seeds == 1:
            return found
        return jax.tree.map(lambda a: jax.numpy.broadcast_to(a, (scale.seeds, *a.shape)), found)

    def _merged(self, index: int, policy: Any) -> Any:
        """What the phase before leaves to this one: its weights, its adapters merged into them."""
        if index == 0 or not lora.there(policy):
            return policy
        return jax.jit(functools.partial(lora.merged, adapters=self.experiment.phases[index - 1].adapters))(policy)

    def _restored(self, one: loop.PhaseLoop, key: Any, stream: Any, at: dict[str, Any], latest: int):
        stream.restore(at["data"])
        like = jax.eval_shape(one.initial_state, key, first_shapes(self.experiment, one.phase.scale.seeds))
        if self.mesh is not None:
            like = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), like, one.shardings(like))
        state = self._saved.restore(latest, like)
        pending = None
        if at["pending"]:
            prompts = one.asked()
            draw = steps.make_draw(one.pieces)
            number = jax.ShapeDtypeStruct((), np.int32)
            samples = jax.eval_shape(draw, like, prompts, number)
            pending = self._saved.restore_pending(latest, ((prompts, samples),) * at["pending"])
        return state, at["done"], pending

    def _plan(self, one: loop.PhaseLoop, index: int, state: Any) -> None:
        scale = one.phase.scale
        shapes = jax.tree.map(_shape, state), one.asked()
        began = time.monotonic()
        one.prepare(*shapes)
        compiled_s = time.monotonic() - began
        plan.check_memory(one)
        found = plan.rows(one, *shapes)
        title = f"{self.names[index]}: {scale.steps} steps, compiled in {compiled_s:.1f} s"
        self.console.print(plan.table(found, title))
        path = self.workdir / "plan.json"
        known = json.loads(path.read_text()) if path.exists() else []
        known = [row for row in known if row["run_phase"] != self.names[index]]
        new = [{"run_phase": self.names[index], "phase": f"{self.names[index]}: {row.phase}", "flops": row.flops,
                "bytes": row.bytes} for row in found]
        if processes.first():
            _put(path, json.dumps(known + new))
        self._last_time = time.monotonic()

    def _ticks(self, one: loop.PhaseLoop, index: int, offset: int, state: Any, stream: Any, done: int, pending: Any):
        run, phase, unwritten, tick = self.experiment.run, one.phase, None, None

        def due(every):
            return every > 0 and number // every > (number - phase.scale.steps_per_call) // every

        for tick in one.ticks(state, stream, done=done, pending=pending):
            # a backend that works while it dispatches has finished by now, any other when its numbers can be read
            finished = time.monotonic() if tick.metrics["gradient/norm"].is_ready() else None
            if unwritten is not None:  # reading metrics waits for the device: it is busy with this tick meanwhile
                self._write(*unwritten, index, offset, phase)
            unwritten = _light(tick), finished
            number, asked = offset + tick.done, self._stop.now()  # read once: a signal may come at any line
            last = tick.done == phase.scale.steps
            validate = run.validate_every > 0 and (due(run.validate_every) or last)
            if last or asked or validate or due(run.checkpoint_every):
                self._write(*unwritten, index, offset, phase)
                unwritten = None
                score = self._validate(tick, index, number) if validate else checkpoint.NOT_VALIDATED
                cursor = {"phase": index, "done": tick.done, "data": tick.data, "pending": len(tick.pending or ())}
                self._saved.save(number, tick.state, cursor, pending=tick.pending, score=score)
                self._last_time = time.monotonic()
            if asked:
                break
        return tick.state, tick.done

    def _write(self, tick: loop.Tick, finished: float | None, index: int, offset: int, phase: Phase) -> None:
        """Waits for a tick's numbers and writes a line per step; stops the run that has stopped learning."""
        values = jax.device_get(tick.metrics)
        now = finished or time.monotonic()
        per_call = phase.scale.steps_per_call
        seconds, self._last_time = (now - self._last_time) / per_call, now
        x = None
        if self.experiment.run.shown_groups and phase.recipe.rollout is not None:
            x = jax.device_get(tick.experience)
            x = jax.tree.map(lambda a: a[0], x) if phase.scale.seeds > 1 else x
        lines = [_line(values, k, phase.scale) for k in range(per_call)]
        for k, line in enumerate(lines):
            step = offset + tick.done - per_call + k + 1
            line["speed/step_s"] = seconds
            if "rollout/length" in line:
                asked = phase.scale.prompts_per_step * phase.recipe.group_size * line.get("rollout/waves", 1.0)
                line["speed/tokens_per_s"] = line["rollout/length"] * asked / seconds
            self._writer.metrics(step, self.names[index], line)
            if x is not None:
                self._write_rollouts(step, index, jax.tree.map(lambda a, k=k: a[k], x) if per_call > 1 else x)
        self._progress.update(offset + tick.done, self.names[index], lines[-1])
        self._check_learning(values, phase)

    def _write_rollouts(self, step: int, index: int, x: Any) -> None:
        task = self.experiment.task
        prompts = [task.splits["train"][int(i)].text for i in x.prompts.example]
        # x.mask leaves out answers that are not learned from; a person wants to read those too
        drawn = judge.drawn_mask(x.tokens, task.tokenizer.stop_ids)
        if x.complete is not None:
            drawn &= x.mask | x.complete[:, None]  # behind an answer that goes on there is padding and no end
        texts = judge.texts_of(task.tokenizer, x.tokens, drawn)
        self._writer.rollouts(step, self.names[index], metrics.rollout_rows(
            x, prompts, texts, drawn=drawn, groups=self.experiment.run.shown_groups))

    def _check_learning(self, values: dict[str, Any], phase: Phase) -> None:
        scale = phase.scale
        for skipped in np.reshape(values["gradient/skipped"], (scale.seeds, scale.steps_per_call)).T:
            self._skipped = np.where(skipped > 0, self._skipped + 1, 0)
            if self._skipped.max() >= phase.optimiser.stop_after_skips:
                raise FloatingPointError(
                    f"{self._skipped.max()} steps in a row had no finite gradient, as many as optimiser.stop_after_skips "
                    "allows. The weights are those before them, in the last checkpoint. Lower the learning rate, or "
                    "look for what the loss divides by.")

    def _validate(self, tick: loop.Tick, index: int, number: int) -> float:
        run, task = self.experiment.run, self.experiment.task
        if self._examiner is None or self._examiner.network.adapters != self.experiment.phases[index].adapters:
            network = dataclasses.replace(self.network, adapters=self.experiment.phases[index].adapters)
            self._examiner = examine.Examiner(network, task, "validation", workers=self._workers, mesh=self.mesh,
                                              rollout=Rollout(group_size=run.validation_samples))
        key = jax.random.fold_in(jax.random.fold_in(self._key, 1_000_003), number)
        found = self._examiner(roles.policy(tick.state), key, problems=run.validation_prompts)
        estimate = evaluation.summary(found.scores, found.failed)["pass@1"]
        estimate = processes.from_first(f"validation/{number}", estimate)
        self._writer.metrics(number, self.names[index], {"validation/pass@1": estimate[0],
                                                         "validation/pass@1_stderr": estimate[1]})
        self._progress.note(f"step {number}: validation pass@1 {estimate[0]:.3f} +- {estimate[1]:.3f}")
        return float(estimate[0]) if np.isfinite(estimate[0]) else checkpoint.NOT_VALIDATED


def first_shapes(experiment: Experiment, seeds: int) -> Any:
    """Shapes of the weights that every phase is given, by those that the first one starts from; None for fresh ones."""
    if experiment.pretrained is None:
        return None
    made, lead = Network(experiment.shape).initialise, () if seeds == 1 else (seeds,)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((*lead, *a.shape), experiment.pretrained.dtype),
                        jax.eval_shape(made, jax.random.key(0)))


def pretrained_weights(start: Pretrained, mesh: jax.sharding.Mesh | None = None) -> Any:
    """The weights of the checkpoint that an experiment starts from, adapters merged into them."""
    found = pretrained.load(start.path, dtype=start.dtype, mesh=mesh, scan_layers=start.scan_layers)
    return lora.merged(found.parameters, found.network.adapters) if found.network.adapters else found.parameters


def phase_names(experiment: Experiment) -> list[str]:
    """The recipes' names, numbered where one occurs twice."""
    names = [phase.recipe.name or "recipe" for phase in experiment.phases]
    return [f"{name}_{names[:i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def phase_ends(experiment: Experiment) -> list[int]:
    """The last step of each phase, counted over the whole run."""
    return [int(end) for end in np.cumsum([phase.scale.steps for phase in experiment.phases])]


def _shape(a: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype)


def _light(tick: loop.Tick) -> loop.Tick:
    """The tick without what the next dispatch will donate."""
    return dataclasses.replace(tick, state=None, pending=None)


def _line(values: dict[str, Any], k: int, scale: Any) -> dict[str, float]:
    """One step's numbers: means over replicas, with their spread, where there are several."""
    if scale.steps_per_call > 1:
        values = {name: value[..., k] for name, value in values.items()}
    if scale.seeds == 1:
        return {name: float(value) for name, value in values.items()}
    spread = {f"{name}_seed_std": float(np.std(value)) for name, value in values.items()}
    return {name: float(np.mean(value)) for name, value in values.items()} | spread
