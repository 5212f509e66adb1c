"""A small random checkpoint in the form of a published one, made on the spot: weights, config.json, chat tokenizer."""
import pathlib
import shutil

import jax

from rl_jax.models import pretrained
from rl_jax.models.network import Network
from rl_jax.models.shape import Shape
from tests.ends import tiny

TOKENIZER = tiny.ROOT / "tests" / "tasks" / "chatml"
SHAPE = Shape(vocabulary=512, width=32, layers=2, heads=4, key_heads=2, head_size=8, inner=48, query_norm=True,
              rotary_base=1e6)
LENGTHS = {"prompt_length": 96, "completion_length": 32}


def make(folder: pathlib.Path, shape: Shape = SHAPE, dtype: str | None = "bfloat16") -> pathlib.Path:
    """Writes one; returns the folder."""
    network = Network(shape)
    policy = pretrained.Policy(network, network.initialise(jax.random.key(0)))
    pretrained.save(policy, folder, dtype=dtype)
    for file in TOKENIZER.iterdir():
        if file.name != "golden.json":
            shutil.copyfile(file, folder / file.name)
    return folder
