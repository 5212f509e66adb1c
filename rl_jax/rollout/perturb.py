"""Prompts made harder to read, as other views under which given answers are scored."""
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from rl_jax.types import Prompts, Scalar


def token_noise(prompts: Prompts, seed: UInt32[Array, " P"], share: Scalar) -> Prompts:
    """Each token of a prompt replaced, with probability `share`, with that at a random place of the same prompt.

    The length stays; what is degraded is the words and their order. An image's noise, for text.

    Args:
      prompts: right-padded; the padding is not touched.
      seed: a random number per prompt.
      share: probability, in [0, 1].
    """
    def one(tokens, length, seed):
        draw, choose = jax.random.split(jax.random.key(seed))
        place = jax.random.randint(choose, tokens.shape, 0, length)
        replaced = (jax.random.uniform(draw, tokens.shape) < share) & (jnp.arange(tokens.shape[0]) < length)
        return jnp.where(replaced, tokens[place], tokens)

    return dataclasses.replace(prompts, tokens=jax.vmap(one)(jnp.asarray(prompts.tokens), jnp.asarray(prompts.lengths),
                                                             seed))
