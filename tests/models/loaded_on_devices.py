"""Prints, as JSON, where checkpoints lie when they are loaded over 8 devices, and whether their numbers are the same.

Run as a process: XLA makes its devices when it starts.
"""
import json
import os
import pathlib
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import numpy as np

from rl_jax.models import lora, pretrained, safetensors, sharding
from rl_jax.models.lora import Adapters
from rl_jax.models.network import Network
from tests.models import published_shapes

MESHES = {"fsdp 2, tensor 2, expert 2": {"fsdp": 2, "tensor": 2, "expert": 2},
          "fsdp 2, tensor 4": {"fsdp": 2, "tensor": 4}, "fsdp 8": {"fsdp": 8}}
RUNS = (("qwen3_moe", "fsdp 2, tensor 2, expert 2", "scanned", None), ("gemma2", "fsdp 2, tensor 4", "scanned", None),
        ("llama", "fsdp 8", "unrolled", "bfloat16"))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 24, (2, 7)), jnp.int32)


def mesh_of(name):
    axes = MESHES[name]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


def recorded(load):
    """What `load` returns, and the largest number of entries that it asked a file for at a time."""
    sizes, read = [0], safetensors.Folder.read

    def note(folder, name, where, dtype):
        found = read(folder, name, where, dtype)
        sizes.append(found.size)
        return found

    safetensors.Folder.read = note
    try:
        return load(), max(sizes)
    finally:
        safetensors.Folder.read = read


def lies(leaf):
    """How much of a parameter a device holds, and over how many devices its parts are spread."""
    held = {}
    for shard in leaf.addressable_shards:
        held.setdefault(str(shard.index), []).append(shard.data.size)
    return {"whole": leaf.size, "held": max(max(sizes) for sizes in held.values()), "parts": len(held),
            "devices": len(leaf.addressable_shards), "spec": [str(axis) for axis in leaf.sharding.spec]}


def measured(folder, name, mesh_name, layers, dtype):
    """One checkpoint, with and without a mesh."""
    mesh, how = mesh_of(mesh_name), {"scan_layers": layers == "scanned", "dtype": dtype}
    plain, (cut, largest) = pretrained.load(folder, **how), recorded(lambda: pretrained.load(folder, mesh=mesh, **how))
    leaves = {"/".join(str(key.key) for key in path): leaf for path, leaf in
              jax.tree_util.tree_leaves_with_path(cut.parameters)}
    numbers = [jax.tree.map(np.asarray, policy.parameters) for policy in (plain, cut)]
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), *numbers)
    asked = jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted, cut.parameters,
                         sharding.shardings(plain.parameters, mesh))
    return {"label": f"{name}, {mesh_name}, {layers}", "same": all(jax.tree.leaves(same)),
            "asked": all(jax.tree.leaves(asked)), "parameters": {name: lies(leaf) for name, leaf in leaves.items()},
            "largest_read": largest, "logits": apart(plain, cut)}


def apart(one, other):
    """By how much the logits of two policies differ."""
    return float(np.abs(np.asarray(jax.jit(one.logits)(TOKENS)) - np.asarray(jax.jit(other.logits)(TOKENS))).max())


def adapted(folder):
    """Adapters beside weights that are cut: by how much the logits differ from those on one device, and their place."""
    network = Network(published_shapes.SHAPES["llama"], Adapters(rank=2))
    policy = pretrained.Policy(network, published_shapes.drawn(network))
    pretrained.save(pretrained.Policy(Network(network.shape), lora.without(policy.parameters)), folder / "base")
    pretrained.save_adapters(policy, folder / "adapters", str(folder / "base"))
    one, many = (pretrained.load(folder / "adapters", mesh=mesh) for mesh in (None, mesh_of("fsdp 2, tensor 4")))
    query = many.parameters["blocks"][0]["query"]
    return {"logits": apart(one, many), "in": lies(query["adapter_in"]), "out": lies(query["adapter_out"])}


def main():
    with tempfile.TemporaryDirectory() as made:
        found, folder = [], pathlib.Path(made)
        for name, *how in RUNS:
            policy = published_shapes.policy(published_shapes.SHAPES[name])
            pretrained.save(policy, folder / name, shard_bytes=2_000)
            found.append(measured(folder / name, name, *how))
        print(json.dumps({"runs": found, "adapters": adapted(folder)}))


if __name__ == "__main__":
    main()
