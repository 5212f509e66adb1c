"""Every recipe in the one-program step learns modular addition from nothing, about as well as GRPO does.

What falls short says so in the catalogue. Slow: CI runs it by itself, at this small size.
"""
import functools
import pathlib

import numpy as np
import pytest

from rl_jax import comparison, experiment
from rl_jax.experiment import Optimiser
from rl_jax.models.transformer import Shape
from rl_jax.tasks.toys import addmod
from rl_jax.train import compare, curves

NAMES = [name for name in experiment.names("rl_jax.recipes") if name != "baselines.sft"]  # it draws nothing
SHARE = 0.9
TASK = addmod.addmod(5, validation_size=0, held_out_size=0)
SHAPE = Shape(vocabulary=TASK.tokenizer.size, width=32, layers=1, heads=2, key_heads=1, head_size=16, inner=64)
SCALE = comparison.Scale(steps=240, answers_per_step=128, seeds=4, steps_per_call=40)


@functools.cache
def final_score(name):
    """Mean score over the last tenth of the steps and the replicas, and whether any step was skipped."""
    section = next(iter(comparison.recipes_section(name, group_size=8).values()))
    recipe = experiment.named("recipe", "rl_jax.recipes", experiment.plain(section), name)
    compared = comparison.Comparison(task=TASK, shape=SHAPE, recipes={name: recipe}, scale=SCALE,
                                     optimiser=Optimiser(learning_rate=3e-3, warmup_steps=5))
    curve = compare.learn(compared, name, compare.first_weights(compared, pathlib.Path()))
    return curve.values[curves.SCORE][-SCALE.steps // 10:].mean(), np.sum(curve.values["gradient/skipped"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_learns_as_grpo_does_or_says_why_not(name):
    score, skipped = final_score(name)
    of_grpo, _ = final_score("baselines.grpo")
    print(f"{name}: {score:.3f}, {score / of_grpo:.2f} of GRPO's {of_grpo:.3f}")
    assert skipped == 0 and of_grpo > 0.5
    assert score >= SHARE * of_grpo or "addmod" in experiment.find("recipe", "rl_jax.recipes", name).card.note
