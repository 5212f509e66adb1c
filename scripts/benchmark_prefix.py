"""A training step on one copy of each prompt against a copy per completion: the table of `benchmark.py prefix`."""
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import benchmark_table
import jax
import jax.numpy as jnp

from kernels_pallas.linear_logprob.op import linear_logprob
from rl_jax.models.network import Network
from rl_jax.models.shape import Shape

Clock = Callable[..., list[float]]  # sides -> median seconds of each, measured in turn


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The network, how many prompts there are, completions per prompt, and tokens of prompts and completions."""

    shape: Shape
    prompts: int
    groups: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    tokens: int


_SMALL = Shape(vocabulary=256, width=128, layers=2, heads=4, key_heads=2, head_size=32, inner=512)
_LARGE = Shape(vocabulary=151936, width=1024, layers=8, heads=16, key_heads=8, head_size=128, inner=3072,
               query_norm=True, compute="bfloat16")
SIZES = {"cpu": Sizes(_SMALL, 1, (4, 8, 16), (32, 128, 512), 32),
         "gpu": Sizes(_LARGE, 2, (4, 8, 16), (256, 1024, 4096), 256)}
SIZES["tpu"] = SIZES["gpu"]


def tables(sizes: Sizes, clock: Clock, wanted: Callable[[str], bool]) -> list[benchmark_table.Table]:
    """FLOPs and seconds of forward and gradient of the whole network, shared and unshared.

    Args:
      sizes: what is measured.
      clock: alternates between the functions that it is given.
      wanted: which rows, by name.
    """
    chosen = [one for one in _named(sizes) if wanted(one[0])]
    if not chosen:
        return []
    shape, network = sizes.shape, Network(sizes.shape)
    weights = jax.jit(network.initialise)(jax.random.key(0))
    rows = tuple((name, *_row(sizes, network, weights, (g, s), clock)) for name, g, s in chosen)
    caption = (f"{benchmark_table.circumstances()}: {shape.layers} layers of width {shape.width}, "
               f"V = {shape.vocabulary:,}, {shape.compute}, {sizes.prompts} x G completions of {sizes.tokens} tokens; "
               "forward and gradient. FLOPs are counted by XLA before it optimises; \"tokens\" is the ratio of "
               "G (S + T) to S + G T.")
    columns = ("prompt : completion, G", "shared, GFLOP", "unshared, GFLOP", "FLOPs", "tokens", "shared, ms",
               "unshared, ms", "time")
    return [benchmark_table.Table(caption, columns, rows)]


def _named(sizes: Sizes) -> Iterator[tuple[str, int, int]]:
    for s in sizes.prompt_tokens:
        for g in sizes.groups:
            yield f"S:T={s // sizes.tokens}:1 G={g}", g, s


def _row(sizes: Sizes, network: Network, weights: Any, lengths: tuple[int, int], clock: Clock) -> tuple[str, ...]:
    g, s = lengths

    def drawn(seed, *shape):
        return jax.random.randint(jax.random.key(seed), shape, 0, sizes.shape.vocabulary)

    prompts, completions = drawn(1, sizes.prompts, s), drawn(2, sizes.prompts * g, sizes.tokens)
    sides, flops = [], []
    for copies in (1, g):
        given = jnp.repeat(prompts, copies, axis=0), jnp.full((sizes.prompts * copies,), s), completions
        flops.append(_flops(network, weights, given))
        compiled = jax.jit(jax.grad(_loss(network, None))).lower(weights, *given).compile()
        sides.append(lambda compiled=compiled, given=given: jax.block_until_ready(compiled(weights, *given)))
    shared, unshared = clock(*sides)
    tokens = g * (s + sizes.tokens) / (s + g * sizes.tokens)
    return (f"{flops[0] / 1e9:,.2f}", f"{flops[1] / 1e9:,.2f}", f"{flops[1] / flops[0]:.2f}x", f"{tokens:.2f}x",
            f"{shared * 1e3:,.1f}", f"{unshared * 1e3:,.1f}", f"{unshared / shared:.2f}x")


def _loss(network: Network, implementation: str | None) -> Callable[..., Any]:
    def loss(weights, prompts, lengths, completions):
        hidden = network.hidden(weights, prompts, lengths, completions)
        logp, _ = linear_logprob(hidden.reshape(completions.size, -1), network.vocabulary(weights),
                                 completions.reshape(-1), implementation=implementation)
        return -logp.mean()

    return loss


def _flops(network: Network, weights: Any, given: tuple) -> float:
    """Counted where nothing hides: no kernel in the program for a CPU, no loop in a head with all logits."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (weights, *given))
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.jit(jax.grad(_loss(network, "reference"))).lower(*shapes).cost_analysis()["flops"]
