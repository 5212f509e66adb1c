"""GRPO with all weights of Llama 3.1 8B's sizes on a v5e-16: a plan, for which no checkpoint is needed.

Command: python scripts/train.py --config=configs/plans/llama31_8b.py --plan --plan_limit_gib=16
Hardware: any CPU plans it; it is planned for 16 devices of 16 GB.
Time: a few minutes on 2 CPU cores.
Result: bytes and operations on each device (BENCHMARKS.md, "Planned, not run"); never run.
"""
import ml_collections

from configs.plans import qwen3_4b
from rl_jax import experiment
from rl_jax.models import mesh


def get_config() -> ml_collections.ConfigDict:
    """The config."""
    model = experiment.model_section(
        vocabulary_at_least=128_256, width=4096, layers=32, heads=32, key_heads=8, head_size=128, inner=14_336,
        tied=False, norm_epsilon=1e-5, rotary_base=5e5, scan_layers=True, remat=True, compute="bfloat16")
    return qwen3_4b.of_model(model, mesh.Sizes(fsdp=16), prompts_per_step=32, microbatches=2)
