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
from rl_jax.learner.optimiser import Optimiser
from rl_jax.models.lora import Adapters
from rl_jax.models.network import Network
from rl_jax.models.shape import Shape
from rl_jax.recipes.baselines import grpo
from rl_jax.tasks import task as tasks
from rl_jax.tasks.toys import addmod
from rl_jax.train import loop

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
VARIANTS = {"all weights": ("all", "float32"), "adapters of rank 16": ("lora", "float32"),
            "adapters of rank 16, frozen weights in bfloat16": ("lora", "bfloat16")}


def tables(sizes: Sizes, wanted: Callable[[str], bool]) -> list[benchmark_table.Table]:
    """GiB of what a step of GRPO holds and needs, from shapes and XLA's analysis of the compiled program.

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
               f"baselines.grpo with its reference on {sizes.prompts} x {sizes.group} answers of {sizes.tokens} tokens to "
               f"prompts of {sizes.prompt_tokens}, {sizes.microbatches} microbatches, AdamW. Held sizes are exact; temporaries "
               "are those of the whole step (draw, reward, reference, update) as XLA plans them for this device.")
    columns = ("trained", "trained, GiB", "frozen", "optimiser", "temporaries", "all")
    return [benchmark_table.Table(caption, columns, rows)]


def _row(sizes: Sizes, train: str, dtype: str) -> tuple[float, ...]:
    """Bytes of what is trained, what is frozen, the optimiser's state and the step's temporaries, and their sum."""
    verifier = tasks.PureVerifier(lambda facts, tokens, mask: (mask.any(axis=1).astype(jnp.float32), {}))
    task = dataclasses.replace(addmod.addmod(), verifier=verifier, prompt_length=sizes.prompt_tokens,
                               completion_length=sizes.tokens)
    phase = Phase(grpo.grpo(sizes.group), Optimiser(),
                  Scale(prompts_per_step=sizes.prompts, microbatches=sizes.microbatches, train=train, lora=Adapters(rank=16)))
    one = loop.PhaseLoop(phase, task, Network(sizes.shape), shown_groups=1)
    fresh = jax.eval_shape(Network(sizes.shape).initialise, jax.random.key(0))
    start = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), fresh)
    state = jax.eval_shape(one.initial_state, jax.random.key(0), start)
    prompts = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), next(one.stream(0)))
    program = one.prepare(state, prompts)["step"]
    held = [_size(tree) for tree in (state.parameters, state.frozen, state.optimiser)]
    needed = float(program.memory_analysis().temp_size_in_bytes)
    return (*held, needed, sum(held) + needed)


def _size(tree: Any) -> float:
    return float(sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)))
