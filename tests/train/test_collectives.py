"""What devices exchange: read from a program's text, and what the update on a mesh never exchanges."""
import pathlib
import sys

import pytest

from rl_jax.train import collectives

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))
import benchmark_collectives  # noqa: E402  (scripts are no package)

TEXT = """
  %all-gather.1 = f32[256,128]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %all-reduce.2 = (f32[4]{0}, bf16[8,2]{1,0}) all-reduce(%a, %b), to_apply=%add
  %fused = f32[3]{0} fusion(%all-reduce.2), kind=kLoop
  ROOT %ags = (f32[2,3]{1,0}, f32[8,3]{1,0}) all-gather-start(%q), dimensions={0}
"""


def test_collectives_are_read_from_the_text():
    found = collectives.of(TEXT)
    assert [(one.kind, one.shapes, one.bytes) for one in found] == [
        ("all-gather", ((256, 128),), 4 * 256 * 128), ("all-reduce", ((4,), (8, 2)), 16 + 32),
        ("all-gather", ((8, 3),), 96)]
    assert collectives.table(found) == {"all-gather": (2, 4 * 256 * 128 + 96), "all-reduce": (1, 48)}


@pytest.fixture(scope="module")
def found():
    names = ("data=1:8", "data=2:16", "tensor=4:8", "data=2,fsdp=2,tensor=2:32")
    return dict(zip(names, benchmark_collectives.measured(names), strict=True))


def test_neither_logits_nor_the_whole_vocabulary_are_gathered(found):
    """V = 8,192 tokens: over "tensor" a device makes the logits of its own, and what crosses has no such axis."""
    size, width = benchmark_collectives.SIZES["vocabulary"], benchmark_collectives.SIZES["width"]
    for name in ("tensor=4:8", "data=2,fsdp=2,tensor=2:32"):
        shapes = [tuple(shape) for shape in found[name]["shapes"]]
        assert shapes, name
        assert not [shape for shape in shapes if size in shape], name
        tensor = 4 if name.startswith("tensor") else 2
        own = [shape for shape in shapes if size // tensor in shape and width in shape]
        assert tensor == 4 or own, "over fsdp a device gathers the rows of its own tokens"


def test_one_device_exchanges_nothing(found):
    assert found["data=1:8"]["collectives"] == {} and found["data=1:8"]["bytes"] == 0


def test_data_parallel_devices_compute_as_before_and_add_up_one_gradient(found):
    """Twice the prompts on twice the devices: the same work each; what crosses is the gradient and a few sums.

    The parts of a weight's gradient that come from prompts and from answers are added up over devices one by one."""
    alone, two = found["data=1:8"], found["data=2:16"]
    assert abs(two["flops"] / alone["flops"] - 1) < 0.05
    assert set(two["collectives"]) == {"all-reduce"}
    assert 1.0 <= two["bytes"] / two["parameter_bytes"] < 2.0


def test_what_is_held_is_cut(found):
    alone = found["data=1:8"]["held"]
    assert found["data=2:16"]["held"] == alone
    assert found["tensor=4:8"]["held"] < 0.3 * alone and found["data=2,fsdp=2,tensor=2:32"]["held"] < 0.3 * alone
