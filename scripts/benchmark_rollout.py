"""Tokens drawn per second beside what the device's bandwidth and arithmetic allow: the table of `benchmark.py rollout`."""
import dataclasses
from collections.abc import Callable
from typing import Any

import benchmark_floor
import benchmark_step
import benchmark_table
import jax
import jax.numpy as jnp
import rich.console
import rich.progress

from rl_jax.models import shape as shapes
from rl_jax.models.network import Network
from rl_jax.recipe import Rollout
from rl_jax.rollout import decode
from rl_jax.types import Parameters, Prompts

Clock = Callable[..., list[float]]  # sides -> median seconds of each, measured in turn


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The network, tokens of prompts and answers, numbers of answers drawn at once, and the most to one prompt."""

    shape: shapes.Shape
    prompt_tokens: int
    tokens: int
    rows: tuple[int, ...]
    group: int


# the network and the lengths of workload "first" of configs/benchmark/shared_toy.py
_FIRST = shapes.Shape(vocabulary=2048, width=256, layers=4, heads=4, key_heads=2, head_size=64, inner=1024, query_bias=True,
                      rotary_base=1e6)
SIZES = Sizes(_FIRST, prompt_tokens=32, tokens=64, rows=(1, 2, 4, 8, 16, 32, 64, 128, 256), group=8)


def tables(sizes: Sizes, clock: Clock, wanted: Callable[[str], bool]) -> list[benchmark_table.Table]:
    """Tokens per second by the number of rows.

    Args:
      sizes: what is measured.
      clock: alternates between the functions that it is given.
      wanted: which rows, by "256 rows".
    """
    works = [work_of(sizes, rows) for rows in sizes.rows if wanted(f"{rows} rows")]
    if not works:
        return []
    network = Network(sizes.shape)
    weights = jax.jit(network.initialise)(jax.random.key(0))
    rates = benchmark_floor.measured(shapes.parameter_count(weights))
    shown = rich.progress.track(works, "compiling", console=rich.console.Console(stderr=True))
    sides = [side for work in shown for side in _sides(network, weights, work)]
    spent = [total / side.times for total, side in zip(clock(*(side.run for side in sides)), sides, strict=True)]
    rows = tuple(row(work, draw - prefill, rates)
                 for work, prefill, draw in zip(works, spent[::2], spent[1::2], strict=True))
    shape = sizes.shape
    caption = (f"{benchmark_table.circumstances()}: {shape.layers} layers of width {shape.width}, V = {shape.vocabulary:,}, "
               f"float32, answers of {sizes.tokens} tokens to prompts of {sizes.prompt_tokens}; {rates.words()}. Time is "
               "that of drawing less that of the prefill. Bounds are at these rates: by bandwidth, where the weights and "
               "what is seen of the caches are read once for each token position; by arithmetic, FLOPs of the matrix "
               "products.")
    columns = "rows", "prompts x answers", "tokens/s", "bound by bandwidth", "bound by arithmetic", "of the smaller"
    return [benchmark_table.Table(caption, columns, rows)]


def work_of(sizes: Sizes, rows: int) -> benchmark_floor.Work:
    """So many answers as groups of one size: one group where there are fewer."""
    group = min(rows, sizes.group)
    return benchmark_floor.Work(sizes.shape, rows // group, group, sizes.prompt_tokens, sizes.tokens)


def row(work: benchmark_floor.Work, seconds: float, rates: benchmark_floor.Rates) -> tuple[str, ...]:
    """A line of the table.

    Args:
      seconds: of decoding.
    """
    tokens = work.rows * work.tokens
    bandwidth = tokens * rates.weights / benchmark_floor.read_while_drawing(work)
    arithmetic = tokens * rates.products / benchmark_floor.of_answers(work)
    return (f"{work.rows}", f"{work.prompts} x {work.group}", f"{tokens / seconds:,.0f}", f"{bandwidth:,.0f}",
            f"{arithmetic:,.0f}", f"{tokens / seconds / min(bandwidth, arithmetic):.1%}")


def _sides(network: Network, weights: Parameters, work: benchmark_floor.Work) -> list[benchmark_step.Side]:
    """The prefill, and the draw that begins with it."""
    tokens = jax.random.randint(jax.random.key(1), (work.prompts, work.prompt_tokens), 0, work.shape.vocabulary)
    number = jnp.zeros(work.prompts, jnp.int32)
    prompts = Prompts(tokens=tokens, lengths=number + work.prompt_tokens, example=number, domain=number, facts={})
    uniforms = decode.make_uniforms(jax.random.key(2), work.prompts, work.group, work.tokens)
    prefill = jax.jit(network.prefill)
    ends = {"completion_length": work.tokens, "stop_ids": (), "pad_id": 0}
    draw = jax.jit(decode.make_rollout(network, Rollout(work.group), **ends))

    def side(program: Callable[..., Any], *arguments: Any) -> benchmark_step.Side:
        call = benchmark_step.alone(lambda: program(weights, *arguments))
        return benchmark_step.repeated(call, at_least=benchmark_step.SHORTEST_PHASE_S)

    return [side(prefill, tokens), side(draw, prompts, uniforms, jnp.zeros((), jnp.int32))]
