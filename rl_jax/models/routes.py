"""Which experts every token went through, layer by layer: recorded when answers are drawn, replayed in training."""
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int


class Routes(NamedTuple):
    """The experts of every token in every mixing layer; a completion's position t is the token that t is drawn from.

    Attributes:
      prompt: ids, best first.
      completion: the same, of the completions.
    """

    prompt: Int[Array, "P S L k"]
    completion: Int[Array, "N T L k"]

    def by_layer(self) -> tuple[Int[Array, "L M k"], Int[Array, "L B k"]]:
        """Both with the layers first and a row per token, as the layers read them."""
        return tuple(jnp.moveaxis(a.reshape(-1, *a.shape[2:]), 0, 1).astype(jnp.int32) for a in self)


def of_layers(prompt: Int[Array, "L M k"], completion: Int[Array, "L B k"], prompts: int, rows: int) -> Routes:
    """The routes of what `Routes.by_layer` gives.

    Args:
      prompts, rows: P and N.
    """
    def by_token(a: Array, texts: int) -> Array:
        return jnp.moveaxis(a, 0, 1).reshape(texts, -1, a.shape[0], a.shape[2])

    return Routes(by_token(prompt, prompts), by_token(completion, rows))


def dtype(experts: int) -> DTypeLike:
    """The smallest type that holds the ids, for what is kept of a whole batch."""
    return jnp.uint8 if experts <= 256 else jnp.uint16
