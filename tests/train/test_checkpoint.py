"""The whole state comes back bit for bit, the right checkpoints are kept, and no broken one is ever loaded."""
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_jax.schedule import control
from rl_jax.train import checkpoint
from rl_jax.types import TrainState
from tests.ends import tiny

CONTROL = control.adaptive_kl(0.1, 0.02)
CURSOR = {"phase": 1, "done": 3, "data": {"position": {"next_index": 12}, "seed": 0}, "pending": False}


def state(seed: int = 0) -> TrainState:
    """Every kind of leaf that a run has, with numbers that round badly."""
    draw = np.random.default_rng(seed)
    parameters = {"policy": {"w": jnp.asarray(draw.normal(size=(3, 5)) / 3, jnp.float32),
                             "half": jnp.asarray(draw.normal(size=4), jnp.bfloat16)},
                  "critic": {"value": jnp.asarray(draw.normal(size=3), jnp.float32)}}
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0.0, 9)))
    gradient = jax.tree.map(lambda a: a * 0.3, parameters)
    updated = optimiser.update(gradient, optimiser.init(parameters), parameters)[1]
    return TrainState(step=jnp.asarray(seed + 7, jnp.int32), key=jax.random.fold_in(jax.random.key(3), seed),
                      parameters=parameters, optimiser=updated, frozen={"reference": {"w": jnp.asarray([[1 / 3], [2 / 7]], jnp.float32)}},
                      control={"beta": CONTROL.init(64)}, skipped=jnp.asarray(2, jnp.int32), carried={})


def shapes(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def filled(workdir, steps=(1, 2, 3)):
    """A directory with checkpoints of some steps."""
    with checkpoint.Checkpoints(workdir, keep_last=len(steps)) as saved:
        for step in steps:
            saved.save(step, state(step), CURSOR | {"done": step})
    return workdir / "checkpoints"


def test_the_whole_state_comes_back_bit_for_bit(tmp_path):
    before = state()
    with checkpoint.Checkpoints(tmp_path) as saved:
        saved.save(5, before, CURSOR)
    with checkpoint.Checkpoints(tmp_path) as saved:
        after = saved.restore(5, shapes(before))
        assert saved.cursor(5) == CURSOR
        parameters = saved.restore_parameters(5, shapes(before.parameters))
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert tiny.bits(after) == tiny.bits(before)
    assert tiny.bits(parameters) == tiny.bits(before.parameters)
    assert jax.random.normal(after.key) == jax.random.normal(before.key)


def test_replicas_and_their_keys_come_back(tmp_path):
    before = jax.tree.map(lambda *rows: jnp.stack(rows), state(0), state(1), state(2))
    with checkpoint.Checkpoints(tmp_path) as saved:
        saved.save(1, before, CURSOR)
        saved._manager.wait_until_finished()
        after = saved.restore(1, shapes(before))
    assert tiny.bits(after) == tiny.bits(before) and after.key.shape == (3,)


def test_rollouts_in_flight_come_back(tmp_path):
    pending = ({"tokens": np.arange(6, dtype=np.int32).reshape(2, 3)}, {"mask": np.array([True, False])})
    with checkpoint.Checkpoints(tmp_path) as saved:
        saved.save(1, state(), CURSOR, pending=pending)
        saved._manager.wait_until_finished()
        assert tiny.bits(saved.restore_pending(1, shapes(pending))) == tiny.bits(pending)


def test_what_is_saved_is_not_what_the_next_step_overwrites(tmp_path):
    """The state is donated to the next step while the checkpoint is still being written."""
    step = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)
    large = {"policy": jnp.arange(3_000_000, dtype=jnp.float32)}
    before = state()
    for attempt in range(1, 4):
        now = TrainState(**{**vars(before), "parameters": jax.tree.map(jnp.copy, large)})
        with checkpoint.Checkpoints(tmp_path, keep_best=0) as saved:
            saved.save(attempt, now, CURSOR)
            parameters = now.parameters
            for _ in range(5):
                parameters = step(parameters)
            jax.block_until_ready(parameters)
            saved._manager.wait_until_finished()
            assert tiny.bits(saved.restore_parameters(attempt, shapes(large))) == tiny.bits(large)


