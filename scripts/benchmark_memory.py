"""What training takes on a device, all weights against adapters: the table of `benchmark.py memory`.

Nothing is allocated: states are shapes, programs are compiled and not run.
"""
import dataclasses
from collections.abc import Callable
from typing import Any

import benchmark_table
import jax
import jax.numpy as jnp

from rl_jax.experiment import Phase, Scale
from rl_jax.learner import step
from rl_jax.learner.optimiser import Optimiser
from rl_jax.models import weights
from rl_jax.models.lora import Adapters
from rl_jax.models.network import Network
from rl_jax.models.shape import Shape
from rl_jax.recipes.baselines import grpo
from rl_jax.tasks import task as tasks
from rl_jax.tasks.toys import addmod
from rl_jax.train import loop
from rl_jax.types import TrainState, Verdict

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The network, prompts per step, answers to each, tokens of prompts and answers, and pieces of the update."""

    shape: Shape
    prompts: int
    group: int
    prompt_tokens: int
    tokens: int
    microbatches: int


_QWEN3_4B = Shape(vocabulary=151936, width=2560, layers=36, heads=32, key_heads=8, head_size=128, inner=9728,
                  query_norm=True, rotary_base=1e6, scan_layers=True, remat=True, compute="bfloat16")
SIZES = Sizes(_QWEN3_4B, 8, 8, 512, 512, 8)
# By name: what is trained, and the type of the weights that a run starts from.
VARIANTS = {"all weights": ("all", "float32"), "adapters, rank 16": ("lora", "float32"),
            "adapters, rank 16, on bfloat16": ("lora", "bfloat16")}
CPU = (" A CPU multiplies no bfloat16: its temporaries hold float32 copies of the caches and, where frozen weights are "
       "bfloat16, of those, which a device with such products does without.")


def tables(sizes: Sizes, wanted: Callable[[str], bool]) -> list[benchmark_table.Table]:
    """GiB of what a step of GRPO holds and needs, from shapes and XLA's analysis of its two compiled programs.

    Args:
      sizes: what is trained on how much.
      wanted: which rows, by name.
    """
    chosen = [name for name in VARIANTS if wanted(name)]
    if not chosen:
        return []
    rows = tuple((name, *(f"{size / GIB:,.2f}" for size in _row(sizes, *VARIANTS[name]))) for name in chosen)
    shape = sizes.shape
    caption = (f"{benchmark_table.circumstances()}: one device, {shape.layers} layers of width {shape.width}, "
               f"V = {shape.vocabulary:,}, computing in {shape.compute}, layers scanned and recomputed; a step of "
               f"baselines.grpo with its reference in two programs on {sizes.prompts} x {sizes.group} answers of "
               f"{sizes.tokens} tokens to prompts of {sizes.prompt_tokens}, {sizes.microbatches} microbatches, AdamW. "
               "In GiB; what is held is exact, temporaries are as XLA plans them for this device, and \"all\" is what "
               "is held and the larger of the two." + (CPU if jax.default_backend() == "cpu" else ""))
    columns = ("trained", "trained weights", "frozen weights", "optimiser", "temporaries of the draw", "of the update",
               "all")
    return [benchmark_table.Table(caption, columns, rows)]


def _row(sizes: Sizes, train: str, dtype: str) -> tuple[float, ...]:
    one, state = start(sizes, train, dtype)
    needed = temporaries(one, state)
    return (*held(state), *needed, sum(held(state)) + max(needed))


def start(sizes: Sizes, train: str, dtype: str) -> tuple[loop.PhaseLoop, TrainState]:
    """The programs of a phase, not compiled yet, and the shapes of its first state.

    Args:
      train: which weights are trained (`models.trainable.split`).
      dtype: of the weights that the phase starts from.
    """
    verifier = tasks.PureVerifier(lambda facts, tokens, mask: (mask.any(axis=1).astype(jnp.float32), {}))
    task = dataclasses.replace(addmod.addmod(), verifier=verifier, prompt_length=sizes.prompt_tokens,
                               completion_length=sizes.tokens)
    scale = Scale(prompts_per_step=sizes.prompts, microbatches=sizes.microbatches, train=train, lora=Adapters(rank=16))
    one = loop.PhaseLoop(Phase(grpo.grpo(sizes.group), Optimiser(), scale), task, Network(sizes.shape))
    given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), weights.shapes_of(Network(sizes.shape)))
    return one, jax.eval_shape(one.initial_state, jax.random.key(0), given)


def held(state: TrainState) -> tuple[float, float, float]:
    """Bytes of what is trained, of what is frozen, and of the optimiser's state."""
    return _size(state.parameters), _size(state.frozen), _size(state.optimiser)


def temporaries(one: loop.PhaseLoop, state: TrainState) -> tuple[float, float]:
    """Bytes that the compiled programs of draw and update need beside their arguments and results."""
    prompts = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), next(one.stream(0)))
    draw, learn = step.make_draw(one.pieces), step.make_learn(one.pieces, shown_groups=1)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    samples = jax.eval_shape(draw, state, prompts, index)
    rows = samples.tokens.shape[:1]
    verdict = jax.eval_shape(lambda: Verdict(score=jnp.zeros(rows), failed=jnp.zeros(rows, bool), parts={}))
    programs = (jax.jit(draw).lower(state, prompts, index),
                jax.jit(learn, donate_argnums=0).lower(state, prompts, samples, verdict))
    first, second = (float(program.compile().memory_analysis().temp_size_in_bytes) for program in programs)
    return first, second


def _size(tree: Any) -> float:
    return float(sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)))
