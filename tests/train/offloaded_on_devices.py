"""Prints, as JSON, where a state lies between steps when parts of it are kept on the host, and what the run then learns."""
import json
import os
import pathlib
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"

import jax

from rl_jax import experiment
from rl_jax.models import mesh as meshes
from rl_jax.models.network import Network
from rl_jax.train import loop
from tests.ends import tiny

RUN = {"recipe": "baselines.grpo", "task": "toys.token_tree", "task_args": {"depth": 2, "branching": 5}, "prompts_per_step": 4,
       "recipe_args": {"group_size": 8}, "steps": 4}


def kinds(mesh):
    """Memory kinds of the parts of a state after its first step."""
    parsed = experiment.parse(tiny.config(**RUN, mesh=mesh))
    made = meshes.make(parsed.mesh)
    with jax.set_mesh(made):
        one = loop.PhaseLoop(parsed.phases[0], parsed.task, Network(parsed.shape), mesh=made, offload=parsed.mesh.offload)
        state = next(one.ticks(one.initial_state(jax.random.key(0)), one.stream(0))).state
    parts = {"parameters": state.parameters, "optimiser": state.optimiser, "reference": state.frozen["reference"]}
    return {name: sorted({a.sharding.memory_kind for a in jax.tree.leaves(part) if a.ndim}) for name, part in parts.items()}


def main(*names):
    found = {}
    for name in names:
        mesh = json.loads(name)
        with tempfile.TemporaryDirectory() as folder:
            finished, _ = tiny.train(pathlib.Path(folder), tiny.config(**RUN, mesh=mesh))
            left = tiny.left_behind(pathlib.Path(folder))[0]
        found[name] = {"kinds": kinds(mesh) if mesh else None, "loss": [row["loss/total"] for row in left],
                       "weights": [float(abs(a).sum()) for a in jax.tree.leaves(finished.policy)]}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
