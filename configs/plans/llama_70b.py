"""GRPO with all weights of Llama 3.1 70B's sizes on 64 devices of 80 GB: a plan, for which no checkpoint is needed.

Command: python scripts/train.py --config=configs/plans/llama_70b.py --plan --plan_limit_gib=80
Hardware: any CPU plans it; it is planned for 64 devices of 80 GB.
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
        vocabulary_at_least=128_256, width=8192, layers=80, heads=64, key_heads=8, head_size=128, inner=28_672,
        tied=False, norm_epsilon=1e-5, rotary_base=5e5, scan_layers=True, remat=True, compute="bfloat16")
    return qwen3_4b.of_model(model, mesh.Sizes(fsdp=32, tensor=2), prompts_per_step=128, microbatches=4)
