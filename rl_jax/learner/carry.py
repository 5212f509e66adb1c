"""Batches of earlier steps that are learned from again."""
import dataclasses

import jax
import jax.numpy as jnp

from rl_jax.types import Prompts, Samples, Verdict

Drawn = tuple[Prompts, Samples, Verdict]


def empty(drawn: Drawn, count: int) -> Drawn:
    """Room for `count` batches, oldest last; a place that holds none has no mask and counts as failed.

    Args:
      drawn: prompts, samples and verdict of one batch, arrays or shapes.
    """
    prompts, samples, verdict = jax.tree.map(lambda a: jnp.zeros((count, *a.shape), a.dtype), drawn)
    prompts = dataclasses.replace(prompts, lengths=jnp.ones_like(prompts.lengths))
    return prompts, samples, dataclasses.replace(verdict, failed=jnp.ones_like(verdict.failed))


def joined(drawn: Drawn, earlier: Drawn) -> Drawn:
    """The fresh batch followed by the earlier ones as one batch of (1 + count) P prompts."""
    return jax.tree.map(lambda new, old: jnp.concatenate([new, old.reshape(-1, *old.shape[2:])]), drawn, earlier)


def pushed(drawn: Drawn, earlier: Drawn) -> Drawn:
    """The earlier batches with the fresh one in front and without the oldest."""
    return jax.tree.map(lambda new, old: jnp.concatenate([new[None], old[:-1]]), drawn, earlier)

