"""The gradient: that of the reference, computed anew. Sampling needs none; this one is right, not fast."""
import jax
from jaxtyping import Array, Float

from kernels_pallas.decode_attention import reference
from kernels_pallas.decode_attention.reference import Cache
from kernels_pallas.prefix_attention.visibility import Options


def cotangents(options: Options, query: Float[Array, "*G P H E"], own: Cache, prompt: Cache,
               cotangent: Float[Array, "*G P H E"]) -> tuple[Float[Array, "*G P H E"], Cache, Cache]:
    """Cotangents of query, own cache and prompt's cache; lengths have none."""
    (*own, own_lengths), (*prompt, prompt_lengths) = own, prompt

    def attend(query: Array, own: tuple, prompt: tuple) -> Array:
        return reference.decode_attention(query, Cache(*own, own_lengths), Cache(*prompt, prompt_lengths), options)

    d_query, d_own, d_prompt = jax.vjp(attend, query, tuple(own), tuple(prompt))[1](cotangent)
    return d_query, Cache(*d_own, None), Cache(*d_prompt, None)
