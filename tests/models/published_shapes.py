"""A small network of every published family, with all that is special about it."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rl_jax.models.mixture import Experts
from rl_jax.models.network import Network
from rl_jax.models.pretrained import Policy
from rl_jax.models.rotary import Scaling
from rl_jax.models.shape import Shape

PLAIN = Shape(vocabulary=24, width=8, layers=2, heads=4, key_heads=2, head_size=4, inner=12, rotary_base=500.0,
              norm_epsilon=1e-5)
LLAMA3 = Scaling(kind="llama3", factor=8.0, low=1.0, high=3.0, original_length=16)
GEMMA = {"tied": True, "norm_offset": 1.0, "after_norms": True, "scale_embedding": True, "activation": "gelu_tanh",
         "attention_scale": 24 ** -0.5}
# gemma3_text, qwen3_moe: two whole periods and a layer behind them
FEATURES = {
    "llama": {"tied": False, "rotary_scaling": LLAMA3},
    "mistral": {"tied": False, "window": 3, "reach": ("window",)},
    "qwen2": {"query_bias": True},
    "qwen2, upper layers windowed": {"query_bias": True, "layers": 3, "window": 5,
                                     "reach": ("full", "window", "window")},
    "qwen3": {"query_norm": True, "rotary_scaling": Scaling(kind="linear", factor=2.0)},
    "qwen3_moe": {"query_norm": True, "tied": False, "layers": 5, "dense_layers": (1, 3),
                  "mixture": Experts(experts=4, chosen=2, inner=6, normalised=False)},
    "qwen3_moe, windowed": {"query_norm": True, "mixture": Experts(experts=2, chosen=1, inner=6), "window": 4,
                            "reach": ("window",)},
    "gemma2": {**GEMMA, "layers": 3, "window": 3, "reach": ("window", "full"), "attention_cap": 3.0, "logit_cap": 5.0},
    "gemma3_text": {**GEMMA, "layers": 7, "query_norm": True, "window": 3, "reach": ("window", "window", "full"),
                    "rotary_base_window": 100.0, "rotary_scaling": Scaling(kind="linear", factor=4.0)},
}
SHAPES = {name: dataclasses.replace(PLAIN, **features) for name, features in FEATURES.items()}


def model_type(name: str) -> str:
    """What config.json calls the family of one of SHAPES."""
    return name.split(",")[0]


def drawn(network: Network, seed: int = 0) -> dict:
    """Parameters of order 1, every number of them drawn; nothing is compiled."""
    like, rng = jax.eval_shape(network.initialise, jax.random.key(0)), np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, jnp.float32), like)


def policy(shape: Shape, seed: int = 0) -> Policy:
    """A policy that was made here, every number of it drawn."""
    network = Network(shape)
    return Policy(network, drawn(network, seed))
