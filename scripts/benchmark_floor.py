"""The least that a step must compute and read, counted from its sizes, and how fast this device does either."""
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rl_jax.models.shape import Shape

SQUARE, MEASUREMENTS = 2048, 5
NUMBER = 4  # bytes
OF_ADAMW = 7  # numbers read or written for each parameter: it, its gradient and two moments; it and the moments


@dataclasses.dataclass(frozen=True)
class Work:
    """P prompts of S tokens, and G answers of T tokens to each.

    Attributes:
      shape: of the network: dense layers that see everything, in float32.
      prompts, group: P and G.
      prompt_tokens, tokens: S and T; all prompts and answers have so many.
    """

    shape: Shape
    prompts: int
    group: int
    prompt_tokens: int
    tokens: int

    def __post_init__(self):
        if self.shape.mixtures or self.shape.window or self.shape.compute != "float32":
            raise ValueError(f"mixing layers: {self.shape.mixtures}, window={self.shape.window}, "
                             f"compute={self.shape.compute!r}: floors are counted for dense layers without a window in "
                             "float32. Leave model.mixture, model.window and model.compute at their defaults.")

    @property
    def rows(self) -> int:
        """N = P G."""
        return self.prompts * self.group


def layer(shape: Shape) -> int:
    """Numbers in the matrices of one layer: queries, keys, values, output, and three of the inner layer."""
    attention = shape.width * shape.head_size * (2 * shape.heads + 2 * shape.key_heads)
    return attention + 3 * shape.width * shape.inner


def of_prompts(work: Work) -> int:
    """FLOPs of one forward over one copy of each prompt.

    The last layer gives only keys and values. Scores and their mix count for the pairs that causal attention shows.
    """
    shape, s = work.shape, work.prompt_tokens
    last = 2 * shape.width * shape.head_size * shape.key_heads
    projections = 2 * s * ((shape.layers - 1) * layer(shape) + last)
    return work.prompts * (projections + (shape.layers - 1) * _attention(shape, s * (s + 1) // 2))


def of_answers(work: Work) -> int:
    """FLOPs of one forward over all answers, drawn or evaluated, with all logits of every token.

    An answer is fed the prompt's last token and its own but the last; each sees the prompt's other S - 1 tokens and
    the answer so far.
    """
    shape, t = work.shape, work.tokens
    projections = 2 * t * (shape.layers * layer(shape) + shape.vocabulary * shape.width)
    return work.rows * (projections + shape.layers * _attention(shape, _seen(work)))


def _attention(shape: Shape, pairs: int) -> int:
    """FLOPs of scores and of the mix of values: each a product over the head size, for every head and pair."""
    return 4 * shape.heads * shape.head_size * pairs


def _seen(work: Work) -> int:
    """Pairs of a token of one answer and a token that it sees."""
    return work.tokens * (work.prompt_tokens - 1) + work.tokens * (work.tokens + 1) // 2


def of_step(work: Work) -> dict[str, int]:
    """FLOPs of matrix products by phase, with one pass of a reference and one update; a backward is two forwards."""
    forward = of_prompts(work) + of_answers(work)
    return {"prefill": of_prompts(work), "decoding": of_answers(work), "reference pass": forward,
            "forward and backward": 3 * forward}


def read_while_drawing(work: Work) -> int:
    """Bytes of the weights in every decode step, and of what is seen of the caches: one of each prompt, one per answer."""
    shape, t = work.shape, work.tokens
    weights = t * (shape.layers * layer(shape) + shape.vocabulary * shape.width)
    own = work.rows * (t * (t + 1) // 2)
    shared = work.prompts * t * (work.prompt_tokens - 1)
    return NUMBER * (weights + shape.layers * 2 * shape.key_heads * shape.head_size * (own + shared))


def moved_by_adamw(parameters: int) -> int:
    """Bytes that one AdamW step reads and writes."""
    return NUMBER * OF_ADAMW * parameters


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the device was seen to do at best.

    Attributes:
      products: FLOPs per second of a large product of float32 matrices.
      weights: bytes per second read and written by an addition of 1 in place to as many float32 numbers as a network has.
      moments: the same of four times as many, as AdamW works on: what fits in a cache is copied faster.
      parameters: the network's.
    """

    products: float
    weights: float
    moments: float
    parameters: int

    def words(self) -> str:
        """All, for a caption."""
        return (f"a product of two [{SQUARE:,}]^2 float32 matrices ran at {self.products / 1e9:,.0f} GFLOP/s at best, "
                f"adding 1 to {self.parameters:,} float32 numbers (the weights) at {self.weights / 1e9:,.1f} GB/s, to four "
                f"times as many (with gradient and moments) at {self.moments / 1e9:,.1f} GB/s")


def measured(parameters: int) -> Rates:
    """The device's rates, now.

    Args:
      parameters: of the network whose programs are compared with them.
    """
    side = jnp.full((SQUARE, SQUARE), 0.5, jnp.float32)
    product = _best(jax.jit(jnp.matmul), side, side)
    return Rates(2 * SQUARE**3 / product, _added(parameters), _added(4 * parameters), parameters)


def _added(numbers: int) -> float:
    rounds = min(max(4, (1 << 25) // numbers), 256)  # several, as the first writes to fresh memory, which is slow
    add = jax.jit(lambda x: jax.lax.fori_loop(0, rounds, lambda _, y: y + 1, x))
    return 2 * NUMBER * numbers * rounds / _best(add, jnp.zeros(numbers, jnp.float32))


def _best(function: Callable[..., Any], *arguments: Any) -> float:
    spent = []
    for _ in range(MEASUREMENTS + 1):  # the first compiles
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        spent.append(time.perf_counter() - began)
    return min(spent[1:])
