"""One update of the weights, the same for every recipe."""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from rl_jax.learner import assemble, diagnostics
from rl_jax.recipe import Recipe
from rl_jax.types import Evaluated, Experience, Parameters

Metrics = dict[str, Float[Array, ""]]
Evaluate = Callable[[Parameters, Experience], Evaluated]


def batch_loss(recipe: Recipe, policy: Evaluated, x: Experience) -> tuple[Float[Array, ""], dict[str, Any]]:
    """sum(loss * weight) of a whole batch of plain arrays, with no model and no trainer.

    Runs reward, selection, advantage, weighting and loss; jittable, and differentiable in `policy`.
    `assemble.of_arrays` makes x.

    Returns:
      The loss, and the recipe's own extra metrics as means over the chosen tokens.
    """
    x = assemble.with_advantage(recipe, x)
    return weighted_loss(recipe, policy, x, recipe.weighting(x), token_share(x))


def token_share(x: Experience) -> Float[Array, "N T"]:
    """mask / its sum: the weights under which a sum is the mean over chosen tokens of the whole batch."""
    return x.mask / jnp.maximum(x.mask.sum(), 1)


def weighted_loss(recipe: Recipe, policy: Evaluated, x: Experience, weight: Float[Array, "N T"],
                  share: Float[Array, "N T"]) -> tuple[Float[Array, ""], dict[str, Any]]:
    """sum(loss * weight) of a batch or of any part of it; parts add up to the whole.

    Args:
      weight: from the weighting slot, on the whole batch.
      share: from `token_share`, on the whole batch.
    """
    policy = assemble.hide_policy(policy, x.mask)
    loss, extras = _loss_and_extras(recipe, policy, x)
    loss = jnp.where(x.mask, loss, 0.0)
    extras = {name: (jnp.where(x.mask, value, 0.0) * share).sum() for name, value in extras.items()}
    return (loss * jax.lax.stop_gradient(weight)).sum(), jax.lax.stop_gradient(extras)


def _loss_and_extras(recipe: Recipe, policy: Evaluated, x: Experience):
    out = recipe.loss(policy, x)
    return out if isinstance(out, tuple) else (out, {})


def make_gradient(recipe: Recipe, evaluate: Evaluate, microbatches: int = 1) -> Callable[..., Any]:
    """Returns gradient(parameters, x) -> (gradient, metrics), accumulated over micro-batches.

    `microbatches` trades memory for time and changes nothing else: weights are fixed before the
    batch is cut, and a group is never cut.
    """
    def objective(parameters, x, weight, share):
        policy = evaluate(parameters, x)
        loss, extras = weighted_loss(recipe, policy, x, weight, share)
        return loss, {"loss/total": loss, **extras, **diagnostics.of_policy(recipe, policy, x, share)}

    def one(parameters, part, coefficients):
        x, weight, share = part
        group_size = x.mask.shape[0] // x.prompts.lengths.shape[0]
        x = dataclasses.replace(x, group=assemble.group_ids(x.failed, group_size), coefficients=coefficients)
        (_, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(parameters, x, weight, share)
        return gradient, metrics

    def gradient(parameters: Parameters, x: Experience) -> tuple[Parameters, Metrics]:
        whole = (dataclasses.replace(x, coefficients=None), recipe.weighting(x), token_share(x))
        if microbatches == 1:
            return one(parameters, whole, x.coefficients)
        parts = cut(whole, microbatches)
        shapes = jax.eval_shape(one, parameters, jax.tree.map(lambda a: a[0], parts), x.coefficients)
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes[0])

        def accumulate(total, part):
            new, metrics = one(parameters, part, x.coefficients)
            return jax.tree.map(jnp.add, total, new), metrics

        total, metrics = jax.lax.scan(accumulate, zero, parts)
        return total, diagnostics.joined(metrics)

    return gradient


def cut(tree: Any, parts: int) -> Any:
    """Every array with its leading axis split in `parts` equal pieces: [A, ...] -> [parts, A / parts, ...]."""
    return jax.tree.map(lambda a: a.reshape(parts, a.shape[0] // parts, *a.shape[1:]), tree)


def make_update(recipe: Recipe, evaluate: Evaluate, optimiser: optax.GradientTransformation,
                microbatches: int = 1) -> Callable[..., Any]:
    """Returns update(parameters, optimiser_state, x) -> (parameters, optimiser_state, metrics): one optimiser step.

    x has been through `assemble.with_advantage`. A gradient that is not finite changes nothing
    and is counted in `gradient/skipped`.
    """
    gradient_of = make_gradient(recipe, evaluate, microbatches)

    def update(parameters: Parameters, state: Any, x: Experience) -> tuple[Parameters, Any, Metrics]:
        gradient, metrics = gradient_of(parameters, x)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm)
        step, new_state = optimiser.update(gradient, state, parameters)
        new = optax.apply_updates(parameters, step)

        def kept(now, before):
            return jnp.where(finite, now, before)

        parameters, state = jax.tree.map(kept, (new, new_state), (parameters, state))
        return parameters, state, {**metrics, "gradient/norm": norm, "gradient/skipped": 1.0 - finite}

    return update


def make_passes(recipe: Recipe, evaluate: Evaluate, optimiser: optax.GradientTransformation,
                microbatches: int = 1) -> Callable[..., Any]:
    """Returns passes(parameters, optimiser_state, x, key): all epochs and minibatches over one batch.

    The prompts are dealt to minibatches anew for each epoch (the key is consumed); groups stay whole. Weights
    are those of the minibatch, the batch of one optimiser step.
    """
    epochs, minibatches = recipe.schedule.epochs, recipe.schedule.minibatches
    update = make_update(recipe, evaluate, optimiser, microbatches)

    def passes(parameters: Parameters, state: Any, x: Experience, key: Array) -> tuple[Parameters, Any, Metrics]:
        if epochs == minibatches == 1:
            return update(parameters, state, x)
        prompts, coefficients = x.prompts.lengths.shape[0], x.coefficients
        group_size = x.mask.shape[0] // prompts
        x = dataclasses.replace(x, coefficients=None)

        def take(prompt_rows):
            rows = (prompt_rows[:, None] * group_size + jnp.arange(group_size)[None, :]).reshape(-1)
            part = jax.tree.map(lambda a: a[rows], dataclasses.replace(x, prompts=None))
            return dataclasses.replace(part, prompts=jax.tree.map(lambda a: a[prompt_rows], x.prompts),
                                       group=assemble.group_ids(part.failed, group_size), coefficients=coefficients)

        def one(carry, prompt_rows):
            *carry, metrics = update(*carry, take(prompt_rows))
            return tuple(carry), metrics

        deal = jax.vmap(lambda k: jax.random.permutation(k, prompts))(jax.random.split(key, epochs))
        deal = deal.reshape(epochs * minibatches, prompts // minibatches)
        (parameters, state), metrics = jax.lax.scan(one, (parameters, state), deal)
        return parameters, state, diagnostics.averaged(metrics)

    return passes
