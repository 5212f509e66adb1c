"""Configs that are only planned: the networks have the sizes of the published ones."""
import importlib

import jax
import pytest

from rl_jax import experiment
from rl_jax.models.network import Network
from rl_jax.models.shape import parameter_count

# parameters and devices; the counts are those of the models' cards
PLANNED = {"qwen3_4b": (4_022_468_096, 8), "llama31_8b": (8_030_261_248, 16), "llama_70b": (70_553_706_496, 64)}


@pytest.mark.parametrize("name", PLANNED)
def test_sizes(name):
    parsed = experiment.parse(importlib.import_module(f"configs.plans.{name}").get_config())
    shapes = jax.eval_shape(Network(parsed.shape).initialise, jax.random.key(0))
    assert (parameter_count(shapes), parsed.mesh.devices) == PLANNED[name]
    assert parsed.shape.vocabulary > parsed.task.tokenizer.size
