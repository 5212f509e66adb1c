"""`configs/toys/addmod.py` on a mesh: every axis has one device until the command line says otherwise.

Command: python scripts/train.py --config=configs/meshes/addmod.py --workdir=runs/mesh --config.mesh.fsdp=4
Hardware: as many devices as the axes multiply to; on a CPU: XLA_FLAGS=--xla_force_host_platform_device_count=4.
Time: not measured; fake devices share the machine's cores.
Result: that of `configs/toys/addmod.py`, in another order of sums.
"""
import ml_collections

from configs.toys import addmod
from rl_jax import experiment
from rl_jax.models import mesh


def get_config(recipe: str = "baselines.grpo") -> ml_collections.ConfigDict:
    """The config, with the recipe's own arguments filled in."""
    config = addmod.get_config(recipe)
    with config.unlocked():
        config.model.heads, config.model.key_heads, config.model.head_size = 8, 8, 16
        config.mesh = experiment.section(mesh.Sizes)
    return config
