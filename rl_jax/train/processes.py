"""Many processes, one program: they join, agree on what they run, notice that one is gone, and stop at the same step.

What they tell each other goes through the store of jax's coordination service, which process 0 keeps.
"""
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

import kernels_pallas
from rl_jax import sections
from rl_jax.models import mesh as meshes
from rl_jax.train import peers

AGREE_MS = 600_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """How this process finds the others.

    Attributes:
      coordinator: host:port at which process 0 answers; empty where jax finds out by itself (TPU pods, SLURM, MPI).
      processes: how many there are.
      process: which of them this is, from 0.
      heartbeat_s: seconds of silence after which a process counts as gone, and the others end.
    """

    coordinator: str = ""
    processes: int | None = None
    process: int | None = None
    heartbeat_s: int | float = 100

    def __post_init__(self):
        given = (bool(self.coordinator), self.processes is not None, self.process is not None)
        if any(given) and not all(given):
            raise ValueError("--coordinator=host:port, --processes=N and --process=I go together: give all three, or "
                             "none where the cluster says them (TPU pods, SLURM).")
        if self.coordinator and not self.coordinator.rpartition(":")[2].isdigit():
            raise ValueError(f"--coordinator={self.coordinator}: it is host:port of process 0.")
        if self.coordinator and not 0 <= self.process < self.processes:
            raise ValueError(f"--process={self.process} of --processes={self.processes}: it counts from 0.")
        if self.heartbeat_s < 1:
            raise ValueError(f"--heartbeat_s={self.heartbeat_s}: it must be at least 1.")


def asked(*, distributed: bool, **given: Any) -> Asked | None:
    """What the command line says; None for a process of its own.

    Args:
      distributed: whether there are others.
      given: see `Asked`.

    Raises:
      ValueError: what is given does not go together.
    """
    found = Asked(**given)
    if not distributed and found.coordinator:
        raise ValueError("--coordinator is read with --distributed alone: add that.")
    return found if distributed else None


def several() -> bool:
    """Whether this process is one of several."""
    return peers.store() is not None and jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that writes metrics and reports, and prints."""
    return not several() or jax.process_index() == 0


@contextlib.contextmanager
def joined(asked: Asked | None, workdir: pathlib.Path) -> Iterator[None]:
    """Joins the others, and leaves with them; a process that fails, or finds one gone, ends at once with status 1.

    Args:
      asked: None for a process of its own.
      workdir: of the run, on storage that all processes share.
    """
    if asked is None:
        yield
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    places = {"coordinator_address": asked.coordinator or None, "num_processes": asked.processes,
              "process_id": asked.process}
    # later than ours, which says more
    jax.distributed.initialize(**places, heartbeat_timeout_seconds=int(3 * asked.heartbeat_s) + 10)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # jax would note it and go on; `session.Interrupt` comes later
    if not several():
        yield
        return
    watch = peers.Watch(workdir, asked.heartbeat_s)
    try:
        yield
    except BaseException as error:
        watch.fail(error)
    watch.leave()


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Tells the others of an error in here before anything waits for them."""
    try:
        yield
    except jax.errors.JaxRuntimeError:
        raise  # another one is gone, as like as not: the watch will say which
    except BaseException as error:
        if several():
            peers.tell(peers.said_by(error))
        raise


def agree(name: str, sayings: Mapping[str, Any]) -> None:
    """Waits until all processes have said the same.

    Args:
      name: of the question, asked once in a run.
      sayings: plain values by name.

    Raises:
      ValueError: they have not; which process differs from process 0, and in what.
    """
    if not several():
        return
    one = peers.store()
    one.key_value_set(f"rl_jax/agree/{name}/{jax.process_index()}", json.dumps(dict(sayings)))
    all_said = [json.loads(one.blocking_key_value_get(f"rl_jax/agree/{name}/{index}", AGREE_MS))
                for index in range(jax.process_count())]
    differ = disagreements(all_said)
    if differ:
        raise ValueError("the processes do not run the same:\n" + "\n".join(f"  {line}" for line in differ) +
                         "\nStart all of them with the same command, code and installation.")


