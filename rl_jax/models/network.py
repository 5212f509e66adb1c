"""A network as pure functions of its parameters: `nnx.split` once, arrays from then on."""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Key, UInt32

from kernels_pallas.linear_logprob import sharded
from kernels_pallas.linear_logprob.op import linear_logprob
from rl_jax.models import lora, mesh, transformer
from rl_jax.models.block import Turns, turns
from rl_jax.models.lora import Adapters
from rl_jax.models.routes import Routes
from rl_jax.models.shape import Shape
from rl_jax.types import Parameters


@dataclasses.dataclass(frozen=True)
class Network:
    """The transformer's entry points, each with the parameters as its first argument.

    Parameters are a nested dict of arrays. With `adapters`, fresh ones hold low-rank adapters; every entry point also
    takes weights without them, which are those of the base network.
    """

    shape: Shape
    adapters: Adapters | None = None

    @functools.cached_property
    def graphdef(self) -> nnx.GraphDef:
        """The module's structure, which `nnx.merge` puts parameters into."""
        return _graph_of(self.shape, self.adapters)

    @functools.cached_property
    def _base(self) -> nnx.GraphDef:
        return _graph_of(self.shape, None)

    def initialise(self, key: Key[Array, ""]) -> Parameters:
        """Fresh float32 parameters; the key is consumed."""
        module = transformer.Transformer(self.shape, rngs=nnx.Rngs(params=key), adapters=self.adapters)
        return nnx.to_pure_dict(nnx.split(module)[1])

    def module(self, parameters: Parameters) -> transformer.Transformer:
        """The NNX module that holds these parameters."""
        adapted = self.adapters is not None and lora.there(parameters)
        return nnx.merge(self.graphdef if adapted else self._base, parameters)

    def hidden(self, parameters: Parameters, prompts: Int[Array, "P S"], lengths: Int[Array, " P"],
               completions: Int[Array, "N T"], routes: Routes | None = None,
               segment: Int[Array, "N T"] | None = None) -> Float[Array, "N T D"]:
        """Hidden states that the completion tokens are drawn from (`Transformer.hidden`)."""
        return self.module(parameters).hidden(prompts, lengths, completions, routes, segment)[0]

    def routes(self, parameters: Parameters, prompts: Int[Array, "P S"], lengths: Int[Array, " P"],
               completions: Int[Array, "N T"]) -> Routes | None:
        """The experts that the routers choose for every token; None without mixtures."""
        return self.module(parameters).hidden(prompts, lengths, completions)[1]

    def prefill(self, parameters: Parameters,
                prompts: Int[Array, "P S"]) -> tuple[Any, Int[Array, "P S L k"] | None]:
        """Keys and values of the prompts, and the experts of their tokens (`Transformer.prefill`)."""
        return self.module(parameters).prefill(prompts)

    def decode(self, parameters: Parameters, prompt_cache: Any, cache: Any, token: Int[Array, " P"],
               lengths: Int[Array, " P"], now: Int[Array, ""] | Int[Array, " P"],
               table: Turns) -> tuple[Float[Array, "P D"], Any, Int[Array, "P L k"] | None]:
        """One decode step (`Transformer.decode`)."""
        return self.module(parameters).decode(prompt_cache, cache, token, lengths, now, table)

    def turns(self, length: int) -> Turns:
        """By what queries and keys are turned at the positions from 0 to length - 1, for `decode`."""
        return turns(self.shape, length)

    def empty_cache(self, parameters: Parameters, rows: int, length: int) -> Any:
        """Room for a completion's keys and values (`Transformer.empty_cache`)."""
        return self.module(parameters).empty_cache(rows, length)

    def rows_of_cache(self, cache: Any, rows: Int[Array, " B"]) -> Any:
        """A copy of some rows of a cache, which may be given more than once (`Transformer.empty_cache`)."""
        return jax.tree.map(lambda a: jnp.take(a, rows, axis=1 if self.shape.scan_layers else 0), cache)

    def vocabulary(self, parameters: Parameters) -> Float[Array, "V D"]:
        """The head matrix (`Transformer.vocabulary`)."""
        return self.module(parameters).vocabulary()

    def logprob(self, hidden: Float[Array, "M D"], vocabulary: Float[Array, "V D"], targets: Int[Array, " M"], *,
                temperature: float = 1.0, support: UInt32[Array, "M W"] | None = None,
                implementation: str | None = None) -> tuple[Float32[Array, " M"], Float32[Array, " M"]]:
        """`linear_logprob` within the network's bound; on a mesh every device passes over its own rows and tokens."""
        found = mesh.current()
        if found is None:
            return linear_logprob(hidden, vocabulary, targets, temperature=temperature, soft_cap=self.logit_cap,
                                  support=support, implementation=implementation)
        layout = sharded.Layout(found, mesh.row_axes(hidden.shape[0]), mesh.axis_of("tensor", vocabulary.shape[0]),
                                implementation)
        return sharded.linear_logprob(hidden, vocabulary, targets, layout, temperature=temperature,
                                      soft_cap=self.logit_cap, support=support)

    @property
    def logit_cap(self) -> float | None:
        """The bound on the logits, in nats; None if they have none."""
        return self.shape.logit_cap or None

    def logits(self, hidden: Float[Array, "M D"], vocabulary: Float[Array, "V D"]) -> Float32[Array, "M V"]:
        """hidden vocabulary^T, summed in float32, within the network's bound.

        Args:
          vocabulary: the head matrix.
        """
        z = jnp.einsum("md,vd->mv", hidden, vocabulary, preferred_element_type=jnp.float32)
        return z if self.logit_cap is None else self.logit_cap * jnp.tanh(z / self.logit_cap)


def _graph_of(shape: Shape, adapters: Adapters | None) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: transformer.Transformer(shape, rngs=nnx.Rngs(0), adapters=adapters)))[0]
