"""From hidden states to the log-probability of a token and the entropy, without the logits."""
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, UInt32

from kernels_pallas import dispatch
from kernels_pallas.linear_logprob import backward, blocks, forward, pallas_backward, pallas_forward, reference
from kernels_pallas.linear_logprob import support as support_bits
from kernels_pallas.linear_logprob.reference import Scalar


def linear_logprob(hidden: Float[Array, "M D"], vocabulary: Float[Array, "V D"], targets: Int[Array, " M"], *,
                   temperature: Scalar = 1.0, soft_cap: int | float | None = None,
                   support: UInt32[Array, "M W"] | None = None,
                   implementation: str | None = None) -> tuple[Float32[Array, " M"], Float32[Array, " M"]]:
    """(log p[target], -sum p log p) with p = softmax(cap tanh(hidden vocabulary^T / cap) / temperature).

    Differentiable in hidden and vocabulary through both results. A target that is not kept, or
    is no token at all, has log-probability -inf, and that constant has gradient 0; a row that
    keeps nothing has entropy 0. So rows that a mask leaves out may hold anything finite.

    Args:
      hidden: last hidden states, float32 or bfloat16; products are summed in float32.
      vocabulary: the output embedding, a row per token.
      targets: token ids.
      temperature: positive, dimensionless; carries no gradient.
      soft_cap: bound on the logits before the temperature, positive, in nats; None: no bound.
      support: tokens that truncated sampling kept (`support.pack_support`); p is 0 elsewhere.
      implementation: "reference" (all logits in memory), "xla" (one block at a time), "pallas" (kernels
        for GPU and TPU, whose logits stay on the chip; interpreted, so slow, on a CPU), or None for
        the best on this device.

    Returns:
      Log-probability of the target and entropy of the distribution, in nats.

    Raises:
      ValueError: shapes that do not fit, a temperature or cap that is not positive, an
        implementation that does not exist, "pallas" where no block of the kernel fits.
    """
    _check(hidden, vocabulary, targets, temperature, soft_cap, support)
    best = blocks.best(*vocabulary.shape, jnp.dtype(reference.operand_dtype(hidden, vocabulary)).itemsize)
    run = dispatch.implementation("linear_logprob", implementation, best, {
        "reference": reference.linear_logprob, **{name: functools.partial(_in_passes, name) for name in PASSES}})
    temperature = jnp.asarray(temperature, jnp.float32)
    return run(*_aligned(hidden, vocabulary, targets.astype(jnp.int32), temperature, support), soft_cap)


def _check(hidden, vocabulary, targets, temperature, soft_cap, support) -> None:
    rows, width = hidden.shape
    size = vocabulary.shape[0]
    if vocabulary.shape[1] != width or targets.shape != (rows,):
        raise ValueError(f"hidden [M, D], vocabulary [V, D] and targets [M] do not fit: "
                         f"{hidden.shape}, {vocabulary.shape}, {targets.shape}.")
    if support is not None and support.shape != (rows, support_bits.words_for(size)):
        raise ValueError(f"support must be [M, ceil(V / 32)] = {(rows, support_bits.words_for(size))} "
                         f"for V = {size}, not {support.shape}; make it with pack_support.")
    for name, value in ("temperature", temperature), ("soft_cap", soft_cap):
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{name} must be positive, not {value}.")


class Passes(NamedTuple):
    """The sweeps over the vocabulary: `forward.moments` and `backward.cotangents`, or others of their signatures."""

    moments: Callable[..., forward.Moments]
    cotangents: Callable[..., tuple]


PASSES = {"xla": Passes(forward.moments, backward.cotangents),
          "pallas": Passes(pallas_forward.moments, pallas_backward.cotangents)}


def _aligned(*arrays):
    """The arrays, all varying over the mesh axes that any of them varies over.

    Inside `shard_map` a replicated argument then gets its gradient summed over the devices.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays if x is not None]
    axes = frozenset().union(*varying)

    def align(x):
        missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(align, arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def _in_passes(name, hidden, vocabulary, targets, temperature, support, soft_cap):
    return _forward(name, hidden, vocabulary, targets, temperature, support, soft_cap)[0]


def _forward(name, hidden, vocabulary, targets, temperature, support, soft_cap):
    seen = PASSES[name].moments(hidden, vocabulary, targets, temperature, support, soft_cap)
    logp, entropy, *normaliser = forward.results(seen)
    return (logp, entropy), (hidden, vocabulary, targets, temperature, support, logp, entropy, *normaliser)


def _backward(name, soft_cap, residuals, cotangents):
    # A residual that was a constant comes back as a NumPy array.
    residuals = jax.tree.map(jnp.asarray, residuals)
    hidden, vocabulary, targets, temperature, support, logp, *entropy_and_normaliser = residuals
    d_logp, d_entropy = cotangents
    d_logp = jnp.where(jnp.isneginf(logp), 0.0, d_logp)
    rows = hidden, targets, support, *entropy_and_normaliser, d_logp, d_entropy
    d_hidden, d_vocabulary = PASSES[name].cotangents(rows, vocabulary, temperature, soft_cap)
    return d_hidden, d_vocabulary, None, jnp.zeros_like(temperature), None


_in_passes.defvjp(_forward, _backward)
