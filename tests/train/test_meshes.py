"""The same program on one device and on meshes of 2, 4 and 8: losses, gradients, tokens, weights."""
import json
import math
import subprocess
import sys

import pytest

from rl_jax import sections
from tests.ends import tiny

BASELINES = [name for name in sections.names("rl_jax.recipes") if name.startswith("baselines.")]
MESHES = ("data=2", "fsdp=4", "tensor=8", "data=2,fsdp=2,tensor=2")
BOUND = 1e-4


def on_meshes(recipe, steps, *meshes, **options):
    """What the child process prints."""
    done = subprocess.run([sys.executable, "-m", "tests.train.meshes_on_devices", recipe, str(steps), json.dumps(options),
                           *meshes], cwd=tiny.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def agrees(found, *, drawn=True, bound=BOUND):
    assert found["gradient"] > 1e-4, "where nothing is to be learned, equal runs would show nothing"
    assert (found["drawn"] > 0) == drawn
    for name, one in found["meshes"].items():
        assert max(one["apart"].values()) < bound, (name, one["apart"])
        assert one["same"], f"{name} drew other tokens"
        assert one["devices"] == math.prod(int(part.split("=")[1]) for part in name.split(","))
        assert (one["cut"] > 0) == any(axis in name for axis in ("fsdp", "tensor", "expert")), "these axes cut weights"


def test_grpo_on_eight_devices():
    """The one that is always run: a reference, group statistics, every axis at once."""
    agrees(on_meshes("baselines.grpo", 3, "data=2,fsdp=2,tensor=2"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", BASELINES)
def test_every_baseline(recipe):
    agrees(on_meshes(recipe, 20, *MESHES), drawn=recipe != "baselines.sft")


@pytest.mark.slow
def test_rows_that_are_cut_to_the_longest_answer():
    """Answers of at most three tokens, in six positions; over devices that cut the positions, too."""
    found = on_meshes("baselines.sft", 3, "data=2,fsdp=2,tensor=2", "fsdp=2,sequence=2", task="reasoning_gym",
                      batching={"length_buckets": 2}, task_args={
        "generator": "chain_sum", "keep_after": ": ", "prompt_length": 16, "completion_length": 6, "train_size": 8,
        "validation_size": 4, "held_out_size": 4,
        "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}})
    agrees(found, drawn=False)
    assert [one["positions"] for one in found["meshes"].values()] == [0.5, 0.5]


def test_what_is_kept_on_the_host_changes_nothing():
    """Reference and optimiser state lie in host memory between steps, on one device and on four, and come back from there."""
    meshes = {name: json.dumps(mesh) for name, mesh in {
        "alone": {}, "one": {"offload": ("reference", "optimiser")}, "cut": {"fsdp": 4, "offload": ("reference", "optimiser")},
        "here": {"fsdp": 4}}.items()}
    done = subprocess.run([sys.executable, "-m", "tests.train.offloaded_on_devices", *meshes.values()], cwd=tiny.ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("one", "cut"):
        assert found[meshes[name]]["kinds"] == {"parameters": ["device"], "optimiser": ["pinned_host"], "reference": ["pinned_host"]}
    assert found[meshes["here"]]["kinds"]["optimiser"] == ["device"]
    assert found[meshes["one"]]["loss"] == pytest.approx(found[meshes["alone"]]["loss"], abs=1e-5)
    assert found[meshes["cut"]]["loss"] == found[meshes["here"]]["loss"]
    assert found[meshes["cut"]]["weights"] == found[meshes["here"]]["weights"]


@pytest.mark.slow
def test_the_tokens_of_long_answers_are_cut():
    """Two prompts of one answer each cannot be cut over eight devices: the sequence axis cuts their tokens."""
    agrees(on_meshes("baselines.grpo", 3, "sequence=4", "data=2,sequence=2,tensor=2"))


@pytest.mark.slow
def test_mixtures_of_experts():
    mixture = {"experts": 4, "chosen": 2, "inner": 16, "normalised": True}
    agrees(on_meshes("baselines.grpo", 5, "expert=4", "fsdp=2,expert=2,tensor=2", model={"mixture": mixture}))


@pytest.mark.slow
def test_adapters_and_microbatches():
    scale = {"train": "lora", "lora": {"rank": 4, "alpha": 8.0, "targets": "query|down"}, "microbatches": 2}
    agrees(on_meshes("baselines.grpo", 5, "fsdp=4", "data=2,tensor=4", scale=scale))


@pytest.mark.slow
def test_scanned_layers():
    agrees(on_meshes("baselines.grpo", 5, "fsdp=2,tensor=4", model={"scan_layers": True, "remat": True}))
