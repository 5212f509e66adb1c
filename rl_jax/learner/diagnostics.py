"""What every run reports about a batch, whatever the recipe."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl_jax import masked
from rl_jax.recipe import Recipe
from rl_jax.types import Evaluated, Experience

Metrics = dict[str, Float[Array, ""]]


def of_policy(recipe: Recipe, policy: Evaluated, x: Experience, share: Float[Array, "N T"]) -> Metrics:
    """Entropy, ratio extremes, clip share and KL estimates; extremes apart, those of parts of a batch add up.

    `policy/clip_share` is the share of tokens with credit whose loss has no gradient in their
    log-probability: what any gate holds back. KL to the reference is k3, in nats per token. The gap
    is that between sampler and trainer, on the tokens drawn in this step.
    """
    policy = jax.lax.stop_gradient(policy)
    metrics = {"policy/entropy": masked.total(policy.entropy * share, x.mask)}
    if recipe.rollout is not None:
        change = jnp.where(x.mask, policy.logp - x.rollout_logp, 0.0)
        ratio = jnp.exp(jnp.clip(change, -20, 20))
        metrics |= {
            "rollout/logp_gap_nats": jnp.where(x.fresh, jnp.abs(change), 0.0).max(),
            "policy/kl_rollout": masked.total((ratio - 1 - change) * share, x.mask),
            "policy/ratio_max": jnp.where(x.mask, ratio, 0.0).max(),
            "policy/ratio_min": jnp.where(x.mask, ratio, jnp.inf).min(),
        }
    if recipe.rollout is not None and "advantage" in x.given:
        held = (_sensitivity(recipe, policy, x) == 0) & (x.given["advantage"] != 0)
        metrics["policy/clip_share"] = masked.total(held * share, x.mask)
    if "reference_logp" in x.given:
        away = jnp.where(x.mask, x.given["reference_logp"] - policy.logp, 0.0)
        metrics["policy/kl_reference"] = masked.total((jnp.exp(jnp.clip(away, -20, 20)) - 1 - away) * share, x.mask)
    return metrics


def _sensitivity(recipe: Recipe, policy: Evaluated, x: Experience) -> Float[Array, "N T"]:
    def total(logp):
        out = recipe.loss(dataclasses.replace(policy, logp=jnp.where(x.mask, logp, 0.0)), x)
        terms = out[0] if isinstance(out, tuple) else out
        return sum(jnp.where(x.mask, loss, 0.0).sum() for loss in jax.tree.leaves(terms))

    return jax.grad(total)(policy.logp)


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


MAXIMA = ("policy/ratio_max", "rollout/logp_gap_nats")
MINIMA = ("policy/ratio_min",)


def joined(metrics: Any) -> Metrics:
    """Metrics stacked over micro-batches, as those of the batch: sums and extremes."""
    return {name: _extreme(name, values, values.sum(axis=0)) for name, values in metrics.items()}


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
