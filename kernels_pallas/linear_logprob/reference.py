"""The definition, with every logit in memory."""
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, UInt32

from kernels_pallas.linear_logprob import support as support_bits

Scalar = int | float | Float[Array, ""]
# What a logit outside the support becomes. Finite, so that 0 * logit is 0 and not NaN, with a finite
# square; a running maximum starts at half of it, so that exp(logit - maximum) is 0 in any case.
EXCLUDED = -2e15


def logits(hidden: Float[Array, "M D"], vocabulary: Float[Array, "V D"], temperature: Scalar,
           soft_cap: int | float | None) -> Float32[Array, "M V"]:
    """cap tanh(h w / cap) / temperature, summed in float32; without a cap h w / temperature."""
    z = product(hidden, vocabulary, 1, 1)
    return (z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap)) / temperature


def product(a: Float[Array, "..."], b: Float[Array, "..."], a_axis: int, b_axis: int) -> Float32[Array, "..."]:
    """Matrix product summed over one axis of each, in float32."""
    dtype = operand_dtype(a, b)
    return jax.lax.dot_general(a.astype(dtype), b.astype(dtype), (((a_axis,), (b_axis,)), ((), ())),
                               preferred_element_type=jnp.float32)


def operand_dtype(a: Float[Array, "..."], b: Float[Array, "..."]) -> DTypeLike:
    """bfloat16 if both are, else float32."""
    return jnp.bfloat16 if a.dtype == b.dtype == jnp.bfloat16 else jnp.float32


def linear_logprob(hidden: Float[Array, "M D"], vocabulary: Float[Array, "V D"], targets: Int[Array, " M"],
                   temperature: Scalar, support: UInt32[Array, "M W"] | None,
                   soft_cap: int | float | None) -> tuple[Float32[Array, " M"], Float32[Array, " M"]]:
    """log softmax(logits)[target] and -sum p log p, over the kept tokens, in nats."""
    temperature = jax.lax.stop_gradient(temperature)
    size = vocabulary.shape[0]
    rows = jnp.arange(hidden.shape[0])
    u = logits(hidden, vocabulary, temperature, soft_cap)
    kept = jnp.ones_like(u, bool) if support is None else support_bits.unpack_support(support, size)
    logp = jax.nn.log_softmax(jnp.where(kept, u, EXCLUDED), axis=-1)
    inside = (targets >= 0) & (targets < size)
    column = jnp.where(inside, targets, 0)
    chosen = jnp.where(inside & kept[rows, column], logp[rows, column], -jnp.inf)
    entropy = -(jnp.exp(logp) * logp).sum(axis=-1)
    return chosen, jnp.where(kept.any(axis=-1), entropy, 0.0)
