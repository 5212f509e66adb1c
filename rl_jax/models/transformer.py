"""The policy network: a decoder-only transformer with three ways in and none through the logits.

A completion is fed the last prompt token followed by its own tokens but the last, so that the
hidden state at position t is the one that token t was drawn from, in training and in decoding
alike. Every projection sees a flat `[rows, D]` matrix.
"""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels_pallas.decode_attention.reference import Cache
from rl_jax.models import attention, mesh, norm, packing
from rl_jax.models.block import Block, Turns, turns, turns_at
from rl_jax.models.lora import Adapters
from rl_jax.models.routes import Routes, of_layers
from rl_jax.models.shape import DTYPES, Kind, Shape


class Transformer(nnx.Module):
    """Embedding, layers and final norm; `vocabulary()` is the head matrix.

    `blocks` holds the layers, `tail` none. Where layers are scanned, `blocks` has one entry per place in the period of
    their kinds, stacked over its repetitions, and `tail` the layers that are left over.
    """

    def __init__(self, shape: Shape, *, rngs: nnx.Rngs, adapters: Adapters | None = None):
        self.shape = shape
        normal = jax.nn.initializers.normal(shape.width**-0.5)
        self.embedding = nnx.Param(normal(rngs.params(), (shape.vocabulary, shape.width), jnp.float32))
        self.head = None if shape.tied else nnx.Param(
            normal(rngs.params(), (shape.vocabulary, shape.width), jnp.float32))
        self.final = norm.Norm(shape.width, shape.norm_epsilon, shape.norm_offset)
        scanned = shape.period * shape.repeats if shape.scan_layers else 0
        alone = [Block(shape, kind, rngs=rngs, adapters=adapters) for kind in shape.kinds[scanned:]]
        if not shape.scan_layers:
            self.blocks, self.tail = nnx.List(alone), nnx.List([])
            return

        def stacked(kind: Kind) -> Block:
            make = nnx.vmap(lambda key: Block(shape, kind, rngs=nnx.Rngs(key), adapters=adapters))
            return make(jax.random.split(rngs.params(), shape.repeats))

        self.blocks, self.tail = nnx.List([stacked(kind) for kind in shape.kinds[:shape.period]]), nnx.List(alone)

    def vocabulary(self) -> Float[Array, "V D"]:
        """The head matrix in the compute dtype: logits are hidden @ vocabulary.T, bounded where the shape says so."""
        matrix = self.embedding if self.head is None else self.head
        return matrix[...].astype(DTYPES[self.shape.compute])

    def hidden(self, prompts: Int[Array, "P S"], lengths: Int[Array, " P"], completions: Int[Array, "N T"],
               routes: Routes | None = None,
               segment: Int[Array, "N T"] | None = None) -> tuple[Float[Array, "N T D"], Routes | None]:
        """Hidden states that the completion tokens are drawn from, given one copy of each prompt.

        Args:
          routes: the experts of every token; None lets the routers choose.
          segment: see `Experience`.

        Returns:
          The hidden states, and the experts of every token (None for a network without mixtures).
        """
        p = prompts.shape[0]
        n, t = completions.shape
        inputs, place = packing.fed(jnp.repeat(last_token(prompts, lengths), n // p), completions, segment)
        position = (jnp.repeat(lengths, n // p)[:, None] - 1 + place).reshape(-1)
        table = turns(self.shape, prompts.shape[1] + t)
        of_prompts, of_completions = _of_prompts(table, *prompts.shape), turns_at(table, position)

        def layer(block, index, carry, chosen):
            (x, y), (of_prompt, of_completion) = carry, chosen or (None, None)
            x, (key, value), of_prompt = _prompt_layer(block, x, p, of_prompts, of_prompt)
            q, k, v = block.heads(y, of_completions)
            q, k, v = (a.reshape(n, t, *a.shape[1:]) for a in (q, k, v))
            # The last token of a prompt is fed to its completions, which see it among their own.
            attended = attention.shared_prefix(q, k, v, key, value, lengths - 1, block.options, segment=segment)
            y, of_completion = block.finish(y, attended.reshape(n * t, -1), of_completion)
            return (x, y), None if of_completion is None else (of_prompt, of_completion)

        carry = (self._embed(prompts.reshape(-1)), self._embed(inputs.reshape(-1)))
        given = None if routes is None else routes.by_layer()
        (_, y), chosen = self._through_layers(layer, carry, given, remat=self.shape.remat)
        return self.final(y).reshape(n, t, -1), None if chosen is None else of_layers(*chosen, p, n)

    def prefill(self, prompts: Int[Array, "P S"]) -> tuple[tuple[Any, Any], Int[Array, "P S L k"] | None]:
        """Keys and values of the prompts, [P, K, S, E], a tuple per layer, or stacked over layers that are scanned;
        and the experts of every token (None for a network without mixtures)."""
        p, s = prompts.shape
        of_prompts = _of_prompts(turns(self.shape, s), p, s)

        def layer(block, index, carry, _):
            x, cache = carry
            x, (key, value), chosen = _prompt_layer(block, x, p, of_prompts)
            return (x, _write(cache, index, (jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)))), chosen

        start = (self._embed(prompts.reshape(-1)), self.empty_cache(p, s))
        (_, cache), chosen = self._through_layers(layer, start)
        return cache, None if chosen is None else jnp.moveaxis(chosen, 0, 1).reshape(p, s, *chosen.shape[::2])

    def empty_cache(self, rows: int, length: int) -> tuple[Any, Any]:
        """Room for the keys and values of `length` tokens in each of `rows` sequences, [rows, K, length, E]."""
        shape = self.shape
        one = mesh.cut(jnp.zeros((rows, shape.key_heads, length, shape.head_size), DTYPES[shape.compute]), "tensor")
        if shape.scan_layers:
            many = jnp.broadcast_to(one, (shape.layers, *one.shape))
            return many, many
        return (one,) * shape.layers, (one,) * shape.layers

    def decode(self, prompt_cache: Any, cache: Any, token: Int[Array, " P"], lengths: Int[Array, " P"],
               now: Int[Array, ""] | Int[Array, " P"],
               table: Turns) -> tuple[Float[Array, "P D"], Any, Int[Array, "P L k"] | None]:
        """One step of one sample per prompt: the hidden state that token `now` is drawn from.

        Args:
          prompt_cache: from `prefill`.
          cache: this sample's own, from `empty_cache`; returned with position `now` written.
          token: fed now: the last prompt token at now = 0, then the token drawn before.
          lengths: of the prompts, in tokens.
          now: the completion position, from 0; one for all, or one of each row.
          table: `turns` of all positions that there are, made once, before the first step.

        Returns:
          The hidden state, the cache, and the experts of the token (None for a network without mixtures).
        """
        of_tokens = turns_at(table, lengths - 1 + now)

        def layer(block, index, carry, _):
            x, cache = carry
            q, k, v = block.heads(x, of_tokens)
            keys, values = _read(cache, index)
            keys, values = _put(keys, k, now), _put(values, v, now)
            own = Cache(keys, values, jnp.full_like(lengths, now + 1))
            attended = attention.one_query(q, own, Cache(*_read(prompt_cache, index), lengths - 1), block.options)
            x, chosen = block.finish(x, attended.reshape(x.shape[0], -1))
            return (x, _write(cache, index, (keys, values))), chosen

        (x, cache), chosen = self._through_layers(layer, (self._embed(token), cache))
        return self.final(x), cache, None if chosen is None else jnp.moveaxis(chosen, 0, 1)

    def _embed(self, tokens: Int[Array, " M"]) -> Float[Array, "M D"]:
        x = self.embedding[...].astype(DTYPES[self.shape.compute])[tokens]
        return mesh.cut(x * self.shape.width**0.5 if self.shape.scale_embedding else x)

    def _through_layers(self, layer: Callable, carry: Any, given: Any = None, remat: bool = False) -> tuple[Any, Any]:
        """(carry, what the mixing layers made), with carry, made = layer(block, index, carry, given) for every block.

        Args:
          given: arrays with a leading axis over the mixing layers, or None.
        """
        wrap = jax.checkpoint if remat else (lambda f: f)

        def one(block, index, carry, given):
            graph, state = nnx.split(block)
            run = wrap(lambda state, carry, given: layer(nnx.merge(graph, state), index, carry, given))
            return run(state, carry, given)

        if not self.shape.scan_layers:
            return _in_turn(one, self.blocks, 0, carry, given)
        repeats, period = self.shape.repeats, self.shape.period
        scanned = sum(kind.mixture for kind in self.shape.kinds[:repeats * period])
        graphs, states = zip(*(nnx.split(block) for block in self.blocks), strict=True)
        rows = jax.tree.map(lambda a: a[:scanned].reshape(repeats, -1, *a.shape[1:]), given)

        def body(carry, part):
            states, repeat, given = part
            blocks = [nnx.merge(graph, state) for graph, state in zip(graphs, states, strict=True)]
            return _in_turn(one, blocks, repeat * period, carry, given)

        carry, made = jax.lax.scan(body, carry, (states, jnp.arange(repeats), rows))
        made = jax.tree.map(lambda a: a.reshape(scanned, *a.shape[2:]), made)
        rest = jax.tree.map(lambda a: a[scanned:], given)
        carry, last = _in_turn(one, self.tail, repeats * period, carry, rest)
        return carry, made if last is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), made, last)


def _in_turn(one: Callable, blocks: Any, first: Any, carry: Any, given: Any) -> tuple[Any, Any]:
    """The blocks one after the other; `first` is the number of the first."""
    made = []
    for place, block in enumerate(blocks):
        own = jax.tree.map(lambda a: a[len(made)], given) if block.mixture is not None else None  # noqa: B023
        carry, new = one(block, first + place, carry, own)
        made += [] if new is None else [new]
    return carry, jax.tree.map(lambda *a: jnp.stack(a), *made) if made else None


def last_token(prompts: Int[Array, "P S"], lengths: Int[Array, " P"]) -> Int[Array, " P"]:
    """The last token of each right-padded prompt: the first that its completions are fed."""
    return jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]


