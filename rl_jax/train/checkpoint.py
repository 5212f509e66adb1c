"""Checkpoints: the state and the data cursor in one directory per step, written in the background.

Weights that a phase never changes are written once, in a directory of the phase.
"""
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from rl_jax.types import TrainState

NOT_VALIDATED = -1.0


class Checkpoints:
    """The checkpoints of one run: the newest few, and the best few by validation.

    A step's directory appears under its final name only when it is complete, so one that was
    being written when the run was killed is never seen.
    """

    def __init__(self, workdir: pathlib.Path | str, *, keep_last: int = 2, keep_best: int = 1,
                 keep_steps: Sequence[int] = ()):
        """Opens `workdir/checkpoints`, made if it is missing.

        Args:
          keep_last: newest checkpoints kept.
          keep_best: checkpoints kept for their validation score.
          keep_steps: steps that are kept whatever comes after them, the ends of phases.
        """
        self._path = pathlib.Path(workdir).absolute() / "checkpoints"
        self._frozen = pathlib.Path(workdir).absolute() / "frozen"
        _check_scores(self._path)
        policies = [checkpoint_managers.LatestN(keep_last), checkpoint_managers.CustomSteps(tuple(keep_steps))]
        if keep_best:
            policies.append(checkpoint_managers.BestN(get_metric_fn=_score, n=keep_best,
                                                      keep_checkpoints_without_metrics=False))
        self._manager = ocp.CheckpointManager(self._path, options=ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies), best_fn=_score, best_mode="max",
            enable_async_checkpointing=True))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Waits for what is still being written, and closes."""
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, step: int, state: TrainState, cursor: dict[str, Any], *, pending: Any = None,
             score: float = NOT_VALIDATED) -> None:
        """Saves in the background; the state may be donated as soon as this returns.

        Args:
          step: of the whole run, the directory's name.
          cursor: where the data and the phases stand, plain values; `cursor["phase"]` is the phase's number.
          pending: rollouts in flight (two-program mode), a pytree of arrays.
          score: validation pass@1, by which the best are kept.
        """
        self._keep_frozen(cursor["phase"], state.frozen)
        items = {"parameters": ocp.args.StandardSave(state.parameters), "cursor": ocp.args.JsonSave(cursor),
                 "training": ocp.args.StandardSave(_training(state))}
        if pending is not None:
            items["pending"] = ocp.args.StandardSave(pending)
        self._manager.save(step, args=ocp.args.Composite(**items), metrics={"score": score})

    def steps(self) -> list[int]:
        """The steps that can be restored, oldest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest step, None if there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the best validation score; the newest if none was validated."""
        best = self._manager.best_step()
        if best is None or self._manager.metrics(best)["score"] == NOT_VALIDATED:
            return self.latest()
        return best

    def cursor(self, step: int) -> dict[str, Any]:
        """What `save` was given as cursor."""
        return self._restore(step, cursor=ocp.args.JsonRestore())["cursor"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a step.

        Args:
          like: shapes, dtypes and shardings, as arrays or `jax.ShapeDtypeStruct`.
        """
        found = self._restore(step, parameters=_like(like.parameters), training=_like(_training(like)))
        frozen = self.restore_frozen(self.cursor(step)["phase"], like.frozen)
        values = {**found["training"], "parameters": found["parameters"], "frozen": frozen,
                  "key": jax.random.wrap_key_data(found["training"]["key"])}
        # unflattened and not constructed: with replicas every leaf has an axis more
        leaves = jax.tree.leaves([values[field.name] for field in dataclasses.fields(like)])
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def restore_pending(self, step: int, like: Any) -> Any:
        """The rollouts in flight of a step."""
        return self._restore(step, pending=_like(like))["pending"]

    def restore_parameters(self, step: int, like: Any) -> Any:
        """The trained weights of a step, by role."""
        return self._restore(step, parameters=_like(like))["parameters"]

    def restore_frozen(self, phase: int, like: Any) -> Any:
        """The weights that a phase never changes, by role, or those of them that `like` has."""
        if not like:
            return {}
        with ocp.StandardCheckpointer() as reader:
            found = {}
            for role, shapes in like.items():
                try:
                    found[role] = reader.restore(self._frozen / str(phase) / role, _placed(shapes))
                except Exception as error:
                    raise _unreadable(self._frozen / str(phase), role, error) from error
            return found

    def _keep_frozen(self, phase: int, frozen: dict[str, Any]) -> None:
        """Writes each role's weights if they are not there yet; a directory is complete or not there."""
        missing = {role: tree for role, tree in frozen.items() if not (self._frozen / str(phase) / role).is_dir()}
        if missing:
            with ocp.StandardCheckpointer() as writer:
                for role, tree in missing.items():
                    writer.save(self._frozen / str(phase) / role, tree)
                    writer.wait_until_finished()

    def _restore(self, step: int, **items: Any) -> Any:
        if step not in self._manager.all_steps():
            raise ValueError(f"{self._path} has no checkpoint of step {step}; there are {self.steps() or 'none'}.")
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise _unreadable(self._path, str(step), error) from error


def _check_scores(path: pathlib.Path) -> None:
    """Refuses the checkpoint whose score cannot be read, by name: Orbax reads them all, and would not say which."""
    for file in sorted(path.glob("*/metrics/metrics")):
        name = file.parents[1].name
        try:
            if name.isdigit():  # the others were being written
                float(json.loads(file.read_text())["score"])
        except (ValueError, KeyError, TypeError) as error:
            raise _unreadable(path, name, error) from error


def _unreadable(path: pathlib.Path, name: str, error: Exception) -> ValueError:
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    others = sorted(int(entry.name) for entry in path.iterdir() if entry.name.isdigit() and entry.name != name)
    return ValueError(f"the checkpoint {path / name} cannot be read (damaged, or of another configuration): {said}. "
                      "Nothing was deleted. Move that directory away to continue from an earlier one (there are "
                      f"{others or 'none'}).")


def _score(metrics: dict[str, float]) -> float:
    return metrics["score"]


def _like(tree: Any) -> ocp.args.StandardRestore:
    return ocp.args.StandardRestore(_placed(tree))


def _placed(like: Any) -> Any:
    """Shapes with a place each, the first device where none is said: it was saved in one that may not be there now."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct) or leaf.sharding is not None:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

    return jax.tree.map(one, like)


def _training(state: TrainState) -> dict[str, Any]:
    """The state but for the weights, which have directories of their own."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name not in ("parameters", "frozen")}
    return {**fields, "key": _key_data(fields["key"])}


def _key_data(key: Any) -> Any:
    if isinstance(key, jax.ShapeDtypeStruct):
        found = jax.eval_shape(jax.random.key_data, key)
        return jax.ShapeDtypeStruct(found.shape, found.dtype, sharding=key.sharding)
    return jax.random.key_data(key)
