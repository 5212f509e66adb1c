"""Qwen3-0.6B drawn with an int8 copy of its weights: the gap to the trained weights is reported, and cut off at 2.

Command: python scripts/train.py --config=configs/gsm8k/qwen3_int8_tis.py:h100 --workdir=runs/qwen3_int8
Hardware: batch sizes for one H100 with 80 GB (h100), one H200 (h200), or a v5e-8 (v5e8: weights cut over its chips).
Time: not measured on any of them.
Result: not measured; watch rollout/logp_gap_nats, which is near 0 without the copy.
"""
import ml_collections

from configs.gsm8k import qwen3_grpo
from rl_jax import experiment


def get_config(hardware: str = "h100") -> ml_collections.ConfigDict:
    """The config.

    Args:
      hardware: "h100", "h200" or "v5e8".
    """
    config = qwen3_grpo.of_model(qwen3_grpo.MODEL, hardware, chat={"enable_thinking": False}, draw_with="int8")
    with config.unlocked():
        config.recipe = experiment.recipe_section("weighting.truncated_importance", group_size=8)
    return config
