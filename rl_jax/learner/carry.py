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
    prompts, samples, verdict = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), drawn)
    one = (dataclasses.replace(prompts, lengths=jnp.ones_like(prompts.lengths)), samples,
           dataclasses.replace(verdict, failed=jnp.ones_like(verdict.failed)))
    return jax.tree.map(lambda a: jnp.repeat(a[None], count, axis=0), one)


def joined(drawn: Drawn, earlier: Drawn) -> Drawn:
    """The fresh batch followed by the earlier ones, of which no token is fresh: one batch of (1 + count) P prompts."""
    def behind(new, old):
        return jnp.concatenate([new, old.reshape(-1, *old.shape[2:])])

    prompts, samples, verdict = jax.tree.map(behind, drawn, earlier)
    fresh = drawn[1].mask if drawn[1].fresh is None else drawn[1].fresh
    rest = samples.mask.shape[0] - fresh.shape[0]
    return prompts, dataclasses.replace(samples, fresh=jnp.pad(fresh, [(0, rest), (0, 0)])), verdict


def pushed(drawn: Drawn, earlier: Drawn) -> Drawn:
    """The earlier batches with the fresh one in front and without the oldest."""
    return jax.tree.map(lambda new, old: jnp.concatenate([new[None], old[:-1]]), drawn, earlier)

