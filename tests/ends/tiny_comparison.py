"""The smallest real comparisons; as a config for scripts/compare.py, two recipes of a pure task."""
import dataclasses
from typing import Any

import ml_collections

from rl_jax import comparison as comparisons
from rl_jax import experiment
from rl_jax.comparison import Comparison
from rl_jax.recipes.baselines.grpo import grpo
from tests.ends import tiny

RECIPE = grpo(group_size=2)


def get_config(recipes: str = "baselines.reinforce,baselines.grpo", *, task: str = "toys.addmod", task_args: dict = {},
               before: tuple = (), **scale: Any) -> ml_collections.ConfigDict:
    """Next to nothing, in a program per two steps."""
    return ml_collections.ConfigDict({
        "task": experiment.task_section(task, **task_args), "model": experiment.model_section(**tiny.NETWORK),
        "recipes": comparisons.recipes_section(recipes, group_size=2, baseline=0.5, beta=0.0),
        "baseline": comparisons.first_of(recipes), "before": before,
        "optimiser": experiment.section(experiment.Optimiser, learning_rate=1e-2),
        "scale": experiment.section(comparisons.Scale, **{
            "steps": 4, "answers_per_step": 8, "seeds": 2, "steps_per_call": 2} | scale),
        "run": experiment.section(comparisons.Run, workers=1),
    }).lock()


def comparison(recipes: dict[str, Any] | None = None, **given: Any) -> Comparison:
    """The checked comparison; `recipes` instead of the config's."""
    parsed = comparisons.parse(get_config(**given))
    if recipes is None:
        return parsed
    return dataclasses.replace(parsed, recipes=recipes, baseline="")
