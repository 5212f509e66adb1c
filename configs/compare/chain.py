"""Recipes under equal budgets on sums of four terms with every running total, after a warm start that all share.

Command: python scripts/compare.py --config=configs/compare/chain.py --workdir=runs/chain
Hardware: any; written for a laptop's CPU.
Time: 2 min 20 s on 2 loaded cores, 104 s of CPU time; half of it is compilation.
Result: score over the last 15 of 150 steps, mean of 4 replicas ± 1 standard error: grpo 0.653 ± 0.014, gspo
  0.642 ± 0.009, cispo 0.608 ± 0.003, sapo_soft_gate 0.597 ± 0.013, all from 0.320 after the warm start; differences
  from grpo, replica by replica: -0.010 ± 0.012, -0.045 ± 0.014, -0.055 ± 0.026.
"""
import ml_collections

from rl_jax import comparison, experiment

RECIPES = "baselines.grpo,loss.gspo,loss.cispo,loss.sapo_soft_gate"


def get_config(recipes: str = RECIPES) -> ml_collections.ConfigDict:
    """The config, with every recipe's arguments filled in; the first is the one that the others are compared with."""
    warm_start = ml_collections.ConfigDict({
        "recipe": experiment.recipe_section("baselines.sft"),
        "optimiser": experiment.section(experiment.Optimiser, learning_rate=3e-3, warmup_steps=5),
        "scale": experiment.section(experiment.Scale, steps=110, prompts_per_step=64),
    })
    config = ml_collections.ConfigDict({
        "task": experiment.task_section("toys.chain", terms=4, modulus=5, train_size=512),
        "model": experiment.model_section(width=48, layers=1, heads=4, key_heads=2, head_size=12, inner=96),
        "before": (warm_start,),
        "recipes": comparison.recipes_section(recipes, group_size=8, minibatches=2),
        "baseline": comparison.first_of(recipes),
        "optimiser": experiment.section(experiment.Optimiser, learning_rate=1e-3, warmup_steps=10, decay="linear"),
        "scale": experiment.section(comparison.Scale, steps=150, answers_per_step=256, seeds=4, steps_per_call=15),
        "run": experiment.section(comparison.Run),
    })
    return config.lock()