def from_first(name: str, value: Any) -> Any:
    """What process 0 has, in all of them.

    Args:
      name: given once in a run.
      value: plain.
    """
    if not several():
        return value
    one = peers.store()
    if first():
        one.key_value_set(f"rl_jax/first/{name}", json.dumps(value))
    return json.loads(one.blocking_key_value_get(f"rl_jax/first/{name}", AGREE_MS))


def disagreements(sayings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which process differs from the first in what, a line each.

    Args:
      sayings: of each process, plain values by name.
    """
    head = sayings[0]
    return [f"process {index}: {name} is {of.get(name, 'absent')!r}, in process 0 {head.get(name, 'absent')!r}"
            for index, of in enumerate(sayings) for name in sorted(head.keys() | of.keys())
            if head.get(name, "absent") != of.get(name, "absent")]


def installed() -> dict[str, str]:
    """What a process runs: the versions that matter, and a fingerprint of every file of this code."""
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")} | {
        "python": platform.python_version()}
    for root in (pathlib.Path(sections.__file__).parent, pathlib.Path(kernels_pallas.__path__[0])):
        found |= {f"{root.name}/{file.relative_to(root)}": hashlib.sha256(file.read_bytes()).hexdigest()[:12]
                  for file in sorted(root.rglob("*.py"))}
    return found


def agree_on_run(config: Mapping[str, Any], workdir: pathlib.Path, claim: Callable[[], None]) -> None:
    """Claims the directory of a run once all processes have said that they run the same.

    Args:
      config: plain values.
      claim: writes into the directory, or checks what is there.

    Raises:
      ValueError: they do not run the same, or do not share the directory.
    """
    if several():
        agree("run", {**sections.flat(config), **installed(), "devices": jax.local_device_count(),
                      "kind of device": jax.local_devices()[0].device_kind})
    if first():
        claim()
    if several():
        peers.store().wait_at_barrier("rl_jax/claimed", AGREE_MS)
        if not (workdir / "config.json").exists():
            raise ValueError(f"process {jax.process_index()} does not see what process 0 wrote into --workdir={workdir}: "
                             "all processes need the same directory, on storage that they share.")


def check(sizes: meshes.Sizes, programs: Sequence[str]) -> None:
    """Refuses what several processes cannot run.

    Args:
      sizes: of the mesh.
      programs: `scale.program` of each phase.

    Raises:
      ValueError: saying what to change.
    """
    if not several():
        return
    count, devices = jax.process_count(), jax.device_count()
    if sizes.devices != devices or sizes.rows % count:
        raise ValueError(f"config.mesh has {sizes.devices} devices, {sizes.rows} of them along data, fsdp and expert: "
                         f"{count} processes with {devices} devices need a mesh of all of these, and a multiple of {count} "
                         "along those axes, as each process loads rows of its own.")
    if any(program != "one" for program in programs):
        raise ValueError(f"scale.program={sorted(set(programs) - {'one'})[0]!r} runs in one process: set "
                         'scale.program="one", in which each process scores its own answers, too.')


class Stop:
    """Whether to stop between steps: this process was asked, or of several any, and then all at the same step."""

    def __init__(self, asked: Callable[[], bool]):
        """Not yet.

        Args:
          asked: whether this process was.
        """
        self._asked, self._ticks, self._at = asked, 0, None

    @property
    def reached(self) -> bool:
        """Whether the run stops here; in one process, whether it was asked to."""
        return self._ticks >= self._at if self._at is not None else not several() and self._asked()

    def now(self) -> bool:
        """Whether to stop after this dispatch; every process asks once in each, after the numbers of the one before are
        known: then process 0 has made that one, and all read what it said before it."""
        if not several():
            return self._asked()
        self._ticks += 1
        if self._at is None:
            self._hear()
        return self.reached

    def _hear(self) -> None:
        index, one = jax.process_index(), peers.store()
        if self._asked():
            one.key_value_set(f"rl_jax/stop/{index}", "asked", allow_overwrite=True)
        heard = dict(one.key_value_dir_get("rl_jax/stop"))
        if index == 0 and heard:
            self._at = self._ticks + 2
            one.key_value_set("rl_jax/stop/at", str(self._at))
        elif "rl_jax/stop/at" in heard:
            self._at = int(heard["rl_jax/stop/at"])
