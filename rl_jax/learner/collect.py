"""Groups worth learning from: asked, scored and, where selection rejects them, replaced within a budget."""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl_jax.learner import assemble, diagnostics, update
from rl_jax.recipe import Recipe
from rl_jax.types import Experience, Prompts, Samples, Verdict

Drawn = tuple[Prompts, Samples, Verdict]
Draw = Callable[..., Samples]
Judge = Callable[[Prompts, Samples], Verdict]


def make_collect(recipe: Recipe, draw: Draw, judge: Judge, axis: str | None = None) -> Callable[..., Any]:
    """Returns collect(parameters, prompts, uniforms, version, coefficient) -> (prompts, samples, verdict, metrics).

    With `recipe.rollout.resample = r`, `prompts` holds 1 + r waves of P prompts. Waves are asked
    until P groups pass the selection slot or none is left; the kept groups fill the batch in the
    order they came. Slots that stay empty have no mask. A group counts as kept when selection
    keeps any of its sequences. Metrics are of everything asked, `rollout/groups_discarded`
    counts the groups asked and not learned from.

    Args:
      axis: name of an outer vmap axis: waves are asked until all of its members are satisfied.
    """
    waves = 1 + recipe.rollout.resample

    def ask(parameters, prompts, uniforms, version, coefficient):
        samples = draw(parameters, prompts, uniforms, version, coefficient)
        verdict = judge(prompts, samples)
        return (prompts, samples, verdict), assemble.experience(prompts, samples, verdict)

    def collect(parameters: Any, prompts: Prompts, uniforms: Float[Array, "A G T"], version: Array,
                coefficient: Any = None):
        if waves == 1:
            drawn, x = ask(parameters, prompts, uniforms, version, coefficient)
            return *drawn, diagnostics.of_samples(x, drawn[1].given)
        pieces = update.cut((prompts, uniforms), waves)
        count = prompts.lengths.shape[0] // waves
        drawn, x = jax.eval_shape(lambda *a: ask(*a, coefficient), parameters, *_wave(pieces, 0), version)
        shapes = jax.eval_shape(diagnostics.of_samples, x, drawn[1].given)
        empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), drawn)
        empty = (_wave(pieces, 0)[0], *empty[1:])
        total = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

        def body(carry):
            wave, filled, batch, total = carry
            drawn, x = ask(parameters, *_wave(pieces, wave), version, coefficient)
            keep = group_kept(recipe, x, count)
            slot = jnp.where(keep, filled + jnp.cumsum(keep) - 1, count)
            batch = jax.tree.map(lambda b, d: _scatter(b, d, slot), batch, drawn)
            total = jax.tree.map(jnp.add, total, diagnostics.of_samples(x, drawn[1].given))
            return wave + 1, jnp.minimum(filled + keep.sum(), count), batch, total

        def wanting(carry):
            short = carry[1] < count
            if axis is not None:
                short = jax.lax.psum(short.astype(jnp.int32), axis) > 0
            return (carry[0] < waves) & short

        start = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), empty, total)
        asked, filled, batch, total = jax.lax.while_loop(wanting, body, start)
        failed = total["reward/failed"]
        metrics = {name: value / asked for name, value in total.items()}
        return *batch, {**metrics, "reward/failed": failed, "rollout/waves": asked.astype(jnp.float32),
                        "rollout/groups_discarded": (asked * count - filled).astype(jnp.float32)}

    return collect


def group_kept(recipe: Recipe, x: Experience, prompts: int) -> Bool[Array, " P"]:
    """Whether the selection slot keeps any sequence of each prompt's group.

    Raises:
      ValueError: if the reward or selection slot reads what is known only after all groups are drawn.
    """
    try:
        kept = assemble.selected(recipe, x).mask.any(axis=1)
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"recipe {recipe.name!r} replaces groups while it draws (rollout.resample={recipe.rollout.resample}), before "
            "other models have seen them: its reward and selection slots can read scores, parts and lengths, but no "
            f"log-probability of another model and no adapting coefficient. Set resample=0. ({error})") from error
    return kept.reshape(prompts, -1).any(axis=1)


def _wave(pieces: Any, wave: Any) -> Any:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, wave, 0, keepdims=False), pieces)


def _scatter(batch: Array, drawn: Array, slot: Array) -> Array:
    """batch with the groups of `drawn` written at their slots; a slot past the end is dropped."""
    groups = slot.shape[0]
    by_group = batch.reshape(groups, -1, *batch.shape[1:])
    new = drawn.reshape(by_group.shape)
    return by_group.at[slot].set(new, mode="drop").reshape(batch.shape)
