"""Llama 3.x, SmolLM and Mistral: no biases, no norms on queries and keys; they differ in numbers."""
from typing import Any

from rl_jax.models.families import rope
from rl_jax.models.families.family import Config, Family, refused
from rl_jax.models.shape import Shape

WINDOW = 4096  # of Mistral, where config.json does not say; null is none


def _llama_shape(config: Config) -> dict[str, Any]:
    for name, allowed in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        refused(config, name, allowed, "of this family")
    base, scaling = rope.rotary(config)
    return {"rotary_base": base, "rotary_scaling": scaling}


def _llama_config(shape: Shape) -> dict[str, Any]:
    return {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def _mistral_shape(config: Config) -> dict[str, Any]:
    config = {"sliding_window": WINDOW, **config}
    windowed = ("window",) if config.get("sliding_window") else ("full",)
    return {**_llama_shape(config), **rope.reach({**config, "layer_types": None}, windowed)}


def _mistral_config(shape: Shape) -> dict[str, Any]:
    return {"hidden_act": "silu", "sliding_window": shape.window or None}


FAMILIES = (
    Family(model_types=("llama",), architecture="Llama", shape=_llama_shape, config=_llama_config),
    Family(model_types=("mistral",), architecture="Mistral", shape=_mistral_shape, config=_mistral_config),
)