def test_the_newest_and_the_best_are_kept(tmp_path):
    scores = {1: 0.2, 2: 0.9, 3: checkpoint.NOT_VALIDATED, 4: 0.5, 5: checkpoint.NOT_VALIDATED, 6: 0.1, 7: 0.3}
    with checkpoint.Checkpoints(tmp_path, keep_last=2, keep_best=1) as saved:
        for step, score in scores.items():
            saved.save(step, state(step), CURSOR, score=score)
        saved._manager.wait_until_finished()
        assert saved.steps() == [2, 6, 7] and saved.latest() == 7 and saved.best() == 2
    with checkpoint.Checkpoints(tmp_path, keep_last=2, keep_best=1) as saved:  # and in the next process
        assert saved.steps() == [2, 6, 7] and saved.best() == 2
        assert tiny.bits(saved.restore(2, shapes(state()))) == tiny.bits(state(2))
        saved.save(8, state(8), CURSOR, score=0.95)
        saved._manager.wait_until_finished()
        assert saved.steps() == [7, 8] and saved.best() == 8


def test_ends_of_phases_are_kept(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep_last=1, keep_best=0, keep_steps=(2, 9)) as saved:
        for step in range(1, 6):
            saved.save(step, state(step), CURSOR)
        saved._manager.wait_until_finished()
        assert saved.steps() == [2, 5]


def test_without_validation_only_the_newest_are_kept_and_best_is_newest(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep_last=2, keep_best=1) as saved:
        assert saved.latest() is None and saved.best() is None and saved.steps() == []
        for step in range(1, 6):
            saved.save(step, state(step), CURSOR)
        saved._manager.wait_until_finished()
        assert saved.steps()[-2:] == [4, 5] and len(saved.steps()) <= 3
        assert saved.best() == saved.latest() == 5


def test_a_checkpoint_that_was_being_written_is_never_loaded(tmp_path):
    """What a kill leaves is a directory under a temporary name."""
    directory = filled(tmp_path)
    shutil.copytree(directory / "3", directory / "4.orbax-checkpoint-tmp")
    (directory / "4.orbax-checkpoint-tmp" / "commit_success.txt").unlink()
    shutil.copytree(directory / "3" / "parameters", directory / "5.orbax-checkpoint-tmp-7" / "parameters")
    with checkpoint.Checkpoints(tmp_path, keep_last=3) as saved:
        assert saved.steps() == [1, 2, 3] and saved.latest() == 3
        saved.save(4, state(4), CURSOR)
        saved._manager.wait_until_finished()
        assert saved.latest() == 4
        assert tiny.bits(saved.restore(4, shapes(state()))) == tiny.bits(state(4))


WRITER = """
import sys
import numpy as np, jax.numpy as jnp
from rl_jax.train import checkpoint
from tests.train import test_checkpoint as t
state = t.state()
big = {"policy": {str(i): jnp.full((300_000,), i + 0.5) for i in range(20)}}
with checkpoint.Checkpoints(sys.argv[1], keep_last=100) as saved:
    for step in range(1, 1000):
        saved.save(step, type(state)(**{**vars(state), "parameters": big}), t.CURSOR)
"""


