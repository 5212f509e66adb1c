"""From samples and scores to experience with credit: the slots that run before the loss."""
import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from rl_jax.recipe import Recipe
from rl_jax.types import Evaluated, Experience, Prompts, Samples, Verdict


def group_ids(failed: Bool[Array, " N"], group_size: int) -> Int[Array, " N"]:
    """The prompt's number for each sequence; one whose verifier failed is alone, under the id N + i.

    Args:
      failed: whether the verifier raised, timed out or returned no number.
      group_size: G; sequences are prompt-major.
    """
    row = jnp.arange(failed.shape[0])
    return jnp.where(failed, failed.shape[0] + row, row // group_size)


def experience(prompts: Prompts, samples: Samples, verdict: Verdict, *, coefficients: dict[str, Any] | None = None,
               seed: UInt32[Array, " N"] | None = None) -> Experience:
    """Samples with their scores; what the verifier could not score has no mask and no group.

    Args:
      coefficients: current values of the recipe's adapting coefficients, by name.
      seed: a random number per sequence, for slots that draw lots; row numbers if None.
    """
    failed, rows = verdict.failed, verdict.failed.shape[0]
    score = jnp.where(failed, 0.0, verdict.score).astype(jnp.float32)
    group_size = rows // prompts.lengths.shape[0]
    mask = samples.mask & ~failed[:, None]
    return Experience(
        prompts=dataclasses.replace(prompts, routes=samples.prompt_routes), routes=samples.routes, tokens=samples.tokens, mask=mask,
        rollout_logp=samples.rollout_logp, rollout_entropy=samples.rollout_entropy, finished=samples.finished,
        version=samples.version, support=samples.support, score=score, reward=score,
        group=group_ids(failed, group_size), parts=verdict.parts, failed=failed, given={},
        example=jnp.repeat(prompts.example, group_size), domain=jnp.repeat(prompts.domain, group_size),
        seed=jnp.arange(rows, dtype=jnp.uint32) if seed is None else seed,
        complete=jnp.ones(rows, bool) if samples.complete is None else samples.complete,
        fresh=mask if samples.fresh is None else samples.fresh & mask,
        turn=jnp.zeros(mask.shape, jnp.int32) if samples.turn is None else samples.turn, coefficients=coefficients)


def of_arrays(rollout_logp: Float[Array, "N T"], mask: Bool[Array, "N T"], reward: Float[Array, " N"],
              group: Int[Array, " N"], **given: Any) -> Experience:
    """Experience from plain arrays, for `update.batch_loss` without model or trainer.

    Args:
      rollout_logp: log-probability under the distribution that sampled, in nats.
      mask: which tokens the policy chose.
      reward: of each sequence, in reward units; it is the score, too.
      group: id of each sequence's prompt, in [0, N).
      given: by name, any other field of `Experience` (tokens, turn, example, domain, finished, ...), and what
        the recipe's `models` ask for: reference_logp, old_logp, teacher_logp (nats), values, moments.
    """
    rows, zero = mask.shape[0], jnp.zeros(mask.shape, jnp.float32)
    fields = {
        "tokens": jnp.zeros(mask.shape, jnp.int32), "rollout_entropy": zero, "finished": mask.any(axis=1),
        "version": jnp.zeros(rows, jnp.int32), "score": reward, "parts": {}, "failed": jnp.zeros(rows, bool),
        "example": group, "domain": jnp.zeros(rows, jnp.int32), "seed": jnp.arange(rows, dtype=jnp.uint32),
        "complete": jnp.ones(rows, bool), "fresh": mask, "turn": jnp.zeros(mask.shape, jnp.int32)}
    named = {field.name for field in dataclasses.fields(Experience)} - {"given"}
    fields |= {name: given.pop(name) for name in list(given) if name in named}
    return Experience(rollout_logp=rollout_logp, mask=mask, reward=reward, group=group, given=given, **fields)


def namespace(coefficients: dict[str, Any] | None) -> types.SimpleNamespace:
    """Adapting coefficients by name, as slots read them."""
    return types.SimpleNamespace(**(coefficients or {}))


def selected(recipe: Recipe, x: Experience) -> Experience:
    """x with the reward slot applied and only the answers that selection learns from.

    Where selection gives row numbers, x holds those rows and says which in `x.row`.
    """
    x = hide(x)
    if recipe.reward is not None:
        x = dataclasses.replace(x, reward=jax.lax.stop_gradient(recipe.reward(x)))
    if recipe.selection is None:
        return x
    kept = recipe.selection(x)
    if kept.dtype == jnp.bool_:
        return dataclasses.replace(x, mask=x.mask & kept[:, None], fresh=x.fresh & kept[:, None])
    return dataclasses.replace(taken(x, kept), row=kept)


def taken(x: Experience, row: Int[Array, " N"]) -> Experience:
    """x with other rows in place of each, prompts and coefficients as they are."""
    whole = {name: vars(x)[name] for name in ("prompts", "coefficients")}
    return dataclasses.replace(jax.tree.map(lambda a: a[row], dataclasses.replace(x, prompts=None, coefficients=None)),
                               **whole)


def policy_rows(policy: Evaluated, x: Experience) -> Evaluated:
    """What the policy says of the rows that x holds, from what it says of the drawn batch."""
    return policy if x.row is None else jax.tree.map(lambda a: a[x.row], policy)


def credited(recipe: Recipe, x: Experience) -> Experience:
    """x with its advantage, constant in the weights, one number per token."""
    if recipe.advantage is None:
        return x
    advantage = recipe.advantage(x)
    if advantage.ndim == 1:
        advantage = advantage[:, None]
    advantage = jnp.broadcast_to(advantage, x.mask.shape).astype(x.rollout_logp.dtype)
    return dataclasses.replace(x, given={**x.given, "advantage": jax.lax.stop_gradient(advantage)})


def marked(recipe: Recipe, x: Experience) -> Experience:
    """x with what its `marks` slot says of each token, constant in the weights."""
    if recipe.marks is None:
        return x
    return dataclasses.replace(x, marks=jax.lax.stop_gradient(dict(recipe.marks(x))))


def with_advantage(recipe: Recipe, x: Experience) -> Experience:
    """Runs the reward, selection, advantage and marks slots."""
    return marked(recipe, credited(recipe, selected(recipe, x)))


def hide(x: Experience) -> Experience:
    """x with zeros behind the mask, so that no slot can read what the policy did not choose."""
    def shown(values):
        return jax.lax.stop_gradient(jnp.where(x.mask, values, 0.0))

    return dataclasses.replace(x, rollout_logp=shown(x.rollout_logp), rollout_entropy=shown(x.rollout_entropy),
                               given={name: shown(values) for name, values in x.given.items()},
                               views=None if x.views is None else jax.tree.map(shown, x.views))


def hide_policy(policy: Evaluated, mask: Bool[Array, "N T"]) -> Evaluated:
    """The same for what the policy says now: hidden tokens get a gradient of exactly 0."""
    return jax.tree.map(lambda values: jnp.where(mask, values, 0.0), policy)
