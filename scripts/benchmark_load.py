"""Loading a published checkpoint, its time and the memory beyond the parameters: the table of `benchmark.py load`.

As a process (python scripts/benchmark_load.py <folder> <dtype> <layers>) it loads one and prints what that took.
"""
import dataclasses
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import benchmark_table  # noqa: E402  (beside this file)

from rl_jax.models import safetensors, weights  # noqa: E402
from rl_jax.models.families import published  # noqa: E402
from rl_jax.models.network import Network  # noqa: E402
from rl_jax.models.shape import Shape  # noqa: E402

MIB = 2**20
BLOCK = 1 << 20  # random numbers, repeated
VARIANTS = (("bfloat16", "unrolled"), ("float32", "unrolled"), ("bfloat16", "scanned"))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The network whose checkpoint is written in bfloat16, and the bytes of tensors per file."""

    shape: Shape
    shard_bytes: int


SIZES = Sizes(Shape(vocabulary=151936, width=1024, layers=54, heads=16, key_heads=8, head_size=128, inner=3072,
                    query_norm=True, rotary_base=1e6), 500_000_000)


def tables(sizes: Sizes, wanted: Callable[[str], bool]) -> list[benchmark_table.Table]:
    """Seconds and peak memory of a process that loads a checkpoint, for several kinds of parameters.

    Args:
      sizes: what is loaded.
      wanted: which rows, by name.
    """
    chosen = [variant for variant in VARIANTS if wanted(", ".join(variant))]
    if not chosen:
        return []
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        _write(sizes, folder)
        files = [file.stat().st_size for file in folder.glob("*.safetensors")]
        measured = [(variant, _load(folder, *variant)) for variant in chosen]
    largest = max(math.prod(leaf.shape) for leaf in _leaves(sizes.shape))
    rows, missed = [], []
    for (dtype, layers), found in measured:
        name, tensor = f"{dtype}, {layers}", largest * (4 if dtype == "float32" else 2)
        beyond, allowed = found["peak"] - found["before"] - found["parameters"], max(files) + tensor
        numbers = [found["parameters"], found["before"], found["peak"], beyond, max(files), tensor, allowed]
        rows.append((name, f"{found['seconds']:.2f}", f"{sum(files) / found['seconds'] / 1e9:.2f}",
                     *(f"{number / MIB:,.0f}" for number in numbers)))
        missed += [f"{name}: {beyond / MIB:,.0f} MiB beyond the parameters"] if beyond > allowed else []
    shape = sizes.shape
    caption = (f"{benchmark_table.circumstances()}: a checkpoint of {sum(files) / 1e9:.2f} GB in {len(files)} files of "
               f"bfloat16 ({shape.layers} layers of width {shape.width}, V = {shape.vocabulary:,}), just written, so "
               "read from the operating system's cache. Memory is the resident set of the process that loads, in MiB, "
               "pages of the open file among it; \"before\" is what it holds when it begins to load, \"beyond\" the peak "
               "without that and without the parameters. The target is the largest file and one tensor in the "
               "parameters' type.")
    columns = ("parameters", "s", "GB/s", "parameters, MiB", "before", "peak", "beyond", "largest file",
               "largest tensor", "target")
    return [benchmark_table.Table(caption, columns, tuple(rows), missed=tuple(missed))]


def _leaves(shape: Shape) -> list:
    import jax

    return jax.tree.leaves(weights.shapes_of(Network(shape)))


def _write(sizes: Sizes, folder: pathlib.Path) -> None:
    """A checkpoint of random numbers."""
    config = published.config_of(sizes.shape)
    like = weights.shapes_of(Network(sizes.shape))
    block = np.random.default_rng(0).normal(size=BLOCK).astype("bfloat16")

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for path, tensor in weights.layout(config, sizes.shape).items():
            shape = weights.at(like, path).shape
            for name in tensor.names:
                yield name, np.resize(block, shape[::-1] if tensor.transposed else shape)

    safetensors.write(folder, tensors(), sizes.shard_bytes)
    (folder / "config.json").write_text(json.dumps(config))


def _load(folder: pathlib.Path, dtype: str, layers: str) -> dict[str, float]:
    """What a process of its own says about loading it.

    Raises:
      RuntimeError: what it said, if it failed.
    """
    done = subprocess.run([sys.executable, __file__, str(folder), dtype, layers], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        raise RuntimeError(f"loading {dtype}, {layers} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _resident(field: str) -> int:
    """Bytes of resident memory of this process, now ("VmRSS") or at most ("VmHWM")."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def measure(folder: str, dtype: str, layers: str) -> dict[str, float]:
    """Loads a checkpoint in this process: seconds, and bytes resident before, at most, and in the parameters."""
    import jax

    from rl_jax.models import pretrained

    jax.block_until_ready(jax.numpy.zeros(1))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
    before, began = _resident("VmRSS"), time.perf_counter()
    policy = pretrained.load(folder, dtype=dtype, scan_layers=layers == "scanned")
    jax.block_until_ready(policy.parameters)
    seconds = time.perf_counter() - began
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(policy.parameters)) if jax.default_backend() == "cpu" else 0
    return {"seconds": seconds, "before": before, "peak": _resident("VmHWM"), "parameters": held}


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
