"""Answers of very different lengths in few slots, against all at once: the tables of `benchmark.py refill`."""
import dataclasses
from collections.abc import Callable
from typing import Any

import benchmark_table
import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.decode_attention.op import decode_attention
from kernels_pallas.decode_attention.reference import Cache
from rl_jax.models.network import Network
from rl_jax.models.shape import DTYPES, Shape
from rl_jax.recipe import Rollout
from rl_jax.rollout import decode, lanes, refill
from rl_jax.types import Prompts, Samples

Clock = Callable[..., list[float]]  # sides -> median seconds of each, measured in turn
TARGET = 2.0
SPREAD = 1.0  # standard deviation of the logarithm of a length


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The networks, P prompts of `prompt_tokens` x G samples, mean and most tokens of an answer, and numbers of slots."""

    shapes: tuple[Shape, ...]
    prompts: int
    group: int
    prompt_tokens: int
    mean: int
    most: int
    slots: tuple[int, ...]


_SMALL = Shape(vocabulary=64, width=64, layers=2, heads=2, key_heads=1, head_size=32, inner=128)
_WIDE = Shape(vocabulary=64, width=256, layers=4, heads=8, key_heads=4, head_size=32, inner=512)
_LARGE = Shape(vocabulary=32768, width=1024, layers=8, heads=16, key_heads=8, head_size=128, inner=3072, query_norm=True,
               compute="bfloat16")
SIZES = {"cpu": Sizes((_SMALL, _WIDE), 32, 8, 64, 64, 512, (32, 64)),
         "gpu": Sizes((_LARGE,), 64, 8, 256, 256, 2048, (128, 256))}
SIZES["tpu"] = SIZES["gpu"]


def tables(sizes: Sizes, clock: Clock, wanted: Callable[[str], bool]) -> list[benchmark_table.Table]:
    """Tokens per second of both loops, and the time of one step's attention in lanes and in slots without lanes.

    Args:
      sizes: what is measured.
      clock: alternates between the functions that it is given.
      wanted: which rows, by name.
    """
    return [table for table in (_loops(sizes, clock, wanted), _arrangements(sizes, clock, wanted)) if table.rows]


def lengths(sizes: Sizes) -> np.ndarray:
    """[P, G] lengths of answers, log-normal, cut off at the most."""
    center = np.log(sizes.mean) - SPREAD**2 / 2
    drawn = np.random.default_rng(0).lognormal(center, SPREAD, (sizes.prompts, sizes.group))
    return np.clip(np.ceil(drawn), 1, sizes.most).astype(np.int32)


def _loops(sizes: Sizes, clock: Clock, wanted: Callable[[str], bool]) -> benchmark_table.Table:
    budget, rows, missed = lengths(sizes), [], []
    for shape in sizes.shapes:
        chosen = [n for n in sizes.slots if wanted(_name(shape, n))]
        if not chosen:
            continue
        sides = [_side(sizes, shape, n, budget) for n in (0, *chosen)]
        padded, *seconds = clock(*(lambda side=side: jax.block_until_ready(side()) for side in sides))
        expected = sides[0]()
        for n, side, spent in zip(chosen, sides[1:], seconds, strict=True):
            width, count = lanes.shape(n, sizes.prompts, sizes.group)
            name, tokens = _name(shape, n), budget.sum()
            rows.append((name, f"{count} x {width}", f"{tokens / padded:,.0f}", f"{tokens / spent:,.0f}",
                         f"{padded / spent:.2f}x", f"{TARGET:g}x", equal := _alike(side(), expected)))
            missed += [name] if padded / spent < TARGET else []
            missed += [f"{name}: {equal} answers equal"] if equal != f"{budget.size}/{budget.size}" else []
    caption = (f"{benchmark_table.circumstances()}: {sizes.prompts} prompts of {sizes.prompt_tokens} tokens x {sizes.group} "
               f"answers, log-normal lengths, mean {budget.mean():.0f}, longest {budget.max()}; tokens of answers per "
               "second, prefill included. \"Equal\": answers whose tokens are those of the padded loop, same random numbers.")
    columns = ("network, slots", "lanes x slots", "padded, tokens/s", "refill, tokens/s", "ratio", "target", "equal")
    return benchmark_table.Table(caption, columns, tuple(rows), missed=tuple(missed))


def _name(shape: Shape, slots: int) -> str:
    return f"refill D={shape.width} layers={shape.layers} slots={slots}"


def _side(sizes: Sizes, shape: Shape, slots: int, budget: np.ndarray) -> Callable[[], Samples]:
    """Draws all answers; with 0 slots all at once."""
    network, p = Network(shape), sizes.prompts
    tokens = jax.random.randint(jax.random.key(1), (p, sizes.prompt_tokens), 0, shape.vocabulary)
    zero = jnp.zeros(p, jnp.int32)
    prompts = Prompts(tokens=tokens, lengths=jnp.full(p, sizes.prompt_tokens), example=zero, domain=zero, facts={})
    numbers = decode.make_uniforms(jax.random.key(2), p, sizes.group, sizes.most)
    ends = {"completion_length": sizes.most, "stop_ids": (), "pad_id": 0}
    rollout = Rollout(sizes.group)
    draw = refill.make_rollout(network, rollout, slots=slots, **ends) if slots else (
        decode.make_rollout(network, rollout, **ends))
    weights, run = jax.jit(network.initialise)(jax.random.key(0)), jax.jit(draw)
    return lambda: run(weights, prompts, numbers, jnp.int32(0), None, jnp.asarray(budget))


def _alike(found: Samples, expected: Samples) -> str:
    """How many answers have the same tokens. All have the same lengths, or the measurement is of something else."""
    if (found.mask != expected.mask).any():
        raise ValueError("the two loops drew answers of different lengths")
    return f"{int((found.tokens == expected.tokens).all(axis=1).sum())}/{found.tokens.shape[0]}"


def _arrangements(sizes: Sizes, clock: Clock, wanted: Callable[[str], bool]) -> benchmark_table.Table:
    shape, slots, rows = sizes.shapes[-1], max(sizes.slots), []
    width, count = lanes.shape(slots, sizes.prompts, sizes.group)
    for s in (sizes.prompt_tokens, 8 * sizes.prompt_tokens):
        name = f"attention S={s} slots={slots}"
        if wanted(name):
            held, copied, gathered = (seconds * 1e6 / 50 for seconds in clock(*_attentions(sizes, shape, width, count, s)))
            rows.append((name, f"{held:,.0f}", f"{copied:,.0f}", f"{gathered:,.0f}", f"{copied / held:.2f}x",
                         f"{gathered / held:.2f}x"))
    caption = (f"{benchmark_table.circumstances()}: one layer's attention of one step to the prompts' caches, us. Lanes: "
               f"{count} caches, read by {width} slots each. Free: a slot is in no lane and has a copy of its prompt's "
               "cache; gathered: it takes the copy in every step.")
    columns = ("prompt tokens, slots", "lanes", "free", "gathered", "free / lanes", "gathered / lanes")
    return benchmark_table.Table(caption, columns, tuple(rows))


def _attentions(sizes: Sizes, shape: Shape, width: int, count: int, s: int) -> list[Callable[[], Any]]:
    """50 steps of attention in lanes, with a copy per slot, and with a gather per step."""
    dtype, slots = DTYPES[shape.compute], width * count
    drawn = jax.random.normal(jax.random.key(0), (sizes.prompts, shape.key_heads, s, shape.head_size), dtype)
    query = jax.random.normal(jax.random.key(1), (width, count, shape.heads, shape.head_size), dtype)
    prompt = jnp.arange(count) % sizes.prompts
    of_slots = jnp.tile(prompt, width)

    def own(*batch):
        nothing = jnp.zeros((*batch, shape.key_heads, 1, shape.head_size), dtype)
        return Cache(nothing, nothing, jnp.zeros(batch, jnp.int32))

    def attend(q, cache):
        return decode_attention(q, own(*q.shape[:-2]), Cache(cache, cache, jnp.full(cache.shape[:1], s)))

    def fifty(step):
        run = jax.jit(lambda q, *given: jax.lax.fori_loop(0, 50, lambda i, q: step(i, q, *given), q))
        return lambda *given: jax.block_until_ready(run(*given))

    held = fifty(lambda i, q, caches: attend(q, caches))
    # other prompts in each step: a gather of the same ones would be moved out of the loop
    gathered = fifty(lambda i, q, caches: attend(q, caches[(of_slots + i) % sizes.prompts]))
    free = query.reshape(slots, *query.shape[2:])
    lane_caches, copies = drawn[prompt], drawn[of_slots]
    return [lambda: held(query, lane_caches), lambda: held(free, copies), lambda: gathered(free, drawn)]
