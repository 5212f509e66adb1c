"""A run that is killed and resumed ends as one that was never killed, to the last bit."""
import os
import pathlib
import random
import signal
import time

import orbax.checkpoint as ocp
import pytest

from tests.ends import tiny

CONFIG = pathlib.Path(__file__).with_name("tiny_config.py")
STEPS = {"pure": 50, "split": 24}


@pytest.fixture(scope="module")
def start(tmp_path_factory, cache_directory):
    """start(kind, name) -> (process, workdir) of a training run."""
    root = tmp_path_factory.mktemp("runs")

    def start(kind, name):
        workdir = root / f"{kind}_{name}"
        return tiny.Script("train.py", f"--config={CONFIG}:{kind}", f"--workdir={workdir}", cache=cache_directory), workdir

    return start


@pytest.fixture(scope="module")
def whole(start):
    """Workdirs of uninterrupted runs, one of each kind."""
    def ended(kind):
        process, workdir = start(kind, "whole")
        status, said = process.end()
        assert status == 0, said
        drawn = [row["gradient/norm"] for row in tiny.left_behind(workdir)[0] if "reward/mean" in row]
        assert sum(norm > 1e-3 for norm in drawn) > len(drawn) // 2, "there is something to learn"
        return workdir

    return {kind: ended(kind) for kind in STEPS}


def final_state(workdir, kind):
    """Parameters, optimiser, key, control state and cursor of the last checkpoint, as they lie on the disk."""
    step = workdir / "checkpoints" / str(STEPS[kind])
    with ocp.StandardCheckpointer() as saved:
        state = [saved.restore(step / item) for item in ("parameters", "training")]
    return tiny.bits(state), (step / "cursor" / "metadata").read_text()


def assert_same_end(workdir, whole, kind):
    assert final_state(workdir, kind) == final_state(whole[kind], kind)
    assert tiny.left_behind(workdir) == tiny.left_behind(whole[kind])
    assert [row["step"] for row in tiny.left_behind(workdir)[0] if "loss/total" in row] == [*range(1, STEPS[kind] + 1)]


def test_killed_twice_in_one_program(start, whole):
    """Once in the supervised phase, once in the phase after it, each at a step that chance chooses."""
    for first, last in ((1, 8), (14, 40)):
        process, workdir = start("pure", "killed")
        step = random.randint(first, last)
        process.until(lambda step=step, workdir=workdir: tiny.last_step(workdir) >= step)
        process.kill()
        assert process.process.returncode == -signal.SIGKILL and tiny.last_step(workdir) < STEPS["pure"]
    status, said = start("pure", "killed")[0].end()
    assert status == 0 and f"resuming {workdir} after step" in said, said
    assert_same_end(workdir, whole, "pure")


def test_killed_inside_a_two_program_step(start, whole):
    """While the host scores one batch (its workers are held still) and the next one is in flight."""
    process, workdir = start("split", "killed")
    step = random.randint(5, 16)
    process.until(lambda: tiny.last_step(workdir) >= step)
    workers = process.workers()
    assert len(workers) == 1
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    reached = tiny.last_step(workdir)
    time.sleep(0.5)
    held = tiny.last_step(workdir)
    assert held - reached <= 2, "the run goes on although nothing can be scored"
    time.sleep(0.2)
    assert tiny.last_step(workdir) == held < STEPS["split"] - 1
    process.kill()
    status, said = start("split", "killed")[0].end()
    assert status == 0 and f"resuming {workdir} after step" in said, said
    assert_same_end(workdir, whole, "split")
