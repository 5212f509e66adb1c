"""From samples and scores to experience with credit: the slots that run before the loss."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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


def experience(prompts: Prompts, samples: Samples, verdict: Verdict, *,
               coefficients: dict[str, Any] | None = None) -> Experience:
    """Samples with their scores; what the verifier could not score has no mask and no group.

    Args:
      coefficients: current values of the recipe's adapting coefficients, by name.
    """
    failed = verdict.failed
    score = jnp.where(failed, 0.0, verdict.score).astype(jnp.float32)
    return Experience(
        prompts=prompts, tokens=samples.tokens, mask=samples.mask & ~failed[:, None],
        rollout_logp=samples.rollout_logp, rollout_entropy=samples.rollout_entropy, finished=samples.finished,
        version=samples.version, support=samples.support, score=score, reward=score,
        group=group_ids(failed, score.shape[0] // prompts.lengths.shape[0]), parts=verdict.parts, failed=failed,
        given={}, coefficients=coefficients)


def of_arrays(rollout_logp: Float[Array, "N T"], mask: Bool[Array, "N T"], reward: Float[Array, " N"],
              group: Int[Array, " N"], **given: Float[Array, "N T"]) -> Experience:
    """Experience from plain arrays, for `update.batch_loss` without model or trainer.

    Args:
      rollout_logp: log-probability under the distribution that sampled, in nats.
      mask: which tokens the policy chose.
      reward: of each sequence, in reward units; it is the score, too.
      group: id of each sequence's prompt, in [0, N).
      given: what the recipe's `models` ask for by name: reference_logp, old_logp, teacher_logp (nats), values.
    """
    rows, zero = mask.shape[0], jnp.zeros(mask.shape, jnp.float32)
    return Experience(
        tokens=jnp.zeros(mask.shape, jnp.int32), mask=mask, rollout_logp=rollout_logp, rollout_entropy=zero,
        finished=mask.any(axis=1), version=jnp.zeros(rows, jnp.int32), score=reward, reward=reward, group=group,
        parts={}, failed=jnp.zeros(rows, bool), given=given)


def selected(recipe: Recipe, x: Experience) -> Experience:
    """x with the reward slot applied and without the tokens of sequences that selection rejects."""
    x = hide(x)
    if recipe.reward is not None:
        x = dataclasses.replace(x, reward=jax.lax.stop_gradient(recipe.reward(x)))
    if recipe.selection is not None:
        x = dataclasses.replace(x, mask=x.mask & recipe.selection(x)[:, None])
    return x


def credited(recipe: Recipe, x: Experience) -> Experience:
    """x with its advantage, constant in the weights, one number per token."""
    if recipe.advantage is None:
        return x
    advantage = recipe.advantage(x)
    if advantage.ndim == 1:
        advantage = advantage[:, None]
    advantage = jnp.broadcast_to(advantage, x.mask.shape).astype(jnp.float32)
    return dataclasses.replace(x, given={**x.given, "advantage": jax.lax.stop_gradient(advantage)})


def with_advantage(recipe: Recipe, x: Experience) -> Experience:
    """Runs the reward, selection and advantage slots."""
    return credited(recipe, selected(recipe, x))


def hide(x: Experience) -> Experience:
    """x with zeros behind the mask, so that no slot can read what the policy did not choose."""
    def shown(values):
        return jax.lax.stop_gradient(jnp.where(x.mask, values, 0.0))

    return dataclasses.replace(x, rollout_logp=shown(x.rollout_logp), rollout_entropy=shown(x.rollout_entropy),
                               given={name: shown(values) for name, values in x.given.items()})


def hide_policy(policy: Evaluated, mask: Bool[Array, "N T"]) -> Evaluated:
    """The same for what the policy says now: hidden tokens get a gradient of exactly 0."""
    return jax.tree.map(lambda values: jnp.where(mask, values, 0.0), policy)
