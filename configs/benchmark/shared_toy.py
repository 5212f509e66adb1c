"""GRPO on work whose size never varies, for comparisons of speed: "first", "tiny" or "vocabulary".

Command: python scripts/train.py --config=configs/benchmark/shared_toy.py:first --workdir=runs/shared_toy
Hardware: any; written for two CPU cores.
Time: a few seconds a step at most.
Result: BENCHMARKS.md, tables `peers` and `step`; the share of even ids rises from one half.
"""
import ml_collections

from rl_jax import experiment

TASK = {"first": {"vocabulary": 2048, "prompt_length": 32, "completion_length": 64},
        "tiny": {"vocabulary": 256, "prompt_length": 32, "completion_length": 32},
        "vocabulary": {"vocabulary": 151_936, "prompt_length": 32, "completion_length": 64}}
MODEL = {"first": {"width": 256, "layers": 4, "heads": 4, "key_heads": 2, "head_size": 64, "inner": 1024},
         "tiny": {"width": 64, "layers": 2, "heads": 4, "key_heads": 2, "head_size": 16, "inner": 256},
         "vocabulary": {"width": 256, "layers": 2, "heads": 4, "key_heads": 2, "head_size": 64, "inner": 1024}}
PROMPTS = {"first": 8, "tiny": 16, "vocabulary": 4}
STEPS_PER_CALL = {"first": 1, "tiny": 10, "vocabulary": 1}


def get_config(workload: str = "first") -> ml_collections.ConfigDict:
    """The config of a workload: Qwen2's architecture in float32, 8 answers to each prompt, one update per rollout."""
    if workload not in TASK:
        raise ValueError(f"workload {workload!r}: allowed are {sorted(TASK)}.")
    config = ml_collections.ConfigDict({
        "task": experiment.task_section("toys.evens", **TASK[workload]),
        "model": experiment.model_section(**MODEL[workload], tied=True, query_bias=True, rotary_base=1e6),
        "recipe": experiment.recipe_section("baselines.grpo", group_size=8, beta=0.04),
        "optimiser": experiment.section(experiment.Optimiser, learning_rate=1e-3),
        "scale": experiment.section(experiment.Scale, steps=100, prompts_per_step=PROMPTS[workload],
                                    steps_per_call=STEPS_PER_CALL[workload]),
        "run": experiment.section(experiment.Run, checkpoint_every=50),
    })
    return config.lock()
