"""Gemma 2 and the text models of Gemma 3: scales around 1, norms before and behind, windows, bounded scores."""
from typing import Any

from rl_jax.models.families import rope
from rl_jax.models.families.family import Config, Family, refused
from rl_jax.models.shape import Shape

NORMS = {"after_attention": "post_attention_layernorm", "before_inner": "pre_feedforward_layernorm",
         "after_inner": "post_feedforward_layernorm"}
# Where config.json does not say: every which layer of Gemma 3 sees all, its rotary bases, and the caps of Gemma 2.
PATTERN, GLOBAL, LOCAL = 6, 1_000_000.0, 10_000.0
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def _gemma_shape(config: Config) -> dict[str, Any]:
    for name in ("hidden_activation", "hidden_act"):
        refused(config, name, "gelu_pytorch_tanh", "of this family")
    refused(config, "attention_bias", False, "of this family")
    return {
        "activation": "gelu_tanh", "norm_offset": 1.0, "after_norms": True, "scale_embedding": True,
        "tied": config.get("tie_word_embeddings", True),
        "head_size": config.get("head_dim", 256),
        "attention_scale": float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
        "attention_cap": float(config["attn_logit_softcapping"] or 0.0),
        "logit_cap": float(config["final_logit_softcapping"] or 0.0)}


def _gemma2_shape(config: Config) -> dict[str, Any]:
    base, scaling = rope.rotary(config)
    return {**_gemma_shape({**CAPS, **config}), **rope.reach(config, ("window", "full")), "rotary_base": base,
            "rotary_scaling": scaling}


def _gemma3_shape(config: Config) -> dict[str, Any]:
    refused(config, "use_bidirectional_attention", False, "a policy writes from left to right")
    every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or PATTERN
    if not config.get("rope_parameters"):
        config = {**config, "rope_theta": config.get("rope_theta") or GLOBAL}
    base, scaling = rope.rotary(config)
    local = config.get("rope_local_base_freq") or (
        rope.rotary(config, "sliding_attention")[0] if config.get("rope_parameters") else LOCAL)
    config = {**dict.fromkeys(CAPS), **config}
    return {**_gemma_shape(config), **rope.reach(config, ("window",) * (every - 1) + ("full",)), "query_norm": True,
            "rotary_base": base, "rotary_base_window": float(local), "rotary_scaling": scaling}


def _gemma_config(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, **rope.layer_types(shape),
        "query_pre_attn_scalar": round((shape.attention_scale or shape.head_size ** -0.5) ** -2),
        "attn_logit_softcapping": shape.attention_cap or None, "final_logit_softcapping": shape.logit_cap or None}


def _gemma3_config(shape: Shape) -> dict[str, Any]:
    local = shape.rotary_base_window or shape.rotary_base
    return {**_gemma_config(shape), "rope_parameters": {
        "full_attention": rope.parameters(shape.rotary_base, shape.rotary_scaling),
        "sliding_attention": rope.parameters(local, None)}}


FAMILIES = (
    Family(model_types=("gemma2",), architecture="Gemma2", shape=_gemma2_shape, config=_gemma_config, norms=NORMS),
    Family(model_types=("gemma3_text",), architecture="Gemma3", shape=_gemma3_shape, config=_gemma3_config,
           norms=NORMS),
)
