"""One update of the weights, the same for every recipe."""
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from rl_jax.batching import Batching
from rl_jax.learner import assemble, diagnostics, gate, lengths
from rl_jax.recipe import Recipe, Turns
from rl_jax.types import Evaluated, Experience, Parameters

Metrics = dict[str, Float[Array, ""]]
Evaluate = Callable[[Parameters, Experience], Evaluated]
Objective = Callable[[Parameters, Experience, Any, Float[Array, "N T"]], tuple[Float[Array, ""], Metrics]]


def batch_loss(recipe: Recipe, policy: Evaluated, x: Experience) -> tuple[Float[Array, ""], dict[str, Any]]:
    """sum(loss * weight) of a whole batch of plain arrays, with no model and no trainer.

    Runs reward, selection, advantage, marks, weighting and loss; jittable, and differentiable in
    `policy`. `assemble.of_arrays` makes x.

    Returns:
      The loss, and as metrics the recipe's extras (means over the chosen tokens) and its named terms.
    """
    x = assemble.with_advantage(recipe, x)
    return weighted_loss(recipe, assemble.policy_rows(policy, x), x, recipe.weighting(x), token_share(x))


def token_share(x: Experience) -> Float[Array, "N T"]:
    """mask / its sum: the weights under which a sum is the mean over chosen tokens of the whole batch."""
    return x.mask / jnp.maximum(x.mask.sum(), 1)


def weighted_loss(recipe: Recipe, policy: Evaluated, x: Experience, weight: Any,
                  share: Float[Array, "N T"]) -> tuple[Float[Array, ""], dict[str, Any]]:
    """sum(loss * weight) of a batch or of any part of it; parts add up to the whole.

    Args:
      weight: from the weighting slot, on the whole batch: [N, T], or by name for named terms.
      share: from `token_share`, on the whole batch.

    Raises:
      ValueError: if terms and weights have different names.
    """
    found = gate.gated(recipe, policy, x, weight, share)
    return found.loss, {**{f"loss/{name}": value for name, value in found.terms.items()}, **found.extras}


def in_parts(evaluate: Callable[[Parameters, Experience], Any], parameters: Parameters, x: Experience,
             microbatches: int = 1, batching: Batching = Batching()) -> Any:
    """What the weights say of a batch (`Evaluated`, or any arrays with axes N, T), one micro-batch after the other.

    Args:
      batching: in which shapes (`lengths.said`); by default in whole rows, and then the axes need only begin with N.
    """
    evaluate = lengths.said(evaluate, batching)
    if microbatches == 1:
        return evaluate(parameters, x)
    whole = dataclasses.replace(x, coefficients=None)
    parts = jax.lax.map(lambda part: evaluate(parameters, part), cut(whole, microbatches))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), parts)


def make_objective(recipe: Recipe, evaluate: Evaluate) -> Objective:
    """Returns objective(parameters, x, weight, share) -> (loss, metrics) of a batch or a part of it.

    `weight` and `share` are as in `weighted_loss`.
    """
    def objective(parameters: Parameters, x: Experience, weight: Any, share: Float[Array, "N T"]):
        return gate.with_metrics(gate.gated(recipe, evaluate(parameters, x), x, weight, share))

    return objective


def make_gradient(recipe: Recipe, evaluate: Evaluate, microbatches: int = 1,
                  objective: Objective | None = None, batching: Batching = Batching()) -> Callable[..., Any]:
    """Returns gradient(parameters, x) -> (gradient, metrics), accumulated over micro-batches.

    `microbatches` trades memory for time and changes nothing else: weights are fixed before the
    batch is cut, and a group is never cut. Where the recipe scales its step by the gradient's noise,
    the metric `gradient/variance` estimates the variance of the gradient from the pieces'.

    Args:
      objective: instead of `make_objective(recipe, evaluate)`, the same loss found another way.
      batching: in which shapes it is found, for each micro-batch its own (`lengths.graded`).

    Raises:
      ValueError: if the recipe's loss compares all groups of the batch and it should be cut.
    """
    two_steps = functools.partial(make_objective, recipe)
    graded = lengths.graded(objective or two_steps(evaluate), two_steps, evaluate, batching)
    scaling = recipe.schedule.step_scale
    pieces = microbatches if scaling is None else math.lcm(microbatches, scaling.pieces)
    if pieces > 1 and recipe.indivisible:
        raise ValueError(f"recipe {recipe.name!r} compares all groups of a batch in its loss, so the batch cannot be "
                         f"cut into {pieces} pieces: set scale.microbatches=1.")

    def one(parameters, part, coefficients):
        x, weight, share = part
        group_size = x.mask.shape[0] // x.prompts.lengths.shape[0]
        x = dataclasses.replace(x, group=assemble.group_ids(x.failed, group_size), coefficients=coefficients)
        (_, metrics), gradient = graded(parameters, x, weight, share)
        return gradient, metrics

    def gradient(parameters: Parameters, x: Experience) -> tuple[Parameters, Metrics]:
        whole = (dataclasses.replace(x, coefficients=None), recipe.weighting(x), token_share(x))
        if pieces == 1:
            return one(parameters, whole, x.coefficients)
        parts = cut(whole, pieces)
        shapes = jax.eval_shape(one, parameters, jax.tree.map(lambda a: a[0], parts), x.coefficients)
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes[0])

        def accumulate(carry, part):
            total, squares = carry
            new, metrics = one(parameters, part, x.coefficients)
            squares = squares if scaling is None else squares + optax.tree.norm(new, squared=True)
            return (jax.tree.map(jnp.add, total, new), squares), metrics

        (total, squares), metrics = jax.lax.scan(accumulate, (zero, jnp.zeros(())), parts)
        metrics = diagnostics.joined(metrics)
        if scaling is not None:  # a piece's own gradient is `pieces` times its part of the sum
            spread = pieces * squares - optax.tree.norm(total, squared=True)
            metrics["gradient/variance"] = jnp.maximum(spread, 0.0) / (pieces - 1)
        return total, metrics

    return gradient


