"""GRPO on GSM8K from Qwen3-0.6B: chat template without thinking, the answer behind "####", math-verify as judge.

Command: python scripts/train.py --config=configs/gsm8k/qwen3_grpo.py:h100 --workdir=runs/qwen3_grpo
Hardware: batch sizes for one H100 with 80 GB (h100), one H200 (h200), or a v5e-8 (v5e8: weights cut over its chips).
Time: not measured on any of them.
Result: not measured; at toy size the same config trains, resumes and exports in the tests, on a CPU.
"""
import ml_collections

from rl_jax import experiment
from rl_jax.models import mesh

MODEL = "Qwen/Qwen3-0.6B"
# Prompts per step and pieces of the update: answers per piece were chosen from bytes on paper, not by a measurement.
SIZES = {"h100": {"prompts_per_step": 32, "microbatches": 8}, "h200": {"prompts_per_step": 64, "microbatches": 8},
         "v5e8": {"prompts_per_step": 64, "microbatches": 8}}
MESHES = {"v5e8": {"fsdp": 8}}


def get_config(hardware: str = "h100") -> ml_collections.ConfigDict:
    """The config.

    Args:
      hardware: "h100", "h200" or "v5e8".
    """
    return of_model(MODEL, hardware, chat={"enable_thinking": False})


def of_model(path: str, hardware: str, *, chat: dict, learning_rate: float = 1e-6,
             **scale) -> ml_collections.ConfigDict:
    """The same for another checkpoint.

    Args:
      path: its folder, or "owner/name".
      hardware: a key of `SIZES`.
      chat: variables of its chat template.
      scale: further fields of `experiment.Scale`.

    Raises:
      ValueError: for other hardware.
    """
    if hardware not in SIZES:
        raise ValueError(f"hardware={hardware!r}: batch sizes are there for {sorted(SIZES)}; take the nearest and change "
                         "--config.scale.prompts_per_step and --config.scale.microbatches.")
    instruction = "Reason step by step, and put the final number behind ####."
    return ml_collections.ConfigDict({
        "task": experiment.task_section(
            "gsm8k", prompt_length=384, completion_length=512, validation_size=256, tokenizer=path,
            chat={"system": "", "instruction": instruction, **chat}),
        "model": experiment.pretrained_section(path, scan_layers=True),
        "recipe": experiment.recipe_section("baselines.grpo", group_size=8, beta=0.001),
        "optimiser": experiment.section(experiment.Optimiser, learning_rate=learning_rate, warmup_steps=10, beta2=0.99),
        "scale": experiment.section(experiment.Scale, steps=500, **SIZES[hardware], **scale),
        "run": experiment.section(experiment.Run, checkpoint_every=50, validate_every=50, validation_prompts=256,
                                  validation_samples=1, workers=8),
        "mesh": experiment.section(mesh.Sizes, **MESHES.get(hardware, {})),
    }).lock()
