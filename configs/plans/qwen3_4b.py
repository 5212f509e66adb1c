"""GRPO with all weights of Qwen3-4B's sizes on 8 devices of 80 GB: a plan, for which no checkpoint is needed.

Command: python scripts/train.py --config=configs/plans/qwen3_4b.py --plan --plan_limit_gib=80
Hardware: any CPU plans it; it is planned for 8 devices of 80 GB.
Time: about two minutes on 2 CPU cores.
Result: bytes and operations on each device (BENCHMARKS.md, "Planned, not run"); never run.
"""
import ml_collections

from rl_jax import experiment
from rl_jax.models import mesh


def get_config() -> ml_collections.ConfigDict:
    """The config."""
    model = experiment.model_section(
        vocabulary_at_least=151_936, width=2560, layers=36, heads=32, key_heads=8, head_size=128, inner=9728,
        query_norm=True, rotary_base=1e6, scan_layers=True, remat=True, compute="bfloat16")
    return of_model(model, mesh.Sizes(fsdp=8), prompts_per_step=64, microbatches=4)


def of_model(model: ml_collections.ConfigDict, sizes: mesh.Sizes, **scale: int) -> ml_collections.ConfigDict:
    """The same for another network.

    Args:
      model: its section.
      sizes: of the mesh.
      scale: fields of `experiment.Scale`.
    """
    return ml_collections.ConfigDict({
        "task": experiment.task_section(
            "reasoning_gym", generator="chain_sum", keep_after=": ", prompt_length=512, completion_length=1024,
            train_size=256, validation_size=0, held_out_size=0),
        "model": model,
        "recipe": experiment.recipe_section("baselines.grpo", group_size=8, beta=0.001),
        "optimiser": experiment.section(experiment.Optimiser, learning_rate=1e-6, warmup_steps=10),
        "scale": experiment.section(experiment.Scale, **scale),
        "run": experiment.section(experiment.Run),
        "mesh": experiment.section(mesh.Sizes, **vars(sizes)),
    }).lock()
