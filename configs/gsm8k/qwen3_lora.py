"""GRPO on GSM8K from Qwen3-4B with adapters of rank 16: frozen bfloat16 weights, which the reference shares.

Command: python scripts/train.py --config=configs/gsm8k/qwen3_lora.py:h100 --workdir=runs/qwen3_lora
Hardware: batch sizes for one H100 with 80 GB (h100), one H200 (h200), or a v5e-8 (v5e8: weights cut over its chips).
Time: not measured on any of them.
Result: not measured; bytes against full training are planned in BENCHMARKS.md ("memory").
"""
import ml_collections

from configs.gsm8k import qwen3_grpo


def get_config(hardware: str = "h100") -> ml_collections.ConfigDict:
    """The config.

    Args:
      hardware: "h100", "h200" or "v5e8".
    """
    config = qwen3_grpo.of_model("Qwen/Qwen3-4B", hardware, chat={"enable_thinking": False}, learning_rate=2e-5, train="lora")
    config.model.dtype = "bfloat16"
    return config
