"""A network as pure functions of its parameters: `nnx.split` once, arrays from then on."""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from rl_jax.models import transformer
from rl_jax.types import Parameters


@dataclasses.dataclass(frozen=True)
class Network:
    """The transformer's entry points, each with the parameters as its first argument.

    Parameters are a nested dict of float32 arrays.
    """

    shape: transformer.Shape

    @functools.cached_property
    def _graph(self) -> nnx.GraphDef:
        return nnx.split(nnx.eval_shape(lambda: transformer.Transformer(self.shape, rngs=nnx.Rngs(0))))[0]

    def initialise(self, key: Key[Array, ""]) -> Parameters:
        """Fresh parameters; the key is consumed."""
        module = transformer.Transformer(self.shape, rngs=nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.split(module)[1])

    def module(self, parameters: Parameters) -> transformer.Transformer:
        """The NNX module that holds these parameters."""
        return nnx.merge(self._graph, parameters)

    def hidden(self, parameters: Parameters, prompts: Int[Array, "P S"], lengths: Int[Array, " P"],
               completions: Int[Array, "N T"]) -> Float[Array, "N T D"]:
        """Hidden states that the completion tokens are drawn from (`Transformer.hidden`)."""
        return self.module(parameters).hidden(prompts, lengths, completions)

    def prefill(self, parameters: Parameters, prompts: Int[Array, "P S"]) -> Any:
        """Keys and values of the prompts (`Transformer.prefill`)."""
        return self.module(parameters).prefill(prompts)

    def decode(self, parameters: Parameters, prompt_cache: Any, cache: Any, token: Int[Array, " P"],
               lengths: Int[Array, " P"], now: Int[Array, ""]) -> tuple[Float[Array, "P D"], Any]:
        """One decode step (`Transformer.decode`)."""
        return self.module(parameters).decode(prompt_cache, cache, token, lengths, now)

    def empty_cache(self, parameters: Parameters, rows: int, length: int) -> Any:
        """Room for a completion's keys and values (`Transformer.empty_cache`)."""
        return self.module(parameters).empty_cache(rows, length)

    def vocabulary(self, parameters: Parameters) -> Float[Array, "V D"]:
        """The head matrix (`Transformer.vocabulary`)."""
        return self.module(parameters).vocabulary()


def value_head(hidden: Float[Array, "N T D"], weight: Float[Array, " D"]) -> Float[Array, "N T"]:
    """hidden . weight: the critic's value of the state before each token, in reward units."""
    n, t, d = hidden.shape
    return (hidden.reshape(n * t, d).astype(jnp.float32) @ weight).reshape(n, t)


def critic_from(network: Network, parameters: Parameters) -> Parameters:
    """A critic's starting point: a copy of the policy's parameters and a value head of zeros."""
    return {"body": jax.tree.map(jnp.copy, parameters), "value": jnp.zeros((network.shape.width,), jnp.float32)}
