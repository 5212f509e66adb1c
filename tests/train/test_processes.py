"""Several processes: what they say to each other, and whole runs of two that are killed, resumed and stopped."""
import pathlib
import signal
import socket
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rl_jax.models import mesh
from rl_jax.train import last_words, peers, processes, trained
from tests.ends import tiny
from tests.train import processes_config

HEARTBEAT_S = 5


def test_who_differs_in_what():
    same = {"config.scale.steps": 4, "jax": "0.10"}
    assert processes.disagreements([same, dict(same)]) == []
    assert processes.disagreements([same, same, {"config.scale.steps": 6, "jax": "0.10", "more": 1}]) == [
        "process 2: config.scale.steps is 6, in process 0 4", "process 2: more is 1, in process 0 'absent'"]


def test_what_is_installed_names_every_file():
    found = processes.installed()
    assert {"jax", "jaxlib", "python", "rl_jax/train/processes.py", "kernels_pallas/dispatch.py"} <= found.keys()
    assert found["rl_jax/train/processes.py"] != found["rl_jax/train/loop.py"]


@pytest.mark.parametrize("given, named", [
    ({"coordinator": "h:1"}, "go together"), ({"process": 0}, "go together"),
    ({"processes": 2, "process": 0}, "go together"),
    ({"coordinator": "h", "processes": 2, "process": 0}, "host:port"),
    ({"coordinator": "h:1", "processes": 2, "process": 2}, "counts from 0"), ({"heartbeat_s": 0.5}, "at least 1")])
def test_what_does_not_go_together_is_refused(given, named):
    with pytest.raises(ValueError, match=named):
        processes.asked(distributed=True, **given)


def test_a_process_of_its_own():
    assert processes.asked(distributed=False, heartbeat_s=3) is None
    with pytest.raises(ValueError, match="--distributed"):
        processes.asked(distributed=False, coordinator="h:1", processes=2, process=0)
    assert processes.first() and not processes.several()
    assert processes.from_first("x", 3) == 3
    processes.check(mesh.Sizes(), ["split"])
    asked = []
    stop = processes.Stop(lambda: bool(asked))
    assert not stop.now() and not stop.reached
    asked.append(True)
    assert stop.now() and stop.reached


