"""A number instead of a token: values of states and rewards of answers, from the same hidden states."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from rl_jax.models.network import Network
from rl_jax.types import Parameters


def value(hidden: Float[Array, "N T D"], weight: Float[Array, " D"]) -> Float32[Array, "N T"]:
    """hidden . weight: the critic's value of the state before each token, in reward units."""
    n, t, d = hidden.shape
    return (hidden.reshape(n * t, d).astype(jnp.float32) @ weight.astype(jnp.float32)).reshape(n, t)


def reward(hidden: Float[Array, "N T D"], weight: Float[Array, " D"], mask: Bool[Array, "N T"]) -> Float32[Array, " N"]:
    """hidden . weight at each row's last token that the mask shows: a reward model's score; 0 where it shows none.

    Args:
      hidden: states after each token, the token itself seen.
      mask: which tokens belong to the text.
    """
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    state = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0].astype(jnp.float32)
    return jnp.where(mask.any(axis=1), state @ weight.astype(jnp.float32), 0.0)


def critic_from(network: Network, parameters: Parameters) -> Parameters:
    """A critic's starting point: a copy of the policy's parameters and a value head of zeros."""
    return {"body": jax.tree.map(jnp.copy, parameters), "value": jnp.zeros((network.shape.width,), jnp.float32)}
