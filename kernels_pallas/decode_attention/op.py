"""One new token of every sample of a group attends to the prompt's cache, which they share, and to its own."""
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import dispatch
from kernels_pallas.decode_attention import backward, blocks, forward, kernel, reference
from kernels_pallas.decode_attention.reference import Cache
from kernels_pallas.prefix_attention.visibility import Options

SUMS = {"xla": forward.tiled, "ragged": forward.ragged, "pallas": kernel.sums}


def decode_attention(query: Float[Array, "*G P H E"], own: Cache, prompt: Cache, *,
                     options: Options = Options(), implementation: str | None = None) -> Float[Array, "*G P H E"]:
    """softmax(q k / sqrt E) v over the seen positions of the prompt's cache [P, K, S, E] and the own [*G, P, K, T, E].

    `options` change the scores and hide what is not in the window: of the text that the prompt's seen positions and
    the own ones make together, the newest token sees itself and the window - 1 tokens before it.

    The prompt's cache is read once for the whole group: G is an axis in front, or a `vmap` over samples with the
    prompt's cache at `in_axes=None`, whatever else is mapped around it. Query head h reads key head h // (H / K). A
    query that sees nothing gets 0. For sampling: the gradient is right, but recomputes everything.

    Args:
      query: of the newest token, one per sequence, float32 or bfloat16; products are summed in float32.
      own: the samples' caches; `lengths` [*G, P] count the newest token, which has been written.
      prompt: the prompts' caches, with lengths [P].
      options: plain numbers of the definition, as in `prefix_attention`.
      implementation: "reference" (one softmax), "xla" (tiles of positions, as far as the longest sequence), "ragged"
        (tiles, for each sequence as far as its own), "pallas", or None for the best on this device.

    Raises:
      ValueError: shapes that do not fit, a scale, cap or window that is not positive, an implementation that does not
        exist or cannot run here.
    """
    _check(query, own, prompt, options)
    head_size = query.shape[-1]
    run = dispatch.implementation("decode_attention", implementation, blocks.best(head_size), {
        "reference": reference.decode_attention, **{name: functools.partial(_in_parts, name) for name in SUMS}})
    refused = blocks.refused(head_size)
    if implementation == "pallas" and refused:
        raise ValueError(f"decode_attention cannot run its kernel: {refused}. Ask for 'xla'.")
    return run(query, own, prompt, options)


def _check(query: Array, own: Cache, prompt: Cache, options: Options) -> None:
    *batch, h, e = query.shape
    k = prompt.key.shape[1] if prompt.key.ndim == 4 else 0
    for name, cache, batch in ("own", own, tuple(batch)), ("prompt", prompt, tuple(batch[-1:])):
        positions = cache.key.shape[-2] if cache.key.ndim > 2 else 0
        expected = (*batch, k, positions, e)
        if cache.key.shape != expected or cache.value.shape != expected or cache.lengths.shape != batch:
            raise ValueError(f"query [*G, P, H, E] = {query.shape}: the {name} cache must have key and value "
                             f"{expected} and lengths {batch}, not {cache.key.shape}, {cache.value.shape} and "
                             f"{cache.lengths.shape}.")
    if h % k:
        raise ValueError(f"{h} query heads, {k} key heads: the second must divide the first.")
    for name, number in options._asdict().items():
        if number is not None and not number > 0:
            raise ValueError(f"options.{name} must be positive or None, not {number}.")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def _in_parts(name, query, own, prompt, options):
    return forward.decode_attention(SUMS[name], query, own, prompt, options)


def _forward(name, query, own, prompt, options):
    return _in_parts(name, query, own, prompt, options), (query, own, prompt)


def _backward(name, options, residuals, cotangent):
    # A residual that was a constant comes back as a NumPy array.
    return backward.cotangents(options, *jax.tree.map(jnp.asarray, residuals), cotangent)


_in_parts.defvjp(_forward, _backward)
