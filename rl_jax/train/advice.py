"""Which knob brings a run under a limit of memory: each is turned, and the run planned anew."""
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from rl_jax import experiment as experiments
from rl_jax.experiment import Experiment
from rl_jax.models import mesh as meshes
from rl_jax.models import trainable
from rl_jax.train import footprint

MOST_PIECES = 64
MORE_DEVICES = (2, 4)
TENSOR = (2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Turn:
    """One knob, or several, turned.

    Attributes:
      command: the overrides that turn it, as the command line takes them.
      experiment: with it turned.
    """

    command: str
    experiment: Experiment


@dataclasses.dataclass(frozen=True)
class Tried(Turn):
    """The same, planned: `bytes` per device."""

    bytes: int


Knob = Callable[[Experiment], Iterator[Turn]]


def advise(experiment: Experiment, limit: int | float, needed: Callable[[Experiment], int] = footprint.needed) -> list[Tried]:
    """What was tried, in order: each knob alone and, if none that leaves what is learned alone is enough, what they save one
    upon the other.

    Of a knob the gentlest turn that fits is found, else its strongest is reported.

    Args:
      limit: bytes per device.
      needed: experiment -> bytes per device.
    """
    known = {}

    def tried(before: Turn, turn: Turn) -> Tried:
        command = f"{before.command} {turn.command}".strip()
        if command not in known:
            known[command] = needed(turn.experiment)
        return Tried(command, turn.experiment, known[command])

    now = tried(Turn("", experiment), Turn("", experiment))
    same, other = ([found for knob in knobs for found in _best(knob, now, limit, tried)] for knobs in (SAME, OTHER))
    alone = [*same, *other]
    if any(found.bytes <= limit for found in same):
        return alone
    for knob in (*SAME, *OTHER):
        for found in _best(knob, now, limit, tried):
            now = found if found.bytes < now.bytes else now
        if now.bytes <= limit:
            break
    return alone if now in alone or not now.command else [*alone, now]


def _best(knob: Knob, before: Turn, limit: int | float, tried: Callable[[Turn, Turn], Tried]) -> list[Tried]:
    """The gentlest turn that fits, by bisection, else the strongest; none where the knob cannot be turned here."""
    turns = [turn for turn in knob(before.experiment) if _allowed(turn.experiment)]
    if not turns:
        return []
    low, high = 0, len(turns) - 1
    best = tried(before, turns[high])
    while best.bytes <= limit and low < high:
        middle = (low + high) // 2
        found = tried(before, turns[middle])
        if found.bytes <= limit:
            best, high = found, middle
        else:
            low = middle + 1
    return [best]


def _allowed(experiment: Experiment) -> bool:
    try:
        experiments.check(experiment)
    except ValueError:
        return False
    return True


def _scaled(experiment: Experiment, **fields: Any) -> Experiment:
    """With fields of the last phase's scale changed: it is the one that the command line names."""
    *before, last = experiment.phases
    last = dataclasses.replace(last, scale=dataclasses.replace(last.scale, **fields))
    return dataclasses.replace(experiment, phases=(*before, last))


def _meshed(experiment: Experiment, **axes: Any) -> Turn:
    sizes = dataclasses.replace(experiment.mesh, **axes)
    return Turn(" ".join(f'--config.mesh.{name}="{size}"' if isinstance(size, tuple) else f"--config.mesh.{name}={size}"
                         for name, size in axes.items()),
                dataclasses.replace(experiment, mesh=sizes))


def _microbatches(experiment: Experiment) -> Iterator[Turn]:
    pieces = 2 * experiment.phases[-1].scale.microbatches
    while pieces <= MOST_PIECES:
        yield Turn(f"--config.scale.microbatches={pieces}", _scaled(experiment, microbatches=pieces))
        pieces *= 2


def _remat(experiment: Experiment) -> Iterator[Turn]:
    if experiment.shape.remat:
        return
    start = experiment.pretrained and dataclasses.replace(experiment.pretrained, remat=True)
    yield Turn("--config.model.remat=True", dataclasses.replace(
        experiment, shape=dataclasses.replace(experiment.shape, remat=True), pretrained=start))


def _all_cut(experiment: Experiment) -> Iterator[Turn]:
    """The same devices, all weights cut."""
    sizes = experiment.mesh
    if sizes.data > 1:
        yield _meshed(experiment, data=1, fsdp=sizes.fsdp * sizes.data)


def _tensor(experiment: Experiment) -> Iterator[Turn]:
    """The same devices and as many rows of each at a time: vocabulary, heads and inner width are cut for it."""
    sizes, pieces = experiment.mesh, experiment.phases[-1].scale.microbatches
    for factor in TENSOR:
        if sizes.fsdp % factor == 0:
            turned = _meshed(experiment, fsdp=sizes.fsdp // factor, tensor=sizes.tensor * factor)
            yield Turn(f"{turned.command} --config.scale.microbatches={factor * pieces}",
                       _scaled(turned.experiment, microbatches=factor * pieces))


def _offload(experiment: Experiment) -> Iterator[Turn]:
    last, before = experiment.phases[-1], experiment.mesh.offload
    frozen = {"teacher": "teacher" in last.recipe.models, "policy": last.scale.train != trainable.ALL,
              "reference": "reference" in last.recipe.models and last.scale.train != trainable.LORA}
    away = tuple(name for name in meshes.ROLES if frozen.get(name) or name in before)
    for roles in (away, (*away, "optimiser")):
        if set(roles) > set(before):
            yield _meshed(experiment, offload=roles)


def _adapters(experiment: Experiment) -> Iterator[Turn]:
    if experiment.phases[-1].scale.train == trainable.ALL:
        yield Turn(f"--config.scale.train={trainable.LORA}", _scaled(experiment, train=trainable.LORA))


def _frozen_dtype(experiment: Experiment) -> Iterator[Turn]:
    start = experiment.pretrained
    if start is not None and start.dtype == "float32" and experiment.phases[-1].scale.train != trainable.ALL:
        yield Turn("--config.model.dtype=bfloat16", dataclasses.replace(
            experiment, pretrained=dataclasses.replace(start, dtype="bfloat16")))


def _drawn_with(experiment: Experiment) -> Iterator[Turn]:
    last = experiment.phases[-1]
    if last.recipe.rollout is not None and not last.scale.draw_with:
        yield Turn("--config.scale.draw_with=int8", _scaled(experiment, draw_with="int8"))


def _more_devices(experiment: Experiment) -> Iterator[Turn]:
    for factor in MORE_DEVICES:
        yield _meshed(experiment, fsdp=experiment.mesh.fsdp * factor)


# What these change is where numbers lie and when; what is learned stays.
SAME = (_microbatches, _remat, _all_cut, _tensor, _offload, _more_devices)
OTHER = (_adapters, _frozen_dtype, _drawn_with)
