"""Qwen2 and 2.5 (biases on queries, keys and values), Qwen3 (norms on queries and keys), Qwen3-MoE (mixed experts)."""
from typing import Any

from rl_jax.models.families import rope
from rl_jax.models.families.family import Config, Family, refused
from rl_jax.models.mixture import Experts
from rl_jax.models.shape import Shape

UNWINDOWED, HEAD_SIZE = 28, 128  # where config.json has no max_window_layers, no head_dim


def _qwen_shape(config: Config) -> dict[str, Any]:
    refused(config, "hidden_act", "silu", "of this family")
    base, scaling = rope.rotary(config)
    layers, first = config["num_hidden_layers"], config.get("max_window_layers", UNWINDOWED)
    windowed = config.get("use_sliding_window", False) and config.get("sliding_window")
    otherwise = tuple("window" if windowed and i >= first else "full" for i in range(layers))
    return {"rotary_base": base, "rotary_scaling": scaling, **rope.reach(config, otherwise)}


def _qwen2_shape(config: Config) -> dict[str, Any]:
    return {**_qwen_shape(config), "query_bias": True}


def _qwen3_shape(config: Config) -> dict[str, Any]:
    refused(config, "attention_bias", False, "of this family")
    head = {"head_size": HEAD_SIZE} if config.get("head_dim") is None and config["model_type"] == "qwen3" else {}
    return {**_qwen_shape(config), **head, "query_norm": True}


def _mixture_shape(config: Config) -> dict[str, Any]:
    config = {**config, "max_window_layers": 0, "layer_types": None}  # this family has windows in all layers or none
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    layers = config["num_hidden_layers"]
    return {
        **_qwen3_shape(config),
        "mixture": Experts(experts=config.get("num_experts") or config["num_local_experts"],
                           chosen=config["num_experts_per_tok"], inner=config["moe_intermediate_size"],
                           normalised=config.get("norm_topk_prob", False)),
        "dense_layers": tuple(i for i in range(layers) if i in dense or (i + 1) % step)}


def _qwen_config(shape: Shape) -> dict[str, Any]:
    windowed = {"use_sliding_window": True, **rope.layer_types(shape)} if shape.window else {}
    return {"hidden_act": "silu", "use_sliding_window": False, **windowed}


def _mixture_config(shape: Shape) -> dict[str, Any]:
    if shape.mixture is None:
        return {"num_experts": 0}
    return {
        **_qwen_config(shape), "num_experts": shape.mixture.experts, "num_experts_per_tok": shape.mixture.chosen,
        "moe_intermediate_size": shape.mixture.inner, "norm_topk_prob": shape.mixture.normalised,
        "decoder_sparse_step": 1, "mlp_only_layers": list(shape.dense_layers)}


FAMILIES = (
    Family(model_types=("qwen2",), architecture="Qwen2", shape=_qwen2_shape, config=_qwen_config),
    Family(model_types=("qwen3",), architecture="Qwen3", shape=_qwen3_shape, config=_qwen_config),
    Family(model_types=("qwen3_moe",), architecture="Qwen3Moe", shape=_mixture_shape, config=_mixture_config),
)
