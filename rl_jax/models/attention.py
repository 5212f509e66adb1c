"""Grouped-query attention in the three shapes of the data path.

Axes: `H` query heads, `K` key heads, `R = H / K` queries per key head, `E` head size. A prompt's
own tokens see each other; a completion sees its prompt (one copy for the whole group) and itself.
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.decode_attention.op import decode_attention
from kernels_pallas.decode_attention.reference import Cache
from kernels_pallas.prefix_attention.op import prefix_attention
from kernels_pallas.prefix_attention.visibility import Options, Seen
from rl_jax.models import mesh

PLAIN = Options()


def prompt(query: Float[Array, "P S H E"], key: Float[Array, "P S K E"], value: Float[Array, "P S K E"],
           options: Options = PLAIN) -> Float[Array, "P S H E"]:
    """Causal attention of a prompt to itself. Padding is on the right, so no real token sees it.

    Args:
      options: scale, bound and window of the scores.
    """
    if options.soft_cap is None and mesh.current() is None and _runs_on_cudnn(query):
        window = None if options.window is None else (options.window - 1, 0)
        return jax.nn.dot_product_attention(query, key, value, scale=options.scale, is_causal=True,
                                            local_window_size=window, implementation="cudnn")
    nothing = Seen(jnp.zeros(query.shape[0], jnp.int32), options=options)
    return prefix_attention(query, key, value, key[:, :0], value[:, :0], nothing, _implementation())


def shared_prefix(query: Float[Array, "N T H E"], key: Float[Array, "N T K E"], value: Float[Array, "N T K E"],
                  prompt_key: Float[Array, "P S K E"], prompt_value: Float[Array, "P S K E"],
                  prompt_seen: Int[Array, " P"], options: Options = PLAIN, *,
                  segment: Int[Array, "N T"] | None = None) -> Float[Array, "N T H E"]:
    """Attention of completions to one copy of their prompt and, causally, to themselves.

    Args:
      query, key, value: of the completions, prompt-major: N = P * G.
      prompt_key, prompt_value: of the prompts.
      prompt_seen: how many of the prompt's first positions may be seen, 0 to S.
      options: scale, bound and window of the scores.
      segment: which completion each token belongs to, where several share a row; -1 is padding. None: a row is one.
    """
    seen = Seen(prompt_seen, segment=segment, options=options)
    return prefix_attention(query, key, value, prompt_key, prompt_value, seen, _implementation())


def one_query(query: Float[Array, "P H E"], own: Cache, prompt: Cache,
              options: Options = PLAIN) -> Float[Array, "P H E"]:
    """Attention of one new token per prompt to the prompt's cache and its own; vmapped over the group.

    The `vmap` leaves the prompt's cache where it is: the queries of the group become rows of one product with it.

    Args:
      own: the completions' keys and values [P, K, T, E]; its lengths count the new token.
      prompt: those of the prompts, [P, K, S, E].
      options: scale, bound and window of the scores.
    """
    return decode_attention(query, own, prompt, options=options, implementation=_implementation())


def _implementation() -> str | None:
    """On a mesh the one that XLA cuts over devices: it cuts no Pallas kernel."""
    return None if mesh.current() is None else "xla"


def _runs_on_cudnn(query: Float[Array, "..."]) -> bool:
    """Whether cuDNN has a kernel for these queries, on every GPU that has any."""
    found = dispatch.platform() == "gpu" and "cuda" in jax.devices()[0].client.platform_version
    return found and query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
