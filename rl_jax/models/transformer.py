"""The policy network: a decoder-only transformer with three ways in and none through the logits.

A completion is fed the last prompt token followed by its own tokens but the last, so that the
hidden state at position t is the one that token t was drawn from, in training and in decoding
alike. Every projection sees a flat `[rows, D]` matrix.
"""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels_pallas.decode_attention.reference import Cache
from rl_jax.models import attention, norm, rotary

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a network.

    Attributes:
      vocabulary: V, rows of the embedding.
      width: D of the residual stream.
      layers, heads, key_heads, head_size: of the attention; key_heads divides heads.
      inner: width of the SwiGLU layer.
      query_bias: bias on the query, key and value projections (Qwen2).
      query_norm: RMSNorm on queries and keys, per head (Qwen3).
      tied: the head is the embedding.
      scale_embedding: multiply embeddings by sqrt(D), as Gemma does.
      rotary_base: of the rotary wavelengths.
      norm_epsilon: inside RMSNorm's square root.
      scan_layers: one compiled layer, scanned (short compile times for deep networks); otherwise unrolled.
      remat: recompute each layer in the backward pass instead of keeping its activations.
      compute: "float32" or "bfloat16"; parameters are float32 either way.
    """

    vocabulary: int
    width: int = 128
    layers: int = 3
    heads: int = 4
    key_heads: int = 2
    head_size: int = 32
    inner: int = 512
    query_bias: bool = False
    query_norm: bool = False
    tied: bool = True
    scale_embedding: bool = False
    rotary_base: float = 10_000.0
    norm_epsilon: float = 1e-6
    scan_layers: bool = False
    remat: bool = False
    compute: str = "float32"

    def __post_init__(self):
        for name in ("vocabulary", "width", "layers", "heads", "key_heads", "head_size", "inner"):
            if getattr(self, name) < 1:
                raise ValueError(f"model {name}={getattr(self, name)}: must be at least 1.")
        if self.heads % self.key_heads:
            raise ValueError(f"model heads={self.heads}, key_heads={self.key_heads}: key_heads must divide heads.")
        if self.head_size % 2:
            raise ValueError(f"model head_size={self.head_size}: rotary embedding needs an even number.")
        if self.compute not in DTYPES:
            raise ValueError(f"model compute={self.compute!r}: allowed are {sorted(DTYPES)}.")


class Linear(nnx.Module):
    """x W (+ b), in x's dtype."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs, bias: bool = False, scale: float = 1.0):
        normal = jax.nn.initializers.variance_scaling(scale, "fan_in", "normal")
        self.weight = nnx.Param(normal(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "M A"]) -> Float[Array, "M B"]:
        y = x @ self.weight[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)[None, :]


