"""GRPO on GSM8K from Llama-3.2-1B-Instruct.

Command: python scripts/train.py --config=configs/gsm8k/llama3_grpo.py:h100 --workdir=runs/llama3_grpo
Hardware: batch sizes for one H100 with 80 GB (h100), one H200 (h200), or a v5e-8 (v5e8: weights cut over its chips).
Time: not measured on any of them.
Result: not measured. The checkpoint is gated: log in to the hub first, or give its folder as model.path and tokenizer.
"""
import ml_collections

from configs.gsm8k import qwen3_grpo


def get_config(hardware: str = "h100") -> ml_collections.ConfigDict:
    """The config.

    Args:
      hardware: "h100", "h200" or "v5e8".
    """
    return qwen3_grpo.of_model("meta-llama/Llama-3.2-1B-Instruct", hardware, chat={})
