"""The weights of a run, for evaluation and sampling."""
import dataclasses
import json
import pathlib

import jax

from rl_jax import experiment
from rl_jax.models import trainable
from rl_jax.models.network import Network
from rl_jax.train import checkpoint, loop, session
from rl_jax.types import Parameters


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run's experiment, network and weights (with adapters where it trained some), and the step they are of."""

    experiment: experiment.Experiment
    network: Network
    policy: Parameters
    step: int


def load(workdir: pathlib.Path | str, which: str = "best") -> Trained:
    """The policy of a run.

    Args:
      workdir: of a run with at least one checkpoint.
      which: "best" (by validation), "latest", a step's number, or the name of a phase for its last
        step. Of several replicas the first is taken.

    Raises:
      ValueError: if there is no such checkpoint.
    """
    workdir = pathlib.Path(workdir)
    if not (workdir / "config.json").is_file():
        raise ValueError(f"{workdir} holds no run (config.json is missing): give the --workdir of a training run.")
    parsed = experiment.parse(json.loads((workdir / "config.json").read_text()))
    network = Network(parsed.shape)
    ends = dict(zip(session.phase_names(parsed), session.phase_ends(parsed), strict=True))
    with checkpoint.Checkpoints(workdir, keep_last=parsed.run.keep_last, keep_best=parsed.run.keep_best,
                                keep_steps=tuple(ends.values())) as saved:
        step = _step(saved, which, workdir, ends)
        cursor = saved.cursor(step)
        saved_with, given = cursor["data"]["tokenizer"], parsed.task.tokenizer.fingerprint
        if saved_with != given:
            raise ValueError(f"{workdir} was trained with the tokenizer {saved_with}, and the task's is now {given}: "
                             "its weights mean nothing there. Give the task the tokenizer it was trained with.")
        phase = parsed.phases[cursor["phase"]]
        # neither answers nor what is carried between steps is drawn here
        plain = dataclasses.replace(phase, recipe=dataclasses.replace(phase.recipe, rollout=None))
        one = loop.PhaseLoop(plain, parsed.task, network)
        like = jax.eval_shape(one.initial_state, jax.random.key(0), session.first_shapes(parsed, phase.scale.seeds))
        policy = saved.restore_parameters(step, like.parameters)["policy"]
        kept = {"policy": like.frozen["policy"]} if "policy" in like.frozen else {}
        policy = trainable.joined(policy, saved.restore_frozen(cursor["phase"], kept).get("policy", {}))
    if phase.scale.seeds > 1:
        policy = jax.tree.map(lambda a: a[0], policy)
    return Trained(experiment=parsed, network=one.network, policy=policy, step=step)


def _step(saved: checkpoint.Checkpoints, which: str, workdir: pathlib.Path, ends: dict[str, int]) -> int:
    if which.isdigit() or which in ends:
        return ends[which] if which in ends else int(which)
    if which not in ("best", "latest"):
        raise ValueError(f"checkpoint={which!r}: allowed are best, latest, a phase of {list(ends)}, or a step of "
                         f"{saved.steps()}.")
    step = saved.best() if which == "best" else saved.latest()
    if step is None:
        raise ValueError(f"{workdir} has no finished checkpoint yet: train it first.")
    return step