class Block(nnx.Module):
    """One layer: x + attention(norm x), then x + swiglu(norm x)."""

    def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
        width, heads, keys = shape.width, shape.heads * shape.head_size, shape.key_heads * shape.head_size
        depth = 1 / (2 * shape.layers)  # keeps the residual stream's variance near 1 at any depth
        self.shape = shape
        self.query = Linear(width, heads, rngs=rngs, bias=shape.query_bias)
        self.key = Linear(width, keys, rngs=rngs, bias=shape.query_bias)
        self.value = Linear(width, keys, rngs=rngs, bias=shape.query_bias)
        self.out = Linear(heads, width, rngs=rngs, scale=depth)
        self.gate = Linear(width, shape.inner, rngs=rngs)
        self.up = Linear(width, shape.inner, rngs=rngs)
        self.down = Linear(shape.inner, width, rngs=rngs, scale=depth)
        self.before_attention = norm.Norm(width, shape.norm_epsilon)
        self.before_inner = norm.Norm(width, shape.norm_epsilon)
        self.query_norm = norm.Norm(shape.head_size, shape.norm_epsilon) if shape.query_norm else None
        self.key_norm = norm.Norm(shape.head_size, shape.norm_epsilon) if shape.query_norm else None

    def heads(self, x: Float[Array, "M D"], position: Int[Array, " M"]) -> tuple[Array, Array, Array]:
        """Queries [M, H, E], keys and values [M, K, E] of each row, turned to their positions."""
        rows, size = x.shape[0], self.shape.head_size
        y = self.before_attention(x)
        query = self.query(y).reshape(rows, -1, size)
        key = self.key(y).reshape(rows, -1, size)
        value = self.value(y).reshape(rows, -1, size)
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        base = self.shape.rotary_base
        return rotary.rotate(query, position, base), rotary.rotate(key, position, base), value

    def finish(self, x: Float[Array, "M D"], attended: Float[Array, "M C"]) -> Float[Array, "M D"]:
        """The rest of the layer, given what attention returned."""
        x = x + self.out(attended)
        y = self.before_inner(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class Transformer(nnx.Module):
    """Embedding, layers and final norm; `vocabulary()` is the head matrix."""

    def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
        self.shape = shape
        normal = jax.nn.initializers.normal(shape.width**-0.5)
        self.embedding = nnx.Param(normal(rngs.params(), (shape.vocabulary, shape.width), jnp.float32))
        self.head = None if shape.tied else nnx.Param(
            normal(rngs.params(), (shape.vocabulary, shape.width), jnp.float32))
        self.final = norm.Norm(shape.width, shape.norm_epsilon)
        if shape.scan_layers:
            self.blocks = nnx.vmap(lambda key: Block(shape, rngs=nnx.Rngs(key)))(
                jax.random.split(rngs.params(), shape.layers))
        else:
            self.blocks = nnx.List([Block(shape, rngs=rngs) for _ in range(shape.layers)])

    def vocabulary(self) -> Float[Array, "V D"]:
        """The head matrix in the compute dtype: logits are hidden @ vocabulary.T."""
        matrix = self.embedding if self.head is None else self.head
        return matrix[...].astype(DTYPES[self.shape.compute])

    def hidden(self, prompts: Int[Array, "P S"], lengths: Int[Array, " P"],
               completions: Int[Array, "N T"]) -> Float[Array, "N T D"]:
        """Hidden states that the completion tokens are drawn from, given one copy of each prompt."""
        p = prompts.shape[0]
        n, t = completions.shape
        inputs = jnp.concatenate([jnp.repeat(last_token(prompts, lengths), n // p)[:, None], completions[:, :-1]], 1)
        position = (jnp.repeat(lengths, n // p)[:, None] - 1 + jnp.arange(t)[None, :]).reshape(-1)

        def layer(block, index, carry):
            x, y = carry
            x, key, value = _prompt_layer(block, x, p)
            q, k, v = block.heads(y, position)
            q, k, v = (a.reshape(n, t, *a.shape[1:]) for a in (q, k, v))
            # The last token of a prompt is fed to its completions, which see it among their own.
            attended = attention.shared_prefix(q, k, v, key, value, lengths - 1)
            return x, block.finish(y, attended.reshape(n * t, -1))

        carry = (self._embed(prompts.reshape(-1)), self._embed(inputs.reshape(-1)))
        _, y = self._through_layers(layer, carry, remat=self.shape.remat)
        return self.final(y).reshape(n, t, -1)

    def prefill(self, prompts: Int[Array, "P S"]) -> tuple[Any, Any]:
        """Keys and values of the prompts, [P, K, S, E]: a tuple per layer, or stacked over layers that are scanned."""
        p, s = prompts.shape

        def layer(block, index, carry):
            x, cache = carry
            x, key, value = _prompt_layer(block, x, p)
            return x, _write(cache, index, (jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)))

        _, cache = self._through_layers(layer, (self._embed(prompts.reshape(-1)), self.empty_cache(p, s)))
        return cache

    def empty_cache(self, rows: int, length: int) -> tuple[Any, Any]:
        """Room for the keys and values of `length` tokens in each of `rows` sequences, [rows, K, length, E]."""
        shape = self.shape
        one = jnp.zeros((rows, shape.key_heads, length, shape.head_size), DTYPES[shape.compute])
        if shape.scan_layers:
            many = jnp.broadcast_to(one, (shape.layers, *one.shape))
            return many, many
        return (one,) * shape.layers, (one,) * shape.layers

    def decode(self, prompt_cache: Any, cache: Any, token: Int[Array, " P"], lengths: Int[Array, " P"],
               now: Int[Array, ""]) -> tuple[Float[Array, "P D"], Any]:
        """One step of one sample per prompt: the hidden state that token `now` is drawn from.

        Args:
          prompt_cache: from `prefill`.
          cache: this sample's own, from `empty_cache`; returned with position `now` written.
          token: fed now: the last prompt token at now = 0, then the token drawn before.
          lengths: of the prompts, in tokens.
          now: the completion position, from 0.
        """

        def layer(block, index, carry):
            x, cache = carry
            q, k, v = block.heads(x, lengths - 1 + now)
            keys, values = _read(cache, index)
            keys = jax.lax.dynamic_update_slice_in_dim(keys, k[:, :, None], now, 2)
            values = jax.lax.dynamic_update_slice_in_dim(values, v[:, :, None], now, 2)
            own = Cache(keys, values, jnp.full_like(lengths, now + 1))
            attended = attention.one_query(q, own, Cache(*_read(prompt_cache, index), lengths - 1))
            return block.finish(x, attended.reshape(x.shape[0], -1)), _write(cache, index, (keys, values))

        x, cache = self._through_layers(layer, (self._embed(token), cache))
        return self.final(x), cache

    def _embed(self, tokens: Int[Array, " M"]) -> Float[Array, "M D"]:
        x = self.embedding[...].astype(DTYPES[self.shape.compute])[tokens]
        return x * self.shape.width**0.5 if self.shape.scale_embedding else x

    def _through_layers(self, layer: Callable, carry: Any, remat: bool = False) -> Any:
        """carry = layer(block, index, carry) for every block in turn."""
        wrap = jax.checkpoint if remat else (lambda f: f)
        if not self.shape.scan_layers:
            for index, block in enumerate(self.blocks):
                graph, state = nnx.split(block)
                carry = wrap(lambda s, c, g=graph, i=index: layer(nnx.merge(g, s), i, c))(state, carry)
            return carry
        graph, state = nnx.split(self.blocks)

        def body(carry, part):
            return layer(nnx.merge(graph, part[0]), part[1], carry), None

        return jax.lax.scan(wrap(body), carry, (state, jnp.arange(self.shape.layers)))[0]


def last_token(prompts: Int[Array, "P S"], lengths: Int[Array, " P"]) -> Int[Array, " P"]:
    """The last token of each right-padded prompt: the first that its completions are fed."""
    return jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]


def _prompt_layer(block: Block, x: Float[Array, "M D"], prompts: int) -> tuple[Array, Array, Array]:
    rows = x.shape[0]
    position = jnp.tile(jnp.arange(rows // prompts), prompts)
    q, k, v = (a.reshape(prompts, rows // prompts, *a.shape[1:]) for a in block.heads(x, position))
    return block.finish(x, attention.prompt(q, k, v).reshape(rows, -1)), k, v


def _read(cache: Any, index: Any) -> tuple[Array, Array]:
    return tuple(a[index] if isinstance(a, tuple) else jax.lax.dynamic_index_in_dim(a, index, 0, keepdims=False)
                 for a in cache)


def _write(cache: Any, index: Any, new: tuple[Array, Array]) -> Any:
    return tuple((*a[:index], b, *a[index + 1:]) if isinstance(a, tuple)
                 else jax.lax.dynamic_update_index_in_dim(a, b, index, 0) for a, b in zip(cache, new, strict=True))
