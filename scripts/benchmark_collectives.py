"""What a step computes and exchanges as the mesh grows: the tables of `benchmark.py collectives`.

As a process (python scripts/benchmark_collectives.py MESH ...) it compiles the update of one batch on fake devices and
prints what XLA says of it.
"""
import json
import os
import pathlib
import subprocess
import sys

if __name__ == "__main__":  # XLA makes its devices when it starts
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import benchmark_table

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZES = {"vocabulary": 8192, "width": 256, "layers": 4, "heads": 8, "key_heads": 8, "head_size": 32, "inner": 1024, "tied": False}
PROMPTS, GROUP, TOKENS, PROMPT_TOKENS = 8, 4, 32, 32
# each with as many prompts as it says: the batch grows with the devices that cut it, in the last rows it does not
GROWING = ("data=1:8", "data=2:16", "data=4:32", "data=8:64", "fsdp=2:16", "fsdp=4:32", "fsdp=8:64", "tensor=2:8",
           "tensor=4:8", "tensor=8:8", "data=2,fsdp=2,tensor=2:32")


def measured(meshes: tuple[str, ...]) -> list[dict]:
    """What XLA says of the update on each mesh, asked in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *meshes], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def tables(wanted, plot: bool = False) -> list[benchmark_table.Table]:
    """FLOPs and bytes exchanged per device.

    Args:
      wanted: which rows, by name.
      plot: whether to draw them, too, into benchmarks/collectives.svg.
    """
    names = tuple(name for name in GROWING if wanted(name))
    if not names:
        return []
    rows, numbers = [], measured(names)
    if plot:
        _draw(dict(zip(names, numbers, strict=True)))
    for name, found in zip(names, numbers, strict=True):
        mesh, prompts = name.split(":")
        kinds = ", ".join(f"{count} {kind}" for kind, (count, _) in found["collectives"].items())
        rows.append((mesh, prompts, f"{found['flops'] / 1e9:.2f}", f"{found['bytes'] / 2**20:.2f}",
                     f"{found['bytes'] / found['parameter_bytes']:.2f}", f"{found['held'] / 2**20:.1f}", kinds or "none"))
    caption = (f"{benchmark_table.circumstances()}: the update of one batch (loss, gradient, AdamW) on fake devices, from the "
               f"compiled program; {SIZES['layers']} layers of width {SIZES['width']}, V = {SIZES['vocabulary']:,}, float32, "
               f"{GROUP} answers of {TOKENS} tokens per prompt. FLOPs and bytes are per device; bytes are those of the "
               "collectives' results; a collective in a loop counts once.")
    columns = ("mesh", "prompts", "GFLOP", "exchanged, MiB", "of the parameters", "weights and moments held, MiB", "remark")
    return [benchmark_table.Table(caption, columns, tuple(rows))]


def _draw(found: dict[str, dict]) -> None:
    """One line per axis: FLOPs, and bytes exchanged, against the number of devices."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "collectives"
    import matplotlib.pyplot as plt

    figure, (work, traffic) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis in ("data", "fsdp", "tensor"):
        own = {1: found["data=1:8"]} | {int(name.split(":")[0].split("=")[1]): numbers for name, numbers in found.items()
                                        if name.startswith(axis) and "," not in name}
        devices = sorted(own)
        work.plot(devices, [own[n]["flops"] / 1e9 for n in devices], "o-", label=axis)
        traffic.plot(devices, [own[n]["bytes"] / own[n]["parameter_bytes"] for n in devices], "o-", label=axis)
    for axes, title in ((work, "GFLOP per device"), (traffic, "exchanged per device, of the parameters' bytes")):
        axes.set(xlabel="devices on the axis", title=title, xticks=[1, 2, 4, 8], ylim=(0, None))
        axes.grid(alpha=0.3)
    work.legend()
    path = ROOT / "benchmarks" / "collectives.svg"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def compiled(mesh: dict[str, int], prompts: int) -> dict:
    """The update on a mesh of fake devices: FLOPs, collectives, bytes held."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from rl_jax.learner import evaluate, optimiser, update
    from rl_jax.models import mesh as meshes
    from rl_jax.models import sharding
    from rl_jax.models.network import Network
    from rl_jax.models.shape import Shape
    from rl_jax.recipes.baselines.grpo import grpo
    from rl_jax.train import collectives

    network, recipe = Network(Shape(**SIZES)), grpo(GROUP, beta=0.0)
    here = meshes.make(meshes.Sizes(**mesh))
    adam = optimiser.transform(optimiser.Optimiser(), 10)
    policy_of = evaluate.make_evaluate(network, 1.0)
    run = update.make_update(recipe, policy_of, adam, 1, evaluate.make_objective(recipe, network, 1.0))
    parameters = {"policy": jax.eval_shape(network.initialise, jax.random.key(0))}
    state = jax.eval_shape(adam.init, parameters)
    x = jax.eval_shape(lambda: _batch(prompts))

    def placed(path, leaf):
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        where = sharding.of(names, leaf.shape, here) if leaf.ndim else meshes.whole(here)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    weights = jax.tree_util.tree_map_with_path(placed, (parameters, state))
    rows = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(
        here, jax.sharding.PartitionSpec(meshes.ROWS))), x)
    with jax.set_mesh(here):
        program = jax.jit(run, donate_argnums=(0, 1)).lower(*weights, rows).compile()
    found = collectives.of(program.as_text())
    held = sum(jnp.dtype(a.dtype).itemsize * _size(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(weights))
    return {"flops": program.cost_analysis()["flops"], "bytes": sum(one.bytes for one in found), "held": held,
            "collectives": collectives.table(found), "shapes": [list(shape) for one in found for shape in one.shapes],
            "kinds": [one.kind for one in found for _ in one.shapes],
            "parameter_bytes": sum(4 * _size(a.shape) for a in jax.tree.leaves(parameters))}


def _size(shape):
    import math

    return math.prod(shape)


def _batch(prompts):
    """An experience with credit, of the shapes of a batch."""
    import dataclasses

    import jax.numpy as jnp

    from rl_jax.learner import assemble
    from rl_jax.types import Prompts

    rows = prompts * GROUP
    number, count = jnp.zeros((rows, TOKENS)), jnp.zeros(prompts, jnp.int32)
    x = assemble.of_arrays(number, jnp.ones((rows, TOKENS), bool), jnp.zeros(rows), jnp.zeros(rows, jnp.int32), advantage=number)
    asked = Prompts(tokens=jnp.zeros((prompts, PROMPT_TOKENS), jnp.int32), lengths=count + PROMPT_TOKENS, example=count,
                    domain=count, facts={})
    return dataclasses.replace(x, prompts=asked)


if __name__ == "__main__":
    asked = [(dict((axis, int(n)) for axis, n in (part.split("=") for part in mesh.split(","))), int(prompts))
             for mesh, prompts in (name.split(":") for name in sys.argv[1:])]
    print(json.dumps([compiled(*one) for one in asked]))
