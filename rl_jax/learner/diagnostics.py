"""What every run reports about the samples of a batch, and metrics of parts and steps as one.

What it reports about the policy, `policy_gate` finds beside the loss.
"""
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas.policy_gate.reference import MAXIMA, MINIMA
from rl_jax import masked
from rl_jax.types import Experience

Metrics = dict[str, Float[Array, ""]]
SHARES = ("batch/positions", "batch/packed")


def of_samples(x: Experience, given: Bool[Array, " N"] | None = None) -> Metrics:
    """Score, length, end and failure rates of what was drawn; entropy of the tokens drawn in this step.

    Args:
      given: which answers nobody drew; None where all were drawn.
    """
    drawn = x.complete if given is None else x.complete & ~given
    known, tokens = drawn & ~x.failed, x.fresh if given is None else x.fresh & ~given[:, None]
    scored = jnp.maximum(known.sum(), 1)

    def mean(values):
        return jnp.where(known, values, 0.0).sum() / scored

    def read(part):  # NaN says that the verifier could not read it, which need not be a failure
        there = known & jnp.isfinite(part)
        return jnp.where(there, part, 0.0).sum() / jnp.maximum(there.sum(), 1)

    return {
        "reward/score": mean(x.score),
        "reward/solved": mean((x.score >= 1).astype(jnp.float32)),
        "reward/failed": x.failed.sum().astype(jnp.float32),
        "rollout/length": mean(x.mask.sum(axis=1)),
        "rollout/finished": (x.finished & drawn).sum() / jnp.maximum(drawn.sum(), 1),
        "rollout/entropy": masked.mean(x.rollout_entropy, tokens),
        **{f"reward/{name}": read(values) for name, values in x.parts.items()},
    }


def joined(metrics: Any) -> Metrics:
    """Metrics stacked over micro-batches, as those of the batch: sums and extremes, and means of shares."""
    return {name: _extreme(name, values, (values.mean if name in SHARES else values.sum)(axis=0))
            for name, values in metrics.items()}


def averaged(metrics: Any, taken: Bool[Array, " K"] | None = None) -> Metrics:
    """Metrics stacked over optimiser steps, as one number each: means and extremes.

    The gap between sampler and trainer is that of the first step taken, before anything was learned;
    skipped steps are counted.

    Args:
      taken: which of the steps were taken, and count in the means; all of them if None.
    """
    first, count = 0, metrics["gradient/skipped"].shape[0]
    if taken is not None:
        first, count = taken.argmax(), jnp.maximum(taken.sum(), 1)
        metrics = {name: jnp.where(taken, values, jnp.inf if name in MINIMA else 0.0)
                   for name, values in metrics.items()}
    return {**{name: _extreme(name, values, values.sum(axis=0) / count) for name, values in metrics.items()},
            **{name: metrics[name][first] for name in ("rollout/logp_gap_nats",) if name in metrics},
            "gradient/skipped": metrics["gradient/skipped"].sum(axis=0)}


def _extreme(name: str, values: Array, otherwise: Array) -> Array:
    if name in MAXIMA:
        return values.max(axis=0)
    return values.min(axis=0) if name in MINIMA else otherwise
