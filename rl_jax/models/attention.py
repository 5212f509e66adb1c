"""Grouped-query attention in the three shapes of the data path.

Axes: `H` query heads, `K` key heads, `R = H / K` queries per key head, `E` head size. A prompt's
own tokens see each other; a completion sees its prompt (one copy for the whole group) and itself.
"""
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NEVER = -1e30  # finite, so that a row that sees nothing gives numbers


def prompt(query: Float[Array, "P S H E"], key: Float[Array, "P S K E"],
           value: Float[Array, "P S K E"]) -> Float[Array, "P S H E"]:
    """Causal attention of a prompt to itself. Padding is on the right, so no real token sees it."""
    seen = jnp.tril(jnp.ones((query.shape[1], query.shape[1]), bool))
    q = _by_key_head(query, key.shape[2])
    score = jnp.einsum("pskre,puke->pkrsu", q, key, preferred_element_type=jnp.float32) / query.shape[-1] ** 0.5
    score = jnp.where(seen[None, None, None], score, NEVER)
    weight = _exponential(score, score.max(axis=-1, keepdims=True))
    mixed = jnp.einsum("pkrsu,puke->pskre", weight.astype(value.dtype), value, preferred_element_type=jnp.float32)
    total = jnp.moveaxis(weight.sum(axis=-1), 3, 1)[..., None]
    return (mixed / total).reshape(query.shape).astype(query.dtype)


def shared_prefix(query: Float[Array, "N T H E"], key: Float[Array, "N T K E"], value: Float[Array, "N T K E"],
                  prompt_key: Float[Array, "P S K E"], prompt_value: Float[Array, "P S K E"],
                  prompt_seen: Bool[Array, "P S"]) -> Float[Array, "N T H E"]:
    """Attention of completions to one copy of their prompt and, causally, to themselves.

    Args:
      query, key, value: of the completions, prompt-major: N = P * G.
      prompt_key, prompt_value: of the prompts.
      prompt_seen: which prompt positions may be seen.
    """
    (n, t, h, e), (p, s, k) = query.shape, prompt_key.shape[:3]
    q = _by_key_head(query, k)
    grouped = q.reshape(p, n // p, t, k, h // k, e)
    scale = e**-0.5
    far = jnp.einsum("pgtkre,pske->pkgtrs", grouped, prompt_key, preferred_element_type=jnp.float32) * scale
    far = jnp.where(prompt_seen[:, None, None, None, None, :], far, NEVER)
    near = jnp.einsum("ntkre,nuke->nktru", q, key, preferred_element_type=jnp.float32) * scale
    seen = jnp.tril(jnp.ones((t, t), bool))
    near = jnp.where(seen[None, None, :, None, :], near, NEVER)

    def per_completion(a):  # [P, K, G, T, R, 1] -> [N, K, T, R, 1]
        return jnp.moveaxis(a, 2, 1).reshape(n, k, t, h // k, 1)

    def per_prompt(a):
        return jnp.moveaxis(a.reshape(p, n // p, k, t, h // k, 1), 1, 2)

    top = jnp.maximum(per_completion(far.max(axis=-1, keepdims=True)), near.max(axis=-1, keepdims=True))
    far, near = _exponential(far, per_prompt(top)), _exponential(near, top)
    total = per_completion(far.sum(axis=-1, keepdims=True)) + near.sum(axis=-1, keepdims=True)
    from_prompt = jnp.einsum("pkgtrs,pske->pgtkre", far.astype(value.dtype), prompt_value,
                             preferred_element_type=jnp.float32).reshape(n, t, k, h // k, e)
    from_self = jnp.einsum("nktru,nuke->ntkre", near.astype(value.dtype), value, preferred_element_type=jnp.float32)
    mixed = (from_prompt + from_self) / jnp.moveaxis(total, 1, 2)
    return mixed.reshape(n, t, h, e).astype(query.dtype)


def one_query(query: Float[Array, "P H E"], key: Float[Array, "P T K E"], value: Float[Array, "P T K E"],
              prompt_key: Float[Array, "P S K E"], prompt_value: Float[Array, "P S K E"],
              prompt_seen: Bool[Array, "P S"], now: Int[Array, ""]) -> Float[Array, "P H E"]:
    """Attention of one new token per prompt to the prompt's cache and its own; vmapped over the group.

    Args:
      key, value: the completion's cache, filled up to and including position `now`.
    """
    p, h, e = query.shape
    k = key.shape[2]
    q = query.reshape(p, k, h // k, e)
    scale = e**-0.5
    far = jnp.einsum("pkre,pske->pkrs", q, prompt_key, preferred_element_type=jnp.float32) * scale
    far = jnp.where(prompt_seen[:, None, None, :], far, NEVER)
    near = jnp.einsum("pkre,ptke->pkrt", q, key, preferred_element_type=jnp.float32) * scale
    near = jnp.where((jnp.arange(key.shape[1]) <= now)[None, None, None, :], near, NEVER)
    top = jnp.maximum(far.max(axis=-1, keepdims=True), near.max(axis=-1, keepdims=True))
    far, near = _exponential(far, top), _exponential(near, top)
    total = far.sum(axis=-1, keepdims=True) + near.sum(axis=-1, keepdims=True)
    mixed = (jnp.einsum("pkrs,pske->pkre", far.astype(value.dtype), prompt_value, preferred_element_type=jnp.float32)
             + jnp.einsum("pkrt,ptke->pkre", near.astype(value.dtype), value, preferred_element_type=jnp.float32))
    return (mixed / total).reshape(p, h, e).astype(query.dtype)


def _by_key_head(query: Float[Array, "A B H E"], key_heads: int) -> Float[Array, "A B K R E"]:
    a, b, h, e = query.shape
    return query.reshape(a, b, key_heads, h // key_heads, e)


def _exponential(score: Float[Array, "..."], top: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.exp(score - top)
