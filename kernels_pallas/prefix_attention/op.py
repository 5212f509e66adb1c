"""Attention of completions to one copy of their prompt and, causally, to themselves."""
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import dispatch
from kernels_pallas.prefix_attention import backward, blocks, forward, operands, reference, visibility, xla
from kernels_pallas.prefix_attention.visibility import Seen


def prefix_attention(query: Float[Array, "N T H E"], key: Float[Array, "N T K E"], value: Float[Array, "N T K E"],
                     prompt_key: Float[Array, "P S K E"], prompt_value: Float[Array, "P S K E"], seen: Seen,
                     implementation: str | None = None) -> Float[Array, "N T H E"]:
    """softmax(q [prompt keys; own keys]^T) [prompt values; own values]: as if every row had its own copy of the prompt.

    Differentiable in the five arrays, each exactly; the prompt's gradient is the sum over its group. Padding, and
    what a prompt does not show, may hold anything at all: padding's output is 0 and so are the cotangents of both.

    Args:
      query, key, value: of the completions, G = N / P rows to a prompt, prompt-major; query head h sees key head
        h // (H / K).
      prompt_key, prompt_value: of the prompts. S may be 0: plain causal attention.
      seen: what may be seen, what is padding, and the plain numbers of the definition (`visibility.Seen`).
      implementation: "reference" (all scores in memory), "xla" (a tile of queries at a time), "pallas", or None for
        the best on this device.

    Raises:
      ValueError: shapes that do not fit, a scale, cap or window that is not positive, an implementation that does not
        exist or whose blocks do not fit.
    """
    _check(query, key, value, prompt_key, prompt_value, seen)
    (n, t), s = query.shape[:2], prompt_key.shape[1]
    run = dispatch.implementation("prefix_attention", implementation, blocks.best(t, s, query.shape[3], query.dtype), {
        "reference": reference.prefix_attention,
        **{name: functools.partial(_by_key_head, name) for name in PASSES}})
    kept = visibility.real(seen, n, t)
    shown = jnp.arange(s)[None, :] < seen.prompt[:, None]
    query, key, value = (_or_zero(kept, x) for x in (query, key, value))
    prompt_key, prompt_value = (_or_zero(shown, x) for x in (prompt_key, prompt_value))
    return _or_zero(kept, run(query, key, value, prompt_key, prompt_value, seen))


def _check(query, key, value, prompt_key, prompt_value, seen: Seen) -> None:
    (n, t, h, e), (p, s, k) = query.shape, prompt_key.shape[:3]
    if n % p or h % k or key.shape != (n, t, k, e) or value.shape != key.shape or (
            prompt_key.shape != (p, s, k, e) or prompt_value.shape != prompt_key.shape):
        raise ValueError(f"query [N, T, H, E], key and value [N, T, K, E], prompt_key and prompt_value [P, S, K, E] do "
                         f"not fit, with P a divisor of N and K of H: {query.shape}, {key.shape}, {value.shape}, "
                         f"{prompt_key.shape}, {prompt_value.shape}.")
    for name, x, shape in (("prompt [P]", seen.prompt, (p,)), ("lengths [N]", seen.lengths, (n,)),
                           ("segment [N, T]", seen.segment, (n, t))):
        if x is not None and (x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer)):
            raise ValueError(f"seen.{name} must be integers {shape}, not {x.dtype} {x.shape}.")
    for name, number in seen.options._asdict().items():
        if number is not None and not number > 0:
            raise ValueError(f"seen.options.{name} must be positive or None, not {number}.")


def _or_zero(kept, x):
    return x if kept is None else jnp.where(kept[:, :, None, None], x, 0)


class Passes(NamedTuple):
    """`attend` (operands, intervals, options) -> (out, kept); `cotangents` (..., (out, kept), d_out) -> operands."""

    attend: Callable[..., tuple]
    cotangents: Callable[..., operands.Operands]


PASSES = {"xla": Passes(xla.attend, xla.cotangents), "pallas": Passes(forward.attend, backward.cotangents)}


def _by_key_head(name, query, key, value, prompt_key, prompt_value, seen: Seen):
    (n, t), (p, s) = query.shape[:2], prompt_key.shape[:2]
    if name == "pallas":
        blocks.check_fits(t, s, query.shape[3], query.dtype)
    intervals = visibility.intervals(seen, s, n // p, t)
    given = operands.by_key_head(query, key, value, prompt_key, prompt_value)
    return operands.by_row(_in_passes(name, given, intervals, seen.options))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _in_passes(name, given, intervals, options):
    return PASSES[name].attend(given, intervals, options)[0]


def _forward(name, given, intervals, options):
    results = PASSES[name].attend(given, intervals, options)
    return results[0], (given, intervals, results)


def _backward(name, options, residuals, d_out):
    # A residual that was a constant comes back as a NumPy array.
    given, intervals, results = jax.tree.map(jnp.asarray, residuals)
    return PASSES[name].cotangents(given, intervals, options, results, d_out), None


_in_passes.defvjp(_forward, _backward)