class Memory:
    """The store, in this process."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, key):
        return [(name, value) for name, value in self.values.items() if name.startswith(key + "/")]

    def blocking_key_value_get(self, key, timeout_in_ms):
        return self.values[key]


@pytest.fixture
def be(monkeypatch):
    """be(index): from here on this is that one of two processes."""
    store = Memory()
    monkeypatch.setattr(peers, "store", lambda: store)
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def be(index):
        monkeypatch.setattr(jax, "process_index", lambda: index)
        return store

    return be


def test_all_say_the_same_or_none_goes_on(be):
    be(1).key_value_set("rl_jax/agree/run/1", '{"jax": "0.10", "devices": 2}')
    be(0)
    processes.agree("run", {"jax": "0.10", "devices": 2})
    be(0).values.pop("rl_jax/agree/run/0")
    with pytest.raises(ValueError, match="process 1: devices is 2, in process 0 4"):
        processes.agree("run", {"jax": "0.10", "devices": 4})


def test_what_process_0_has_found(be):
    be(0)
    assert processes.from_first("score", [0.5, 0.1]) == [0.5, 0.1]
    be(1)
    assert processes.from_first("score", [0.7, 0.2]) == [0.5, 0.1]


def test_the_directory_is_claimed_once_and_must_be_shared(be, tmp_path):
    claimed, answers = [], {f"rl_jax/agree/run/{index}": "" for index in range(2)}

    def run(index):
        store = be(index)
        store.wait_at_barrier = lambda name, timeout_in_ms: None
        store.key_value_set = lambda key, value, **_: answers.update(dict.fromkeys(answers, value))
        store.blocking_key_value_get = lambda key, timeout_in_ms: answers[key]
        processes.agree_on_run({"seed": 0}, tmp_path, lambda: claimed.append(index))

    with pytest.raises(ValueError, match="process 1 does not see"):
        run(1)
    (tmp_path / "config.json").touch()
    run(0)
    run(1)
    assert claimed == [0]


def test_an_error_is_told_before_anything_waits(be):
    store = be(1)
    for error, told in ((jax.errors.JaxRuntimeError("closed"), {}),
                        (ValueError("no"), {"rl_jax/ended/1": "ValueError: no"})):
        with pytest.raises(type(error)), processes.telling():
            raise error
        assert store.values == told


@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("lead", [0, 1])
def test_all_stop_at_the_same_dispatch(be, asked, ahead, lead):
    """Neither asks for a dispatch before the other has asked for the second last: the numbers it waits for need the
    one between, which the other makes after that."""
    wish = [False, False]
    stops = [processes.Stop(lambda: wish[0]), processes.Stop(lambda: wish[1])]
    reached: list[int | None] = [None, None]

    def ask(index, tick):
        be(index)
        if reached[index] is None and stops[index].now():
            reached[index] = tick
        assert stops[index].reached == (reached[index] is not None)

    for tick in range(1, 12):
        wish[asked] = wish[asked] or tick == 4
        ask(ahead, tick)
        if tick > lead:
            ask(1 - ahead, tick - lead)
    assert reached[0] == reached[1] and 4 <= reached[0] <= 9


def test_the_silent_one_is_gone():
    store = Memory()
    one, two, three = (peers.Peers(store, index, 3) for index in range(3))
    for _ in range(4):
        for process in (one, two, three):
            process.exchange(2)
    assert one.gone(5) is None
    for _ in range(4):  # the first still hears of the last beat
        one.exchange(2)
        two.exchange(2)
    assert one.gone(5) == "process 2 of 3 is gone (no heartbeat for 6 s)." and two.gone(7) is None
    three.exchange(2)
    one.exchange(2)
    assert one.gone(5) is None


def test_the_one_that_has_ended_is_not_silent():
    store = Memory()
    one, two = (peers.Peers(store, index, 2) for index in range(2))
    store.key_value_set("rl_jax/ended/1", peers.DONE)
    for _ in range(5):
        one.exchange(2)
    assert one.gone(5) is None
    store.key_value_set("rl_jax/ended/1", "ValueError: no", allow_overwrite=True)
    one.exchange(2)
    assert one.gone(100) == "process 1 of 2 has ended: ValueError: no"
    store.key_value_set("rl_jax/ended/0", "ValueError: no")
    one.exchange(2)
    assert one.gone(100) is None, "it says itself why it has ended"
    two.waited(6)
    assert two.gone(5) == "process 0 of 2 is gone (its store has not answered for 6 s)."


def test_last_words(tmp_path):
    assert "no checkpoint yet" in last_words.ending(tmp_path)
    for step in ("9", "10", "11.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    assert f"the last checkpoint is {tmp_path / 'checkpoints' / '10'}." in last_words.ending(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert last_words.said(1, 2, address) == "process 1 of 2 was ended from outside."
    gone = f"process 0 of 2 is gone (nothing answers at {address}), and with it process 1."
    assert last_words.said(1, 2, address) == gone


def test_last_words_are_said_only_where_they_are_needed(tmp_path, capfd):
    words = last_words.LastWords(0, 2, "127.0.0.1:1", tmp_path)
    words.spare()
    assert capfd.readouterr().err == ""
    words = last_words.LastWords(0, 2, "127.0.0.1:1", tmp_path)
    words._process.communicate("")
    assert "process 0 of 2 was ended from outside. This run ends" in capfd.readouterr().err


# whole runs


class Run:
    """Processes of one run, as scripts/train.py starts them."""

    def __init__(self, workdir, cache, *, cut, count=2, last=()):
        """Starts them.

        Args:
          cut: the mesh, data=2,fsdp=2.
          count: processes; together they have 4 devices.
          last: further flags of the last process.
        """
        self.workdir = workdir
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        config = pathlib.Path(processes_config.__file__)
        self.processes = []
        for index in range(count):
            place = ["--distributed", f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={index}",
                     f"--heartbeat_s={HEARTBEAT_S}"]
            self.processes.append(tiny.Script(
                "../tests/train/in_processes.py", 4 // count, f"--config={config}:{cut}", f"--workdir={workdir}",
                *(place if count > 1 else ()), *(last if index == count - 1 else ()), cache=cache))

    def until(self, step):
        """Waits until so many steps are written."""
        self.processes[0].until(lambda: tiny.last_step(self.workdir) >= step)
        return self

    def ends(self):
        """Status and words of each."""
        return [process.end() for process in self.processes]

    def ends_well(self):
        """What the first said."""
        found = self.ends()
        assert [status for status, _ in found] == [0] * len(found), found
        return found[0][1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """The directory of a run of two processes that nothing has interrupted."""
    workdir = tmp_path_factory.mktemp("processes") / "whole"
    Run(workdir, cache, cut="fsdp=4").ends_well()
    rows, _ = tiny.left_behind(workdir)
    assert len({row["reward/mean"] for row in rows if "reward/mean" in row}) > 2, "the verifier tells answers apart"
    return workdir


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One directory of compiled programs for all."""
    return tmp_path_factory.mktemp("cache")


