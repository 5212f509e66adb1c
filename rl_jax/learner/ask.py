"""From prompts to scored answers, in whichever way the recipe draws them."""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rl_jax.learner import assemble, carry, collect, diagnostics, roles
from rl_jax.models import quantised
from rl_jax.models.network import Network
from rl_jax.recipe import Recipe
from rl_jax.rollout import decode, mixed, refill, window
from rl_jax.types import Parameters, Prompts, Samples, TrainState, Verdict

Metrics = dict[str, Array]
Ask = Callable[[TrainState, Prompts, Array, Array], tuple[Prompts, Samples, Verdict, Metrics, dict[str, Any]]]


def make_ask(recipe: Recipe, network: Network, verdict: collect.Judge | None, *, completion_length: int,
             stop_ids: tuple[int, ...], pad_id: int, axis: str | None = None, quantise: str = "",
             slots: int = 0) -> Ask:
    """Returns ask(state, prompts, uniforms, version) -> (prompts, samples, verdict, metrics, carried).

    Of the state it reads the policy (and the frozen part of it), the control and what is carried.

    Args:
      verdict: (prompts, samples) -> Verdict, from `tasks.judge`; None only without a rollout.
      completion_length, stop_ids, pad_id: see `decode.make_rollout`.
      axis: name of the vmap axis over replicas, if there is one.
      quantise: draw with a copy of the weights in 8 bits (`quantised.copy`), made anew in every step; "" draws with
        the weights themselves. The copy is another policy: what it drew is off-policy by as much as it differs.
      slots: answers drawn at once, as `refill.make_rollout` does; 0 draws all at once. Not for a rollout in windows.
    """
    def drawing(state: TrainState) -> Parameters:
        policy = roles.policy(state)
        return quantised.copy(policy, quantise) if quantise else policy

    if recipe.rollout is None:
        return lambda state, prompts, uniforms, version: (*given_answers(prompts, version), {}, state.carried)
    ends = {"completion_length": completion_length, "stop_ids": stop_ids, "pad_id": pad_id, "axis": axis}
    if recipe.rollout.window:
        if slots:
            raise ValueError(f"recipe {recipe.name!r} draws in windows (rollout.window={recipe.rollout.window}), which "
                             f"keep a place for every answer: set batching.slots={slots} to 0, or window=0.")
        return _in_windows(recipe, window.make_window(network, recipe.rollout, **ends), verdict, drawing)
    whole = (refill.make_rollout(network, recipe.rollout, slots=slots, **ends) if slots else
             decode.make_rollout(network, recipe.rollout, **ends))

    def draw(parameters, prompts, uniforms, version, coefficient):
        samples = whole(parameters, prompts, uniforms, version, coefficient)
        return mixed.with_answers(samples, prompts, recipe.rollout.given) if recipe.rollout.given else samples

    found = collect.make_collect(recipe, draw, verdict, axis)

    def ask(state, prompts, uniforms, version):
        coefficient = assemble.namespace(coefficients_of(recipe, state.control))
        return *found(drawing(state), prompts, uniforms, version, coefficient), state.carried

    return ask


def _in_windows(recipe: Recipe, grow: Callable[..., window.Slots], verdict: collect.Judge,
                drawing: Callable[[TrainState], Parameters]) -> Ask:
    def ask(state, prompts, uniforms, version):
        before = state.carried["window"]
        coefficient = assemble.namespace(coefficients_of(recipe, state.control))
        slots = grow(drawing(state), before, prompts, uniforms, version, coefficient)
        said, complete = verdict(slots.prompts, slots.samples), slots.samples.complete
        # what the verifier says of half an answer is neither a score nor a failure
        said = dataclasses.replace(said, score=jnp.where(complete, said.score, 0.0), failed=said.failed & complete)
        metrics = diagnostics.of_samples(assemble.experience(slots.prompts, slots.samples, said))
        metrics["rollout/prompts_not_asked"] = before.busy.sum().astype(jnp.float32)
        return slots.prompts, slots.samples, said, metrics, {**state.carried, "window": slots}

    return ask


def given_answers(prompts: Prompts, version: Array) -> tuple[Prompts, Samples, Verdict]:
    """The prompts' own answers as samples, for recipes without a rollout."""
    if prompts.answer is None:
        raise ValueError("this recipe learns from given answers (rollout=None), and the prompts have none: "
                         "the task must give every training example an `answer`.")
    shape = prompts.answer.shape
    zero = jnp.zeros(shape, jnp.float32)
    samples = Samples(tokens=prompts.answer, mask=prompts.answer_mask, rollout_logp=zero, rollout_entropy=zero,
                      finished=jnp.ones(shape[:1], bool), version=jnp.full(shape[:1], version, jnp.int32))
    verdict = Verdict(score=jnp.ones(shape[:1], jnp.float32), parts={}, failed=jnp.zeros(shape[:1], bool))
    return prompts, samples, verdict


def coefficients_of(recipe: Recipe, control: dict[str, Any]) -> dict[str, Any]:
    """Current values of the recipe's adapting coefficients, by name."""
    return {name: one.read(control[name]) for name, one in recipe.schedule.controls.items()}


def carries(recipe: Recipe) -> bool:
    """Whether rollouts of this recipe are kept for later steps."""
    return recipe.rollout is not None and (recipe.rollout.window > 0 or recipe.rollout.replay > 0)


def room(recipe: Recipe, network: Network, ask: Ask, prompts: Prompts, completion_length: int,
         axis: str | None = None) -> dict[str, Any]:
    """What the first state carries: empty slots for answers in windows, empty places for earlier batches.

    Args:
      prompts: a batch of them, for its shapes.
      axis: the one that `ask` was made for.
    """
    if not carries(recipe):
        return {}
    prompts = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), prompts)
    uniforms = jnp.zeros((prompts.lengths.shape[0], recipe.group_size, completion_length))
    zero = jnp.zeros((), jnp.int32)

    def asked(carried):
        state = TrainState(
            step=zero, key=jax.random.key(0), parameters={"policy": network.initialise(jax.random.key(0))},
            optimiser=None, frozen={}, control={name: one.init(1) for name, one in recipe.schedule.controls.items()},
            skipped=zero, carried=carried)
        return ask(state, prompts, uniforms, zero)[:3]

    rooms = {}
    if recipe.rollout.window:
        row = prompts.lengths.shape[0] * recipe.group_size
        rooms["window"] = window.blank(prompts, window.whole(network, recipe.rollout, row, completion_length), uniforms)
    if recipe.rollout.replay:
        if axis is not None:  # `ask` looks at all replicas, here at the one whose shapes are wanted
            asked = jax.vmap(asked, None, None, axis_name=axis, axis_size=1)
        rooms["replay"] = carry.empty(jax.eval_shape(asked, rooms), recipe.rollout.replay)
    return rooms
