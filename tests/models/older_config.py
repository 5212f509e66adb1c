"""A config.json of transformers 5 in the words of transformers 4, which most published checkpoints were saved with."""
from typing import Any


def older(config: dict[str, Any]) -> dict[str, Any]:
    """The same model: rotary settings at the top, no list of layer types, other names for the experts and the dtype."""
    config = dict(config)
    rope = config.pop("rope_parameters")
    local = rope.get("sliding_attention")
    rope = dict(rope.get("full_attention", rope))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    if local is not None:
        config["rope_local_base_freq"] = local["rope_theta"]
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    config.pop("layer_types", None)
    if config.pop("_sliding_window_pattern", None):
        config["sliding_window_pattern"] = 6
    if "use_sliding_window" in config:
        config["sliding_window"] = 8  # Qwen's files have a width here, and say that it is not used
    return config
