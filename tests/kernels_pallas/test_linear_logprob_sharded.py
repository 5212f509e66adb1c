"""What `linear_logprob_on_devices` measured, as a process with 8 devices; and what is known without devices."""
import json
import pathlib
import subprocess
import sys

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.linear_logprob import sharded
from kernels_pallas.linear_logprob.op import linear_logprob
from kernels_pallas.linear_logprob.support import pack_support

ROOT = pathlib.Path(__file__).parents[2]
ROWS, WIDTH = 32, 8
SIZES = {"plain": 512, "whole words": 512, "cut words": 360, "bfloat16": 512}
# By name: over how many devices the rows and the vocabulary are cut.
CUTS = {"1x8": (1, 8), "2x4": (2, 4), "8x1": (8, 1), "4x1": (4, 1), "2x2x2": (4, 2), "rows": (8, 1),
        "vocabulary": (1, 4)}


@pytest.fixture(scope="module")
def found():
    """What was measured, an entry per layout, case and implementation; the contract holds if there is any."""
    done = subprocess.run([sys.executable, "-m", "tests.kernels_pallas.linear_logprob_on_devices"], cwd=ROOT, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _name(one):
    return f"{one['implementation']}, {one['layout']}, {one['case']}"


def test_every_layout_case_and_implementation_was_measured(found):
    assert {one["layout"] for one in found} == set(CUTS) and {one["case"] for one in found} == set(SIZES)
    assert {one["implementation"] for one in found} == {"xla", "pallas"}


def test_values_and_gradients_are_those_of_one_device(found):
    """log-probability, entropy and both gradients, relative to the largest entry."""
    worst = {_name(one): max(one["difference"]) for one in found}
    bound = lambda name: 2.0**-7 if "bfloat16" in name else 1e-5
    assert {name: value for name, value in worst.items() if not value <= bound(name)} == {}


def test_the_weight_gradient_is_not_divided_by_the_number_of_devices(found):
    """Its projection on that of one device, as a share."""
    scales = {_name(one): one["scale"] for one in found}
    assert {name: value for name, value in scales.items() if abs(value - 1) > 2e-3} == {}


def test_devices_exchange_statistics_and_gradients_once_and_nothing_else(found):
    """Forward a maximum and 4 sums a row over the vocabulary's devices, backward one gradient over each kind of axis.

    No device is sent weights, hidden states or logits, and nothing is exchanged inside a loop over blocks.
    """
    for one in found:
        rows, tokens = CUTS[one["layout"]]
        forward = [ROWS // rows, 4 * ROWS // rows] if tokens > 1 else []
        backward = [ROWS // rows * WIDTH] * (tokens > 1) + [SIZES[one["case"]] // tokens * WIDTH] * (rows > 1)
        sums = lambda numbers: [["all-reduce", count, False] for count in sorted(numbers)]
        assert one["forward"] == sums(forward), _name(one)
        assert one["both"] == sums(forward + backward), _name(one)


def _arrays(rows=4, size=40):
    random = np.random.default_rng(0)
    hidden, vocabulary = (jnp.asarray(random.normal(size=(n, 3)), jnp.float32) for n in (rows, size))
    return hidden, vocabulary, jnp.arange(rows)


@pytest.mark.parametrize("start, size", [(0, 45), (45, 45), (64, 32), (90, 70), (95, 1), (100, 60), (128, 32)])
def test_a_cut_support_is_that_of_the_tokens_alone(start, size):
    """Bits of other tokens are 0, in the last word too."""
    kept = np.random.default_rng(0).random((3, 160)) < 0.5
    expected = pack_support(jnp.asarray(kept[:, start:start + size]))
    cut = jax.jit(sharded.cut_support, static_argnums=2)
    np.testing.assert_array_equal(cut(pack_support(jnp.asarray(kept)), start, size), expected)


def test_a_mesh_of_one_device_changes_nothing():
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    layout, arrays = sharded.Layout(mesh, ("data",), "model"), _arrays()
    kept = jnp.broadcast_to(jnp.arange(40) < 9, (4, 40))
    options = {"temperature": 0.7, "soft_cap": 2.0, "support": pack_support(kept)}
    one = jax.jit(lambda *x: sharded.linear_logprob(*x, layout, **options))(*arrays)
    for x, y in zip(one, jax.jit(lambda *x: linear_logprob(*x, **options))(*arrays), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # jax 0.12 says so
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_kernels_lower_on_a_mesh(platform):
    """Qwen3-4B in bfloat16, 2 devices for the rows and 4 for the vocabulary, forward and gradient."""
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2,
                                     abstract_device=contract.DEVICES[platform])
    layout = sharded.Layout(mesh, ("data",), "model", "pallas")

    def loss(hidden, vocabulary, targets):
        return sum(x.sum() for x in sharded.linear_logprob(hidden, vocabulary, targets, layout))

    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in [
        ((2048, 2560), jnp.bfloat16), ((151936, 2560), jnp.bfloat16), ((2048,), jnp.int32)]]
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, (0, 1))).trace(*shapes).lower(lowering_platforms=(platform,))
    assert contract.KERNEL_CALL[platform] in lowered.as_text()


def test_what_is_wrong_is_said():
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for layout, sizes, message in [
            ((("data",), "tokens"), {}, "must name different axes of the mesh, which has .*data.*model"),
            ((("data", "model"), "model"), {}, "must name different axes"),
            (("data", "model"), {}, "Layout.rows must be a tuple of axes' names, not 'data'"),
            ((("data",), "model"), {"rows": 5}, "Over the 2 devices of .*data.* 5 rows do not divide; pad them"),
            ((("data",), "model"), {"size": 42}, "Over the 4 devices of .*model.* 42 tokens do not divide"),
            ((("data",), "model", "reference"), {}, "no implementation 'reference'; allowed are None and"),
            ((("data",), "model", "fast"), {}, "no implementation 'fast'")]:
        with pytest.raises(ValueError, match=message):
            sharded.linear_logprob(*_arrays(**sizes), sharded.Layout(mesh, *layout))
    with pytest.raises(ValueError, match="soft_cap must be positive"):
        sharded.linear_logprob(*_arrays(), sharded.Layout(mesh, ("data",), "model"), soft_cap=0)