def _of_prompts(table: Turns, prompts: int, length: int) -> Turns:
    return turns_at(table, jnp.tile(jnp.arange(length), prompts))


def _prompt_layer(block: Block, x: Float[Array, "M D"], prompts: int, of_prompts: Turns,
                  chosen: Array | None = None) -> tuple[Array, tuple[Array, Array], Array | None]:
    rows = x.shape[0]
    q, k, v = (a.reshape(prompts, rows // prompts, *a.shape[1:]) for a in block.heads(x, of_prompts))
    attended = attention.prompt(q, k, v, block.options)
    x, chosen = block.finish(x, attended.reshape(rows, -1), chosen)
    return x, (k, v), chosen


def _put(cache: Float[Array, "P K T E"], new: Float[Array, "P K E"], now: Int[Array, "..."]) -> Float[Array, "P K T E"]:
    """The cache with `new` at position `now`, one for all rows or one of each."""
    if now.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(cache, new[:, :, None], now, 2)
    return cache.at[jnp.arange(cache.shape[0]), :, now].set(
        new, mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True)


def _read(cache: Any, index: Any) -> tuple[Array, Array]:
    return tuple(a[index] if isinstance(a, tuple) else jax.lax.dynamic_index_in_dim(a, index, 0, keepdims=False)
                 for a in cache)


def _write(cache: Any, index: Any, new: tuple[Array, Array]) -> Any:
    return tuple((*a[:index], b, *a[index + 1:]) if isinstance(a, tuple)
                 else jax.lax.dynamic_update_index_in_dim(a, b, index, 0) for a, b in zip(cache, new, strict=True))
