"""The plan against what a real step holds, on meshes of fake devices, and as a process."""
import json
import re
import subprocess
import sys

import pytest

from tests.ends import tiny
from tests.train import plans_on_devices

MESHES = ("fsdp=4", "data=2,tensor=2", "data=2,fsdp=2,tensor=2", "fsdp=2")


@pytest.fixture(scope="module")
def planned():
    """By mesh, what the child process prints."""
    done = subprocess.run([sys.executable, "-m", "tests.train.plans_on_devices", *MESHES], cwd=tiny.ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_what_is_held_is_exact_and_the_step_needs_what_was_planned(planned, mesh):
    found = planned[mesh]
    assert found["held"] == found["real"], "bytes of the arrays on one device"
    assert abs(found["total"] / found["needed"] - 1) < 0.05
    known = sum(found["held"].values()) + max(sum(found["rollout"].values()), sum(found["update"].values()))
    assert known + found["rest"] == found["total"]
    assert 0 < found["rest"] < 0.7 * found["total"], "of a toy the weights gathered for use are much"
    assert found["update"]["gradients"] == found["held"]["policy, trained"]


@pytest.mark.slow
def test_caches_and_what_is_kept_are_those_of_one_device(planned):
    network, tokens, prompts, group = plans_on_devices.MODEL, 2, 8, 2
    for mesh, rows, heads in (("fsdp=4", 4, 1), ("data=2,tensor=2", 2, 2), ("data=2,fsdp=2,tensor=2", 4, 2)):
        per_token = 2 * network["layers"] * network["key_heads"] * network["head_size"] * 4
        answers = prompts * group * tokens
        assert planned[mesh]["rollout"]["answer cache"] == answers * per_token // (rows * heads)
        inputs = network["layers"] * network["width"] * 4 * (answers + prompts * 1) // rows
        assert inputs <= planned[mesh]["update"]["kept for the backward pass"]


@pytest.mark.slow
def test_what_is_kept_in_host_memory_is_not_on_the_device(planned):
    found, before = planned["on host"], planned[MESHES[0]]
    assert found["away"] == {name: before["held"][name] for name in ("optimiser", "reference, frozen")}
    assert found["held"] == {"policy, trained": before["held"]["policy, trained"]}
    together = sum(before["held"].values()) + before["update"]["gradients"]
    assert together <= found["total"] <= before["total"], "down to the moment of the optimiser's step"


@pytest.mark.slow
def test_more_fsdp_takes_fewer_bytes_and_as_many_operations_in_all(planned):
    two, four = planned["fsdp=2"], planned["fsdp=4"]
    for name in two["held"]:
        assert four["held"][name] < 0.6 * two["held"][name]
    assert four["total"] < two["total"]
    for name in ("prefill", "update: forward and backward", "decode, 2 steps"):
        assert four["flops"][name] == pytest.approx(two["flops"][name] / 2, rel=0.02)


CONFIG = """
from tests.train import plans_on_devices
def get_config():
    return plans_on_devices.config({"data": 2, "fsdp": 2})
"""


def plan_of(tmp_path, *given):
    """What train.py --plan prints of the toy config, and its exit status."""
    path = tmp_path / "toy.py"
    path.write_text(CONFIG)
    before = sorted(tmp_path.rglob("*"))
    process = tiny.Script("train.py", f"--config={path}", "--plan", *given, cache=tmp_path.parent / "cache")
    status, said = process.end(timeout_s=900)
    assert sorted(one for one in tmp_path.rglob("*") if "__pycache__" not in one.parts) == before, "nothing is written"
    return status, said


def test_as_a_process_it_prints_roles_and_operations_without_devices_or_a_workdir(tmp_path):
    status, said = plan_of(tmp_path)
    assert status == 0, said
    assert "bytes on each of 4 devices (data 2, fsdp 2)" in said
    for name in ("policy, trained", "optimiser", "reference, frozen", "prompt cache", "answer cache", "gradients",
                 "kept for the backward pass", "other temporaries", "prefill", "forward and backward"):
        assert name in said, name
    assert "with " not in said, "no limit, no advice"


@pytest.mark.slow
def test_the_knob_that_it_names_brings_the_run_under_the_limit(tmp_path):
    _, said = plan_of(tmp_path)
    needed = kib(said)
    limit = 0.8 * needed
    status, said = plan_of(tmp_path, f"--plan_limit_gib={limit / 2**20}")
    assert status == 0, said
    fits = [line for line in said.splitlines() if re.search(r"│ yes +│", line)]
    assert fits, said
    command = fits[0].split("│")[1].split()
    status, said = plan_of(tmp_path, *command)
    assert status == 0 and kib(said) <= limit < needed, (command, said)


def kib(said):
    """The total that a plan printed."""
    return float(re.search(r"dearest moment +│ +([\d.,]+)", said)[1].replace(",", ""))
