"""One layer: x + attention(norm x), then x + inner(norm x)."""
import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels_pallas.prefix_attention.visibility import Options
from rl_jax.models import dense, mesh, norm, rotary
from rl_jax.models.lora import Adapters
from rl_jax.models.mixture import Mixture
from rl_jax.models.shape import Kind, Shape, depth_scale

Turns = Mapping[tuple[float, Any], rotary.Turn]
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class Block(nnx.Module):
    """x + attention(norm x), then x + inner(norm x); with norms behind attention and inner layer, too, where the shape
    has them."""

    def __init__(self, shape: Shape, kind: Kind, *, rngs: nnx.Rngs, adapters: Adapters | None = None):
        width, heads, keys = shape.width, shape.heads * shape.head_size, shape.key_heads * shape.head_size

        def norm_of(size: int) -> norm.Norm:
            return norm.Norm(size, shape.norm_epsilon, shape.norm_offset)

        def project(name: str, inputs: int, outputs: int, **options) -> dense.Linear:
            return dense.projection(name, adapters, inputs, outputs, rngs=rngs, **options)

        self.shape, self.kind = shape, kind
        self.query = project("query", width, heads, bias=shape.query_bias)
        self.key = project("key", width, keys, bias=shape.query_bias)
        self.value = project("value", width, keys, bias=shape.query_bias)
        self.out = project("out", heads, width, scale=depth_scale(shape.layers))
        self.gate = None if kind.mixture else project("gate", width, shape.inner)
        self.up = None if kind.mixture else project("up", width, shape.inner)
        self.down = None if kind.mixture else project("down", shape.inner, width, scale=depth_scale(shape.layers))
        self.mixture = Mixture(shape.mixture, shape.width, shape.layers, rngs=rngs) if kind.mixture else None
        self.before_attention, self.before_inner = norm_of(width), norm_of(width)
        self.after_attention = norm_of(width) if shape.after_norms else None
        self.after_inner = norm_of(width) if shape.after_norms else None
        self.query_norm = norm_of(shape.head_size) if shape.query_norm else None
        self.key_norm = norm_of(shape.head_size) if shape.query_norm else None

    @property
    def options(self) -> Options:
        """What its attention is told."""
        return Options(scale=self.shape.attention_scale or None, soft_cap=self.shape.attention_cap or None,
                       window=self.kind.window)

    def heads(self, x: Float[Array, "M D"], turns: Turns) -> tuple[Array, Array, Array]:
        """Queries [M, H, E], keys and values [M, K, E] of each row, turned to their positions.

        Args:
          turns: of each row, for the kinds of all layers (`turns_at`).
        """
        rows, size = x.shape[0], self.shape.head_size
        y = self.before_attention(x)
        query, key, value = (mesh.cut(project(y).reshape(rows, -1, size), "tensor")
                             for project in (self.query, self.key, self.value))
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        turn = turns[self.kind.rotation]
        return rotary.rotate(query, turn), rotary.rotate(key, turn), value

    def finish(self, x: Float[Array, "M D"], attended: Float[Array, "M C"],
               chosen: Int[Array, "M k"] | None = None) -> tuple[Float[Array, "M D"], Int[Array, "M k"] | None]:
        """The rest of the layer, given what attention returned.

        Args:
          chosen: the experts of each row, for a layer that mixes them; None lets its router choose.

        Returns:
          The layer's output, and the experts of each row (None for a dense layer).
        """
        mixed = mesh.cut(self.out(mesh.cut(attended, "tensor")))
        x = x + (mixed if self.after_attention is None else self.after_attention(mixed))
        y = self.before_inner(x)
        if self.mixture is None:
            inner = ACTIVATIONS[self.shape.activation](mesh.cut(self.gate(y), "tensor")) * mesh.cut(self.up(y), "tensor")
            y, chosen = mesh.cut(self.down(inner)), None
        else:
            y, chosen = self.mixture(y, chosen)
        return x + (y if self.after_inner is None else self.after_inner(y)), chosen


def turns(shape: Shape, length: int) -> Turns:
    """By what each kind of layer turns queries and keys at the positions 0, 1, ..., length - 1."""
    kinds = {kind.rotation for kind in shape.kinds}
    return {kind: rotary.table(length, rotary.frequencies(shape.head_size, *kind)) for kind in kinds}


def turns_at(table: Turns, position: Int[Array, " M"]) -> Turns:
    """The rows of a table that stand at these positions."""
    return {kind: rotary.Turn(turn.cosine[position], turn.sine[position]) for kind, turn in table.items()}
