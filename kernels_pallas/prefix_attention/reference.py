"""The definition, with every score in memory."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from kernels_pallas.prefix_attention import visibility
from kernels_pallas.prefix_attention.visibility import Options, Seen

# What a score that may not be seen becomes. Finite, so that a row that sees nothing gives numbers; a running maximum
# starts at half of it, so that exp(score - maximum) is 0 in any case.
NEVER = -1e30


def prefix_attention(query: Float[Array, "N T H E"], key: Float[Array, "N T K E"], value: Float[Array, "N T K E"],
                     prompt_key: Float[Array, "P S K E"], prompt_value: Float[Array, "P S K E"],
                     seen: Seen) -> Float[Array, "N T H E"]:
    """softmax(scores of prompt and completion together) times their values, summed in float32."""
    (n, t, h, e), (p, s, k) = query.shape, prompt_key.shape[:3]
    q, key, value, prompt_key, prompt_value = (
        x.astype(jnp.float32) for x in (query, key, value, prompt_key, prompt_value))
    q = q.reshape(p, n // p, t, k, h // k, e)
    key, value = (x.reshape(p, n // p, t, k, e) for x in (key, value))
    far = jnp.einsum("pgtkre,pske->pgkrts", q, prompt_key)
    near = jnp.einsum("pgtkre,pguke->pgkrtu", q, key)
    score = scores(jnp.concatenate([far, near], axis=-1), e, seen.options)
    visible = mask(seen, n, s, t).reshape(p, n // p, 1, 1, t, s + t)
    weight = jax.nn.softmax(jnp.where(visible, score, NEVER), axis=-1)
    mixed = (jnp.einsum("pgkrts,pske->pgtkre", weight[..., :s], prompt_value)
             + jnp.einsum("pgkrtu,pguke->pgtkre", weight[..., s:], value))
    return mixed.reshape(n, t, h, e).astype(query.dtype)


def scores(products: Float32[Array, "..."], size: int, options: Options) -> Float32[Array, "..."]:
    """cap tanh(scale q k / cap), in nats.

    Args:
      products: q k.
      size: E, of a head.
      options: scale, soft_cap.
    """
    z = products * (size**-0.5 if options.scale is None else options.scale)
    return z if options.soft_cap is None else options.soft_cap * jnp.tanh(z / options.soft_cap)


def mask(seen: Seen, rows: int, positions: int, tokens: int) -> Bool[Array, "N T U"]:
    """Which of the prompt's positions, and behind them of its own row's, each token sees: U = S + T."""
    segment = jnp.zeros((rows, tokens), jnp.int32) if seen.segment is None else seen.segment
    now = jnp.arange(tokens)
    near = (segment[:, :, None] == segment[:, None, :]) & (now[None, None, :] <= now[None, :, None])
    position = near.sum(axis=2) - 1
    start = jnp.repeat(seen.prompt, rows // seen.prompt.shape[0])[:, None]
    far = jnp.broadcast_to(jnp.arange(positions)[None, None, :] < start[:, :, None], (rows, tokens, positions))
    if seen.options.window is not None:
        at = jnp.concatenate([jnp.broadcast_to(jnp.arange(positions)[None, :], (rows, positions)), start + position], 1)
        inside = (start + position)[:, :, None] - at[:, None, :] < seen.options.window
        near, far = near & inside[:, :, positions:], far & inside[:, :, :positions]
    visible = jnp.concatenate([far, near], axis=2)
    kept = visibility.real(seen, rows, tokens)
    return visible if kept is None else visible & kept[:, :, None]
