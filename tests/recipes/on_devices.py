"""Prints, as JSON, how far each recipe's loss and gradient on 2 and 8 devices are from those on one.

Run as a process: XLA makes its devices when it starts. In float64, so that sums in another order agree far below the bound.
"""
import importlib
import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_X64"] = "1"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import numpy as np

from rl_jax.learner import update
from tests.recipes import toy

PROMPTS = 8


def sharded(tree, mesh):
    """Every array with its leading axis over the devices."""
    def put(a):
        spec = jax.sharding.PartitionSpec("data") if a.ndim and a.shape[0] % mesh.size == 0 else jax.sharding.PartitionSpec()
        return jax.device_put(a, jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)


def difference(found, expected):
    """The largest difference, as a share of the largest entry (at least 1e-3)."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(np.asarray(b)).max(), 1e-3)) for a, b in pairs)


def measured(name):
    """{devices: difference} of one recipe."""
    recipe = vars(importlib.import_module(f"rl_jax.recipes.{name}"))[name.rsplit(".", 1)[-1]]()
    x = toy.experience(recipe, count=PROMPTS)
    x, policy = jax.tree.map(lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a,
                             (x, toy.policy(x)))
    run = jax.jit(jax.value_and_grad(lambda policy, x: update.batch_loss(recipe, policy, x)[0]))
    expected = run(policy, x)
    found = {}
    for count in (2, 8):
        mesh = jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:count])
        placed = sharded((policy, x), mesh)
        assert len(placed[1].mask.sharding.device_set) == count
        found[count] = difference(run(*placed), expected)
    assert np.isfinite(float(expected[0])) and jnp.abs(expected[1].logp).max() > 0
    return found


if __name__ == "__main__":
    print(json.dumps({name: measured(name) for name in sys.argv[1:]}))
