"""A projection: x W + b, with a low-rank adapter where there is one, of float or of quantised weights."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rl_jax.models import quantised
from rl_jax.models.lora import Adapters


class Linear(nnx.Module):
    """x W (+ b) (+ alpha / r x A B), in x's dtype."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs, bias: bool = False, scale: float = 1.0,
                 adapters: Adapters | None = None):
        """Fresh weights; B starts at 0, so that an adapter changes nothing before it has learnt.

        Args:
          scale: of the variance of W, which is scale / inputs.
          adapters: the numbers of its adapter; None: it has none.
        """
        normal = jax.nn.initializers.variance_scaling(scale, "fan_in", "normal")
        self.weight = nnx.Param(normal(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32)) if bias else None
        self.adapter_scale = 0.0 if adapters is None else adapters.scale
        uniform = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # within 1 / sqrt(inputs)
        self.adapter_in = None if adapters is None else nnx.Param(
            uniform(rngs.params(), (inputs, adapters.rank), jnp.float32))
        self.adapter_out = None if adapters is None else nnx.Param(
            jnp.zeros((adapters.rank, outputs), jnp.float32))

    def __call__(self, x: Float[Array, "M A"]) -> Float[Array, "M B"]:
        y = quantised.product(x, self.weight[...])
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)[None, :]
        if self.adapter_in is None:
            return y
        low = x @ self.adapter_in[...].astype(x.dtype)
        return y + self.adapter_scale * (low @ self.adapter_out[...].astype(x.dtype))


def projection(name: str, adapters: Adapters | None, inputs: int, outputs: int, **options: Any) -> Linear:
    """A `Linear` that has an adapter if those that are wanted are on projections of this name."""
    chosen = adapters if adapters is not None and adapters.on(name) else None
    return Linear(inputs, outputs, adapters=chosen, **options)
