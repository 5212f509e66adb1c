"""Where parameters lie on a mesh: the table, and what `loaded_on_devices` found as a process with 8 devices."""
import json
import pathlib
import subprocess
import sys

import jax
import pytest
from jax.sharding import PartitionSpec

from rl_jax.models import heads, sharding, weights
from rl_jax.models.network import Network
from tests.models import published_shapes

ROOT = pathlib.Path(__file__).parents[2]


def abstract(**axes):
    return jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))


MESH = abstract(fsdp=2, tensor=4, expert=3)
SPECS = {
    ("embedding",): ((8, 6), ("tensor", "fsdp")), ("head",): ((8, 6), ("tensor", "fsdp")),
    ("score",): ((1, 6), (None, "fsdp")), ("value",): ((6,), ("fsdp",)), ("final", "scale"): ((6,), (None,)),
    ("blocks", 0, "query", "weight"): ((6, 8), ("fsdp", "tensor")),
    ("blocks", 0, "value", "weight"): ((6, 8), ("fsdp", "tensor")),
    ("blocks", 0, "key", "bias"): ((8,), ("tensor",)), ("blocks", 0, "out", "weight"): ((8, 6), ("tensor", "fsdp")),
    ("blocks", 0, "gate", "weight"): ((6, 12), ("fsdp", "tensor")),
    ("tail", 0, "up", "weight"): ((6, 12), ("fsdp", "tensor")),
    ("blocks", 0, "down", "weight"): ((12, 6), ("tensor", "fsdp")),
    ("blocks", 0, "query", "adapter_in"): ((6, 4), ("fsdp", None)),
    ("blocks", 0, "query", "adapter_out"): ((4, 8), (None, "tensor")),
    ("blocks", 0, "down", "adapter_in"): ((12, 4), ("tensor", None)),
    ("blocks", 0, "down", "adapter_out"): ((4, 6), (None, "fsdp")),
    ("blocks", 0, "query_norm", "scale"): ((8,), (None,)), ("blocks", 0, "before_inner", "scale"): ((6,), (None,)),
    ("blocks", 0, "mixture", "gate"): ((9, 6, 4), ("expert", "fsdp", "tensor")),
    ("blocks", 0, "mixture", "up"): ((9, 6, 4), ("expert", "fsdp", "tensor")),
    ("blocks", 0, "mixture", "down"): ((9, 4, 6), ("expert", "tensor", "fsdp")),
    ("blocks", 0, "mixture", "router"): ((6, 9), ("fsdp", None)),
}


@pytest.mark.parametrize("path", SPECS, ids=lambda path: "/".join(map(str, path)))
def test_what_cuts_each_axis(path):
    """Layers that are stacked are an axis in front, which nothing cuts."""
    shape, expected = SPECS[path]
    assert sharding.spec(path, shape, MESH) == PartitionSpec(*expected)
    assert sharding.spec(path, (5, *shape), MESH) == PartitionSpec(None, *expected)
    assert sharding.spec(path, shape, abstract(data=2)) == PartitionSpec(*(None,) * len(shape))
    alone = [axis if axis == "fsdp" else None for axis in expected]
    assert sharding.spec(path, shape, abstract(fsdp=2)) == PartitionSpec(*alone)


def test_what_does_not_divide_stays_whole():
    assert sharding.spec(("embedding",), (9, 6), MESH) == PartitionSpec(None, "fsdp")
    assert sharding.spec(("blocks", 0, "down", "weight"), (12, 5), MESH) == PartitionSpec("tensor", None)


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "gemma3_text"])
def test_every_matrix_of_every_family_is_cut(name):
    """By a mesh that divides everything, each is cut along all of its last two axes, or three for experts."""
    network = Network(published_shapes.SHAPES[name])
    mesh = abstract(fsdp=2, tensor=2, expert=2)
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights.shapes_of(network)):
        names = tuple(key.key for key in path)
        cut = sharding.spec(names, leaf.shape, mesh)
        expected = {"scale": 0, "bias": 1, "router": 1}.get(names[-1], 3 if "mixture" in names else 2)
        assert len(cut) == leaf.ndim and sum(axis is not None for axis in cut) == expected, names


def test_a_critic_has_a_place_too():
    network = Network(published_shapes.PLAIN)
    critic = jax.eval_shape(lambda p: heads.critic_from(network, p), weights.shapes_of(network))
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    found = sharding.shardings({"critic": critic}, mesh)["critic"]
    assert found["value"].spec == PartitionSpec("fsdp")
    assert found["body"]["blocks"][0]["value"]["weight"].spec == PartitionSpec("fsdp", "tensor")
    assert isinstance(sharding.of(("embedding",), (2, 2), None), jax.sharding.SingleDeviceSharding)


@pytest.fixture(scope="module")
def found():
    """What was measured."""
    done = subprocess.run([sys.executable, "-m", "tests.models.loaded_on_devices"], cwd=ROOT, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_numbers_are_those_of_one_device(found):
    assert len(found["runs"]) == 3
    for run in found["runs"]:
        assert run["same"] and run["asked"], run["label"]
        assert run["logits"] < 1e-4, run["label"]


def test_no_device_holds_a_whole_matrix(found):
    """Each of the 8 holds its part; of what is asked of a file, nothing is larger than a part of the largest tensor."""
    for run in found["runs"]:
        for name, lies in run["parameters"].items():
            cuts = [axis for axis in lies["spec"] if axis != "None"]
            assert lies["devices"] == 8, (run["label"], name)
            assert lies["held"] * lies["parts"] == lies["whole"]
            if name.split("/")[-1] not in ("scale", "bias", "router"):
                assert lies["parts"] >= 2 and cuts, (run["label"], name)
        largest = run["parameters"]["embedding"]
        assert run["largest_read"] <= largest["held"], run["label"]


def test_every_matrix_is_cut_as_far_as_the_mesh_goes(found):
    parts = {run["label"]: {name: lies["parts"] for name, lies in run["parameters"].items()} for run in found["runs"]}
    stacked = parts["qwen3_moe, fsdp 2, tensor 2, expert 2, scanned"]
    names = ("blocks/0/mixture/down", "tail/0/mixture/gate", "blocks/1/up/weight")
    assert [stacked[name] for name in names] == [8, 8, 4]
    assert (stacked["embedding"], stacked["head"], stacked["blocks/0/mixture/router"]) == (4, 4, 2)
    windowed = parts["gemma2, fsdp 2, tensor 4, scanned"]
    assert (windowed["blocks/1/down/weight"], windowed["tail/0/query/weight"]) == (8, 8)
    alone = parts["llama, fsdp 8, unrolled"]
    assert (alone["head"], alone["blocks/1/out/weight"], alone["final/scale"]) == (8, 8, 1)


def test_adapters_lie_where_their_projection_does(found):
    assert found["adapters"]["logits"] < 1e-4
    assert found["adapters"]["in"]["spec"] == ["fsdp", "None"] and found["adapters"]["in"]["parts"] == 2
    assert found["adapters"]["out"]["spec"] == ["None", "tensor"] and found["adapters"]["out"]["parts"] == 4
