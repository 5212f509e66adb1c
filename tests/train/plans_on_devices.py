"""Prints, as JSON, what is planned for meshes of fake devices, and what a step that was really run there holds.

Run as a process, as XLA makes its devices when it starts: plans_on_devices MESH ... with MESH such as data=2,tensor=2.
"""
import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # what the partitioner has to say of toy shapes

import jax

from rl_jax import experiment
from rl_jax.models.network import Network
from rl_jax.train import footprint, loop
from tests.ends import tiny

MODEL = {"width": 16, "layers": 2, "heads": 4, "key_heads": 2, "head_size": 8, "inner": 32, "tied": False,
         "scan_layers": True, "remat": True}


def config(sizes, **scale):
    """GRPO with a reference on a mesh."""
    return tiny.config("toys.token_tree", "baselines.grpo", task_args={"depth": 2, "branching": 5}, prompts_per_step=8,
                       recipe_args={"beta": 0.01, "group_size": 2}, mesh=sizes, model=MODEL, **scale)


def on_one_device(tree):
    """Bytes of real arrays on the first device."""
    return sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(tree))


def measured(sizes):
    """The plan, from shapes; then a step from arrays, and what they hold."""
    parsed = experiment.parse(config(sizes))
    found = footprint.footprint(parsed, 0)
    mesh = footprint.mesh_of(parsed)
    with footprint.on(mesh):
        one = loop.PhaseLoop(parsed.phases[0], parsed.task, Network(parsed.shape), shown_groups=1, mesh=mesh)
        state = one.initial_state(jax.random.key(0))
        real = {"policy, trained": on_one_device(state.parameters), "optimiser": on_one_device(state.optimiser),
                "reference, frozen": on_one_device(state.frozen)}
        next(iter(one.ticks(state, one.stream(0))))
        analysis = one.compiled["step"].memory_analysis()
    needed = (analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
              - analysis.alias_size_in_bytes)
    return {"held": found.held, "rollout": found.rollout, "update": found.update, "rest": found.rest, "total": found.total,
            "flops": found.flops, "real": real, "needed": needed}


def on_host(sizes):
    """The plan where reference and optimiser state are kept in host memory."""
    found = footprint.footprint(experiment.parse(config({**sizes, "offload": ("reference", "optimiser")})), 0)
    return {"held": found.held, "away": found.away, "total": found.total}


if __name__ == "__main__":
    planned = {name: {axis: int(size) for axis, size in (part.split("=") for part in name.split(","))}
               for name in sys.argv[1:]}
    print(json.dumps({**{name: measured(sizes) for name, sizes in planned.items()},
                      "on host": on_host(next(iter(planned.values())))}))