def cut(tree: Any, parts: int) -> Any:
    """Every array with its leading axis split in `parts` equal pieces: [A, ...] -> [parts, A / parts, ...].

    Raises:
      ValueError: if the leading axis is no multiple of `parts`.
    """
    smallest = min((a.shape[0] for a in jax.tree.leaves(tree)), default=parts)
    if smallest % parts:
        raise ValueError(f"{smallest} prompts cannot be cut into {parts} pieces: take a multiple of {parts} "
                         "(scale.prompts_per_step), or fewer pieces (scale.microbatches, the recipe's own).")
    return jax.tree.map(lambda a: a.reshape(parts, a.shape[0] // parts, *a.shape[1:]), tree)


def make_update(recipe: Recipe, evaluate: Evaluate, optimiser: optax.GradientTransformation,
                microbatches: int = 1, objective: Objective | None = None,
                batching: Batching = Batching()) -> Callable[..., Any]:
    """Returns update(parameters, optimiser_state, x) -> (parameters, optimiser_state, metrics): one optimiser step.

    x has been through `assemble.with_advantage`. A gradient that is not finite changes nothing
    and is counted in `gradient/skipped`.
    """
    gradient_of = make_gradient(recipe, evaluate, microbatches, objective, batching)

    def update(parameters: Parameters, state: Any, x: Experience) -> tuple[Parameters, Any, Metrics]:
        gradient, metrics = gradient_of(parameters, x)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm)
        step, new_state = optimiser.update(gradient, state, parameters)
        if recipe.schedule.step_scale is not None:
            factor = recipe.schedule.step_scale.scale(norm**2, metrics["gradient/variance"])
            step = jax.tree.map(lambda a: factor * a, step)
            metrics = {**metrics, "optimiser/step_scale": factor}
        new = optax.apply_updates(parameters, step)

        def kept(now, before):
            return jnp.where(finite, now, before)

        parameters, state = jax.tree.map(kept, (new, new_state), (parameters, state))
        return parameters, state, {**metrics, "gradient/norm": norm, "gradient/skipped": 1.0 - finite}

    return update


def make_passes(recipe: Recipe, evaluate: Evaluate, optimiser: optax.GradientTransformation,
                microbatches: int = 1, objective: Objective | None = None,
                batching: Batching = Batching()) -> Callable[..., Any]:
    """Returns passes(parameters, optimiser_state, x, key): all epochs, minibatches and turns over one batch.

    The prompts are dealt to minibatches anew for each epoch (the key is consumed); groups stay whole. Weights
    are those of the minibatch, the batch of one optimiser step.
    """
    epochs, minibatches = recipe.schedule.epochs, recipe.schedule.minibatches
    update = make_update(recipe, evaluate, optimiser, microbatches, objective, batching)
    if recipe.schedule.turns is not None:
        said = functools.partial(in_parts, evaluate, microbatches=microbatches, batching=batching)
        update = make_turns(recipe.schedule.turns, update, said)

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


def make_turns(turns: Turns, update: Callable[..., Any], evaluate: Evaluate) -> Callable[..., Any]:
    """Returns update(parameters, optimiser_state, x): one optimiser step per turn, in the order of `turns`."""
    def logp_of(parameters, x):
        return jax.lax.stop_gradient(jnp.where(x.mask, evaluate(parameters, x).logp, 0.0))

    def in_turn(parameters: Parameters, state: Any, x: Experience) -> tuple[Parameters, Any, Metrics]:
        def taken(mask, parameters, state, factor, logp):
            part = dataclasses.replace(x, mask=mask, given={
                **x.given, "old_logp": logp, "advantage": x.advantage * factor[:, None]})
            parameters, state, metrics = update(parameters, state, part)
            after = logp_of(parameters, x)
            return (parameters, state, turns.factor(factor, after, logp, mask), after), metrics

        start = (parameters, state, jnp.ones(x.mask.shape[0]), logp_of(parameters, x))
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(taken, x.mask, *start)[1])

        def one(carry, turn):
            mask = x.mask & (x.turn == turn)
            carry, metrics = jax.lax.cond(mask.any(), taken, lambda mask, *carry: (carry, nothing), mask, *carry)
            return carry, (metrics, mask.any())

        (parameters, state, _, _), (metrics, present) = jax.lax.scan(one, start, jnp.asarray(turns.order))
        return parameters, state, diagnostics.averaged(metrics, present)

    return in_turn
