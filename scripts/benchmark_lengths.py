"""The learning half of a step on answers of very different lengths, in every shape: the table of `benchmark.py lengths`."""
import dataclasses
import math
import statistics
from collections.abc import Callable

import benchmark_table
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rl_jax.batching import Batching
from rl_jax.learner import step
from rl_jax.models.network import Network
from rl_jax.models.shape import Shape
from rl_jax.recipes.baselines import grpo
from rl_jax.tasks import judge
from rl_jax.tasks.toys import evens
from rl_jax.types import Prompts, Samples, Verdict

Clock = Callable[..., list[float]]  # sides -> median seconds of each, measured in turn


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The network; prompts, answers to each, tokens of a prompt; mean and largest length of answers, in tokens."""

    shape: Shape
    prompts: int
    group: int
    prompt_tokens: int
    mean: int
    longest: int


_SMALL = Shape(vocabulary=512, width=128, layers=2, heads=4, key_heads=2, head_size=32, inner=384,
               scan_layers=True)
_LARGE = Shape(vocabulary=151936, width=1024, layers=8, heads=16, key_heads=8, head_size=128, inner=3072,
               query_norm=True, compute="bfloat16", remat=True, scan_layers=True)
SIZES = {"cpu": Sizes(_SMALL, 4, 8, 32, 64, 512), "gpu": Sizes(_LARGE, 16, 8, 256, 512, 4096)}
SIZES["tpu"] = SIZES["gpu"]
SHAPES = {"whole rows": (Batching(), 1), "3 lengths": (Batching(length_buckets=3), 1),
          "whole rows, a micro-batch per prompt": (Batching(), 0),
          "3 lengths, a micro-batch per prompt": (Batching(length_buckets=3), 0),
          "packed in 2 rows a group": (Batching(packed_rows=2), 1)}


def tables(sizes: Sizes, clock: Clock, wanted: Callable[[str], bool]) -> list[benchmark_table.Table]:
    """Seconds of the learning half (a reference's pass, forward and gradient, optimiser) in every shape.

    Args:
      sizes: what is measured.
      clock: alternates between the functions that it is given.
      wanted: which rows, by name; whole rows are measured in any case.
    """
    names = [name for name in SHAPES if wanted(name)]
    if not names:
        return []
    names = ["whole rows", *(name for name in names if name != "whole rows")]
    network = Network(sizes.shape)
    weights = jax.jit(network.initialise)(jax.random.key(0))
    lengths = answer_lengths(sizes)
    sides, positions = zip(*(_side(sizes, network, weights, lengths, SHAPES[name]) for name in names), strict=True)
    times = clock(*sides)
    rows = tuple((name, f"{share:.2f}", f"{1 / share:.2f}x", f"{time * 1e3:,.1f}", f"{times[0] / time:.2f}x")
                 for name, share, time in zip(names, positions, times, strict=True))
    caption = (f"{benchmark_table.circumstances()}: {sizes.shape.layers} layers of width {sizes.shape.width}, "
               f"V = {sizes.shape.vocabulary:,}, {sizes.shape.compute}; GRPO with a reference on {sizes.prompts} x "
               f"{sizes.group} answers of at most {sizes.longest} tokens, their lengths log-normal with a mean of "
               f"{sizes.mean} ({lengths.mean():.0f} in this batch, the longest {lengths.max()}); prompts of "
               f"{sizes.prompt_tokens}. \"computed\": share of the answers' positions that the gradient was computed over.")
    return [benchmark_table.Table(caption, ("shape", "computed", "fewer", "learning, ms", "time"), rows)]


def answer_lengths(sizes: Sizes) -> np.ndarray:
    """Evenly spaced quantiles of a log-normal distribution, in random order. [N]."""
    count, normal = sizes.prompts * sizes.group, statistics.NormalDist(math.log(sizes.mean) - 0.5, 1.0)
    quantiles = [math.exp(normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    return np.random.default_rng(0).permutation(np.minimum(np.ceil(quantiles), sizes.longest).astype(int))


def _side(sizes: Sizes, network: Network, weights: dict, lengths: np.ndarray,
          shape: tuple[Batching, int]) -> tuple[Callable[[], None], float]:
    """A function that learns once from one batch, and the share of positions that it computes."""
    batching, microbatches = shape
    task = evens.evens(completion_length=sizes.longest)
    optimiser, recipe = optax.adam(1e-5), grpo.grpo(sizes.group, beta=0.01)
    pieces = step.make_pieces(recipe, task, network, optimiser, judge.pure(task.verifier),
                              microbatches=microbatches or sizes.prompts, batching=batching)
    given = (step.initial_state(recipe, network, optimiser, jax.random.key(1), weights), *_batch(sizes, lengths))
    compiled = jax.jit(pieces.learn).lower(*given).compile()
    share = float(compiled(*given)[1].get("batch/positions", 1.0))
    return lambda: jax.block_until_ready(compiled(*given)), share


def _batch(sizes: Sizes, lengths: np.ndarray) -> tuple[Prompts, Samples, Verdict]:
    p, rows, shape = sizes.prompts, len(lengths), (len(lengths), sizes.longest)

    def drawn(seed, *shape):
        return jax.random.randint(jax.random.key(seed), shape, 0, sizes.shape.vocabulary)

    prompts = Prompts(tokens=drawn(1, p, sizes.prompt_tokens), lengths=jnp.full(p, sizes.prompt_tokens),
                      example=jnp.arange(p), domain=jnp.zeros(p, jnp.int32), facts={})
    samples = Samples(tokens=drawn(2, *shape), mask=jnp.arange(sizes.longest)[None, :] < jnp.asarray(lengths)[:, None],
                      rollout_logp=jnp.full(shape, -1.0), rollout_entropy=jnp.ones(shape), finished=jnp.ones(rows, bool),
                      version=jnp.zeros(rows, jnp.int32))
    score = jax.random.uniform(jax.random.key(3), (rows,))
    return prompts, samples, Verdict(score=score, parts={}, failed=jnp.zeros(rows, bool))
