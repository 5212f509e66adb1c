"""The arrays in the layout of the computation: key heads in front, one prompt for its whole group."""
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Operands(NamedTuple):
    """What is differentiated, or its cotangents.

    Attributes:
      query: [P, K, G, R, T, E], so that one matrix product meets a prompt's keys with G R T queries.
      key, value: [P, K, G, T, E].
      prompt_key, prompt_value: [P, K, S, E].
    """

    query: Array
    key: Array
    value: Array
    prompt_key: Array
    prompt_value: Array


def by_key_head(query: Float[Array, "N T H E"], key: Float[Array, "N T K E"], value: Float[Array, "N T K E"],
                prompt_key: Float[Array, "P S K E"], prompt_value: Float[Array, "P S K E"]) -> Operands:
    """The operands of rows that stand prompt-major."""
    (n, t, h, e), (p, _, k) = query.shape, prompt_key.shape[:3]
    rows = lambda x: x.reshape(p, n // p, t, k, e).transpose(0, 3, 1, 2, 4)
    prompt = lambda x: x.transpose(0, 2, 1, 3)
    query = query.reshape(p, n // p, t, k, h // k, e).transpose(0, 3, 1, 4, 2, 5)
    return Operands(query, rows(key), rows(value), prompt(prompt_key), prompt(prompt_value))


def by_row(out: Float[Array, "P K G R T E"]) -> Float[Array, "N T H E"]:
    """The inverse, for a result that stands as the query does."""
    p, k, g, r, t, e = out.shape
    return jnp.transpose(out, (0, 2, 4, 1, 3, 5)).reshape(p * g, t, k * r, e)
