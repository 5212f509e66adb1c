"""Recipes one after the other under equal budgets, each as often as there are replicas; what is finished is kept."""
import contextlib
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import rich.console

from rl_jax.comparison import Comparison
from rl_jax.models.network import Network
from rl_jax.train import curves as of_replicas
from rl_jax.train import loop, progress, session
from rl_jax.train.curves import Curve
from rl_jax.types import Parameters, Prompts, TrainState

Tell = Callable[[int, Mapping[str, Any]], None]


def claim(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Writes the configs of a comparison and of its recipes, or checks that `workdir` has the same ones.

    Other recipes may be added to a comparison, and another may be its baseline.

    Args:
      config: plain values, as `sections.plain` gives them.

    Raises:
      ValueError: if it has others; shows the difference.
    """
    session.claim(workdir, {name: value for name, value in config.items() if name not in ("recipes", "baseline")})
    for name, section in config["recipes"].items():
        session.claim(_place(workdir, name), {"recipes": {name: section}})


def run(comparison: Comparison, workdir: pathlib.Path | str | None = None, *,
        console: rich.console.Console | None = None) -> dict[str, Curve]:
    """Every recipe's curve, read where it is finished and learned where it is not.

    Args:
      workdir: where curves are kept, a JSONL file per recipe; `claim` it first. None keeps nothing.
      console: where progress is shown.

    Raises:
      KeyboardInterrupt: between two dispatches, after Ctrl-C or SIGTERM; finished recipes are kept.
    """
    with contextlib.ExitStack() as stack:
        # the workers come first: they are started from a process that has no threads of jax yet
        workers = stack.enter_context(session.host_workers(comparison.task, comparison.run.workers))
        kept = pathlib.Path(workdir or stack.enter_context(tempfile.TemporaryDirectory()))
        paths = {name: _place(kept, name) / "curve.jsonl" for name in comparison.recipes}
        missing = [name for name in comparison.recipes if not paths[name].exists()]
        weights = first_weights(comparison, kept, console) if missing else None
        interrupt = stack.enter_context(session.Interrupt())
        turns = 1 if comparison.side_by_side else comparison.scale.seeds
        each = comparison.scale.steps * turns
        bar = stack.enter_context(progress.Progress(each * len(paths), done=each * (len(paths) - len(missing)),
                                                    console=console))
        for name in comparison.recipes:
            if name not in missing:
                bar.note(f"{name} is finished, {paths[name]}")
        for place, name in enumerate(missing, len(paths) - len(missing)):
            def tell(step: int, numbers: Mapping[str, Any], place: int = place, name: str = name) -> None:
                bar.update(each * place + step, name, numbers)
                if interrupt.asked and step < each:
                    raise KeyboardInterrupt

            of_replicas.write(paths[name], learn(comparison, name, weights, workers=workers, tell=tell))
            if interrupt.asked:
                raise KeyboardInterrupt
        return {name: of_replicas.read(path) for name, path in paths.items()}


def first_weights(comparison: Comparison, workdir: pathlib.Path,
                  console: rich.console.Console | None = None) -> Parameters:
    """The weights that every recipe starts from, one replica each on a leading axis.

    Args:
      workdir: where the run that makes them is kept and continued, if there is one.

    Raises:
      KeyboardInterrupt: that run was asked to stop, and did.
    """
    replicas = comparison.scale.seeds
    if comparison.start is not None:
        finished = session.Session(comparison.start, workdir / "start", console=console).go()
        if finished.interrupted:
            raise KeyboardInterrupt
        return jax.tree.map(lambda a: np.broadcast_to(np.asarray(a), (replicas, *a.shape)), finished.policy)
    if comparison.pretrained is not None:
        weights = session.pretrained_weights(comparison.pretrained)
        return jax.tree.map(lambda a: np.broadcast_to(np.asarray(a), (replicas, *a.shape)), weights)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(comparison.run.seed), 0), replicas)
    return jax.device_get(jax.jit(jax.vmap(Network(comparison.shape).initialise))(keys))


def learn(comparison: Comparison, name: str, weights: Parameters, *, workers: Any = None,
          tell: Tell = lambda step, numbers: None) -> Curve:
    """Trains all replicas of one recipe. Replica r has the same key and the same prompts whatever the recipe.

    Args:
      weights: to start from, one replica each on a leading axis.
      workers: where a host verifier runs.
      tell: is called with the number of steps done and their last numbers, means over replicas.
    """
    one = loop.PhaseLoop(comparison.phase(name), comparison.task, Network(comparison.shape), workers=workers,
                         shown_groups=1)
    key = jax.random.fold_in(jax.random.key(comparison.run.seed), 1)
    steps, replicas = comparison.scale.steps, comparison.scale.seeds
    if one.phase.scale.seeds == replicas > 1:
        pieces = [_learn(one, one.initial_state(key, weights), comparison.run.seed, tell)]
    else:
        pieces = []
        for r, own in enumerate(jax.random.split(key, replicas)):
            state = one.initial_state(own, jax.tree.map(lambda a, r=r: a[r], weights))
            pieces.append(_learn(one, state, comparison.run.seed,
                                 lambda step, numbers, r=r: tell(steps * r + step, numbers)))
    values = {at: np.concatenate([found[at] for found, _ in pieces], axis=1) for at in pieces[0][0]}
    return Curve(values=values, answers=_answers(one, values), updates=one.phase.recipe.schedule.updates,
                 step_s=np.mean([seconds for _, seconds in pieces], axis=0))


def _learn(one: loop.PhaseLoop, state: TrainState, seed: int, tell: Tell):
    """The metrics [K, R] of one program's replicas by name, and seconds per step [K]."""
    scale = one.phase.scale
    one.prepare(state, _shapes(loop.batches(one.stream(seed), scale.steps_per_call)))
    found, seconds, began = [], [], time.monotonic()
    for tick in one.ticks(state, one.stream(seed)):
        values = jax.device_get(tick.metrics)  # waits for the device
        now = time.monotonic()
        seconds += [(now - began) / scale.steps_per_call] * scale.steps_per_call
        began = now
        found.append({name: np.reshape(np.asarray(value, np.float64), (scale.seeds, scale.steps_per_call)).T
                      for name, value in values.items()})
        try:
            tell(tick.done, {name: float(value[-1].mean()) for name, value in found[-1].items()})
        except KeyboardInterrupt:
            jax.block_until_ready(tick.pending)  # a process that ends while its device works crashes
            raise
    return {name: np.concatenate([values[name] for values in found]) for name in found[0]}, np.array(seconds)


def _answers(one: loop.PhaseLoop, values: dict[str, Any]) -> np.ndarray:
    """Answers drawn in each step and replica: more than the batch where groups were replaced, fewer where half
    answers of the step before took their place."""
    nothing = np.zeros_like(values[of_replicas.SCORE])
    prompts = one.phase.scale.prompts_per_step * values.get("rollout/waves", nothing + 1)
    return (prompts - values.get("rollout/prompts_not_asked", nothing)) * one.phase.recipe.group_size


def _shapes(prompts: Prompts) -> Prompts:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), prompts)


def _place(workdir: pathlib.Path, name: str) -> pathlib.Path:
    return workdir / "recipes" / name