def final(workdir):
    """What lies on the disk at the end: weights, then the rest of the state."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as saved:
        folders = [workdir / "checkpoints" / str(processes_config.STEPS) / item for item in ("parameters", "training")]
        likes = [jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here),
                              saved.metadata(folder).item_metadata.tree) for folder in folders]
        return [saved.restore(folder, like) for folder, like in zip(folders, likes, strict=True)]


@pytest.mark.slow
def test_killed_and_resumed_is_as_if_never_killed(tmp_path, whole, cache):
    """First the one that keeps nothing, then the one that the others meet at."""
    workdir = tmp_path / "killed"
    for victim, step, why in ((1, 4, "process 1 of 2 is gone (no heartbeat for"), (0, 8, "process 0 of 2 is gone (")):
        run = Run(workdir, cache, cut="fsdp=4").until(step)
        run.processes[victim].kill()
        began = time.monotonic()
        status, said = run.processes[1 - victim].end()
        assert time.monotonic() - began < 3 * HEARTBEAT_S
        assert status != 0 and why in said and "the last checkpoint is" in said and "to continue" in said, said
        assert tiny.last_step(workdir) < processes_config.STEPS
    said = Run(workdir, cache, cut="fsdp=4").ends_well()
    assert f"resuming {workdir} after step" in said
    assert trained.load(workdir, "latest").step == processes_config.STEPS, "one process with one device reads it"
    assert tiny.bits(final(workdir)) == tiny.bits(final(whole))
    assert tiny.left_behind(workdir) == tiny.left_behind(whole)


@pytest.mark.slow
def test_stopped_together_and_continued_by_one(tmp_path, whole, cache):
    """SIGTERM to one of two; then one process with as many devices and another mesh."""
    workdir = tmp_path / "stopped"
    run = Run(workdir, cache, cut="fsdp=4").until(3)
    run.processes[1].process.send_signal(signal.SIGTERM)
    said = run.ends_well()
    stopped = tiny.last_step(workdir)
    assert f"stopped after step {stopped};" in said and 3 <= stopped < processes_config.STEPS
    assert (workdir / "checkpoints" / str(stopped)).is_dir()
    said = Run(workdir, cache, cut="data=2,fsdp=2", count=1).ends_well()
    assert f"resuming {workdir} after step {stopped}" in said
    for found, expected in zip(*(jax.tree.leaves(final(one)) for one in (workdir, whole)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    names = ("reward/mean", "loss/total", "gradient/norm", "validation/pass@1")
    for found, expected in zip(tiny.left_behind(workdir)[0], tiny.left_behind(whole)[0], strict=True):
        np.testing.assert_allclose(*([row.get(name, 0) for name in names] for row in (found, expected)), rtol=1e-4)


@pytest.mark.slow
def test_another_config_is_refused_by_name(tmp_path, cache):
    for status, said in Run(tmp_path / "run", cache, cut="fsdp=4", last=("--config.scale.steps=13",)).ends():
        assert status == 1 and "process 1: config.scale.steps is 13, in process 0 12" in said, said
    assert not (tmp_path / "run").exists()