def test_killed_while_writing(tmp_path):
    """A process that does nothing but save is killed; whatever it leaves, the newest checkpoint is whole."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], cwd=tiny.ROOT,
                               env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.DEVNULL)
    directory, limit = tmp_path / "checkpoints", time.monotonic() + 60
    while not (directory / "2").exists() and time.monotonic() < limit:
        time.sleep(0.002)
    while not list(directory.glob("*tmp*")) and time.monotonic() < limit:  # in the middle of one
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    large = {"policy": {str(i): jnp.full((300_000,), i + 0.5) for i in range(20)}}
    with checkpoint.Checkpoints(tmp_path, keep_last=100) as saved:
        newest = saved.latest()
        assert newest >= 2 and saved.cursor(newest) == CURSOR
        assert tiny.bits(saved.restore_parameters(newest, shapes(large))) == tiny.bits(large)


def data_file(directory, item) -> pathlib.Path:
    return max((directory / item).rglob("d/*"), key=lambda path: path.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


DAMAGES = {
    "parameters_truncated": lambda step: truncate(data_file(step, "parameters")),
    "parameters_deleted": lambda step: shutil.rmtree(step / "parameters"),
    "data_deleted": lambda step: data_file(step, "training").unlink(),
    "manifest_deleted": lambda step: (step / "training" / "manifest.ocdbt").unlink(),
    "metadata_truncated": lambda step: truncate(step / "parameters" / "_METADATA"),
    "cursor_truncated": lambda step: truncate(step / "cursor" / "metadata"),
    "everything_deleted": lambda step: [shutil.rmtree(step), step.mkdir()],
    "metrics_deleted": lambda step: shutil.rmtree(step / "metrics"),
    "metrics_truncated": lambda step: truncate(step / "metrics" / "metrics"),
    "checkpoint_metadata_deleted": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
}
HARMLESS = {"metrics_deleted", "checkpoint_metadata_deleted"}


def files(directory):
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


LOADER = """
import json, sys
from rl_jax.train import checkpoint
from tests.train import test_checkpoint as t
said = {}
for workdir, steps in json.loads(sys.argv[1]).items():
    try:
        with checkpoint.Checkpoints(workdir, keep_last=3) as saved:
            saved.cursor(saved.latest())
            saved.restore(saved.latest(), t.shapes(t.state() if steps else t.reshaped()))
    except ValueError as error:
        said[workdir] = str(error)
print(json.dumps(said))
"""


def reshaped() -> TrainState:
    """A state of another network."""
    other = state()
    other.parameters["policy"]["w"] = jnp.zeros((4, 5))
    return other


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Directories by what was done to their newest checkpoint, their files since, and what a process said of each.

    In a process of its own, as Orbax leaves the coroutines of failed restores behind.
    """
    root, before = tmp_path_factory.mktemp("damaged"), {}
    for damage, do in DAMAGES.items():
        do(filled(root / damage) / "3")
        before[damage] = files(root / damage)
    filled(root / "another_shape")
    known = {str(root / name): name != "another_shape" for name in (*DAMAGES, "another_shape")}
    process = subprocess.run([sys.executable, "-c", LOADER, json.dumps(known)], cwd=tiny.ROOT, text=True,
                             env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return root, before, json.loads(process.stdout)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_corrupt_checkpoint_is_refused_by_name_and_left_alone(damaged, damage):
    root, before, said = damaged
    workdir = root / damage
    if damage in HARMLESS:  # nothing that a run reads is missing
        assert str(workdir) not in said
    else:
        message = said[str(workdir)]
        assert f"{workdir / 'checkpoints' / '3'} cannot be read" in message
        assert "Move that directory away" in message and "[1, 2]" in message
    assert files(workdir) == before[damage]
    shutil.move(workdir / "checkpoints" / "3", workdir / "away")
    with checkpoint.Checkpoints(workdir, keep_last=3) as saved:
        assert saved.latest() == 2 and saved.cursor(2)["done"] == 2
        assert tiny.bits(saved.restore(2, shapes(state()))) == tiny.bits(state(2))


def test_another_shape_is_refused(damaged):
    root, _, said = damaged
    assert f"{root / 'another_shape' / 'checkpoints' / '3'} cannot be read" in said[str(root / "another_shape")]


def test_a_step_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    filled(tmp_path)
    with checkpoint.Checkpoints(tmp_path, keep_last=3) as saved, pytest.raises(ValueError, match=r"\[1, 2, 3\]"):
        saved.cursor(9)
