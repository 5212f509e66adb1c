"""The same program on one device and on meshes of 2, 4 and 8: losses, gradients, tokens, weights."""
import json
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
        counts = [int(part.split("=")[1]) for part in name.split(",")]
        product = 1
        for count in counts:
            product *= count
        assert one["devices"] == product
        assert (one["cut"] > 0) == ("data" not in name or "," in name), "weights are cut by fsdp and tensor"


def test_grpo_on_eight_devices():
    """The one that is always run: a reference, group statistics, every axis at once."""
    agrees(on_meshes("baselines.grpo", 3, "data=2,fsdp=2,tensor=2"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", BASELINES)
def test_every_baseline(recipe):
    agrees(on_meshes(recipe, 20, *MESHES), drawn=recipe != "baselines.sft")
