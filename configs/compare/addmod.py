"""Recipes under equal budgets on modular addition, from nothing, in pure JAX: one figure with error bands, one table.

Command: python scripts/compare.py --config=configs/compare/addmod.py --workdir=runs/compare
Hardware: any; written for a laptop's CPU.
Time: 2 min 20 s on 2 loaded cores, 99 s of CPU time; half of it is compilation.
Result: score over the last 20 of 200 steps, mean of 4 replicas ± 1 standard error: grpo 0.748 ± 0.031, cispo
  0.683 ± 0.094, sapo_soft_gate 0.650 ± 0.093, gspo 0.584 ± 0.096; differences from grpo, replica by replica:
  -0.064 ± 0.065, -0.098 ± 0.063, -0.164 ± 0.067.
"""
import ml_collections

from rl_jax import comparison, experiment

RECIPES = "baselines.grpo,loss.gspo,loss.cispo,loss.sapo_soft_gate"


def get_config(recipes: str = RECIPES) -> ml_collections.ConfigDict:
    """The config, with every recipe's arguments filled in; the first is the one that the others are compared with."""
    config = ml_collections.ConfigDict({
        "task": experiment.task_section("toys.addmod", modulus=10),
        "model": experiment.model_section(width=48, layers=1, heads=4, key_heads=2, head_size=12, inner=96),
        "recipes": comparison.recipes_section(recipes, group_size=8, minibatches=2),
        "baseline": comparison.first_of(recipes),
        "optimiser": experiment.section(experiment.Optimiser, learning_rate=1e-3, warmup_steps=10, decay="linear"),
        "scale": experiment.section(comparison.Scale, steps=200, answers_per_step=256, seeds=4, steps_per_call=20),
        "run": experiment.section(comparison.Run),
    })
    return config.lock()
