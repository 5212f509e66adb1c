"""One step of any recipe as one compiled program, or as two with the host's verifier between them."""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from rl_jax.learner import assemble, collect, diagnostics, evaluate, update
from rl_jax.models import network as networks
from rl_jax.models.network import Network
from rl_jax.recipe import Recipe
from rl_jax.rollout import decode
from rl_jax.tasks import judge
from rl_jax.tasks import task as tasks
from rl_jax.types import Experience, Parameters, Prompts, Samples, TrainState, Verdict

Metrics = dict[str, Array]
SEED_AXIS = "seed"


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The functions that a step is composed of, none of them compiled.

    Attributes:
      uniforms: (key, step, number of prompts) -> the random numbers that `ask` draws with.
      ask: (parameters, prompts, uniforms, version) -> (prompts, samples, verdict, metrics).
      learn: (state, prompts, samples, verdict) -> (state, metrics, experience).
    """

    uniforms: Callable[..., Array]
    ask: Callable[..., tuple[Prompts, Samples, Verdict, Metrics]]
    learn: Callable[..., tuple[TrainState, Metrics, Experience]]


def initial_state(recipe: Recipe, network: Network, optimiser: optax.GradientTransformation, key: Key[Array, ""],
                  policy: Parameters | None = None, teacher: Parameters | None = None) -> TrainState:
    """The state before the first step; the key is consumed.

    Args:
      policy: weights to start from; fresh ones if None. The reference and the critic's body are
        copies of them.
      teacher: weights of the teacher, for a recipe that asks for one.

    Raises:
      ValueError: if the recipe asks for a teacher and none is given.
    """
    if "teacher" in recipe.models and teacher is None:
        raise ValueError(f"recipe {recipe.name!r} learns from a teacher: give initial_state its weights "
                         "(teacher=...), of the same network.")
    own, fresh = jax.random.split(key)
    # copied: the state is donated to the first step, the caller's weights are not
    policy = network.initialise(fresh) if policy is None else jax.tree.map(jnp.copy, policy)
    parameters = {"policy": policy}
    if "critic" in recipe.models:
        parameters["critic"] = networks.critic_from(network, policy)
    given = {"reference": policy, "teacher": teacher}
    frozen = {role: jax.tree.map(jnp.copy, weights) for role, weights in given.items() if role in recipe.models}
    control = {name: one.init() for name, one in recipe.schedule.controls.items()}
    zero = jnp.zeros((), jnp.int32)
    return TrainState(step=zero, key=own, parameters=parameters, optimiser=optimiser.init(parameters), frozen=frozen,
                      control=control, skipped=jnp.zeros((), jnp.int32))


def make_pieces(recipe: Recipe, task: tasks.Task, network: Network, optimiser: optax.GradientTransformation,
                verdict: collect.Judge | None, *, microbatches: int = 1, axis: str | None = None,
                learning_rate: Callable[[Array], Array] | None = None) -> Pieces:
    """The draw-and-judge half and the learning half of a step.

    Args:
      task: its tokenizer's end and pad ids and its completion length are read.
      verdict: (prompts, samples) -> Verdict, from `tasks.judge`.
      axis: name of the vmap axis over replicas, if there is one.
      learning_rate: the optimiser's schedule, for the metrics.
    """
    if recipe.rollout is None:
        temperature, ask = 1.0, given_answers
    else:
        temperature = recipe.rollout.temperature
        if temperature == 0:
            raise ValueError("rollout temperature=0 draws the same answer every time and leaves nothing to learn; "
                             "give a positive one (1.0 samples the policy itself).")
        draw = decode.make_rollout(network, recipe.rollout, completion_length=task.completion_length,
                                   end_id=task.tokenizer.end_id, pad_id=task.tokenizer.pad_id, axis=axis)
        ask = collect.make_collect(recipe, draw, verdict, axis)
    policy_of = evaluate.make_evaluate(network, temperature)
    passes = update.make_passes(recipe, policy_of, optimiser, microbatches)

    def learn(state: TrainState, prompts: Prompts, samples: Samples, verdict: Verdict):
        coefficients = {name: one.read(state.control[name]) for name, one in recipe.schedule.controls.items()}
        x = assemble.experience(prompts, samples, verdict, coefficients=coefficients)
        scored = x.mask.any(axis=1)  # neither failed nor an empty slot
        x = evaluate.with_models(recipe, policy_of, state.parameters, state.frozen, x, microbatches)
        x = assemble.with_advantage(recipe, x)
        parameters, optimiser_state, metrics = passes(state.parameters, state.optimiser, x,
                                                      jax.random.fold_in(state.key, 2 * state.step + 1))
        control = state.control
        if control:
            policy = assemble.hide_policy(jax.lax.stop_gradient(policy_of(state.parameters, x)), x.mask)
            control = {name: one.update(control[name], x, policy) for name, one in recipe.schedule.controls.items()}
        state = dataclasses.replace(
            state, step=state.step + 1, parameters=parameters, optimiser=optimiser_state, control=control,
            skipped=jnp.where(metrics["gradient/skipped"] > 0, state.skipped + 1, 0))
        metrics |= {f"control/{name}": jnp.asarray(value) for name, value in coefficients.items()}
        if recipe.rollout is not None:
            metrics["reward/mean"] = jnp.where(scored, x.reward, 0.0).sum() / jnp.maximum(scored.sum(), 1)
        if learning_rate is not None:
            passed = (state.step - 1) * recipe.schedule.epochs * recipe.schedule.minibatches
            metrics["optimiser/learning_rate"] = jnp.asarray(learning_rate(passed), jnp.float32)
        return state, metrics, x

    def uniforms(key: Array, index: Array, prompts: int) -> Array:
        group = recipe.group_size if recipe.rollout is not None else 0
        return decode.make_uniforms(jax.random.fold_in(key, 2 * index), prompts, group, task.completion_length)

    return Pieces(uniforms=uniforms, ask=ask, learn=learn)


def given_answers(parameters: Parameters, prompts: Prompts, uniforms: Array,
                  version: Array) -> tuple[Prompts, Samples, Verdict, Metrics]:
    """The prompts' own answers as samples, for recipes without a rollout."""
    if prompts.answer is None:
        raise ValueError("this recipe learns from given answers (rollout=None), and the prompts have none: "
                         "the task must give every training example an `answer`.")
    shape = prompts.answer.shape
    zero = jnp.zeros(shape, jnp.float32)
    samples = Samples(tokens=prompts.answer, mask=prompts.answer_mask, rollout_logp=zero, rollout_entropy=zero,
                      finished=jnp.ones(shape[:1], bool), version=jnp.full(shape[:1], version, jnp.int32))
    verdict = Verdict(score=jnp.ones(shape[:1], jnp.float32), parts={}, failed=jnp.zeros(shape[:1], bool))
    return prompts, samples, verdict, {}


def make_step(recipe: Recipe, task: tasks.Task, network: Network, optimiser: optax.GradientTransformation,
              mesh: jax.sharding.Mesh | None = None, *, workers: judge.Scorer | None = None,
              microbatches: int = 1) -> Callable[[TrainState, Prompts], tuple[TrainState, Metrics, Experience]]:
    """Returns step(state, prompts) -> (state, metrics, experience): one jitted program with donated state.

    Prefill, group rollout, reward, reference, old and critic passes, advantages, epochs and
    minibatches, optimiser. Start from `initial_state`; prompts come from `tasks.stream`.

    Args:
      mesh: the devices that the batch is sharded over; None for one.
      workers: where a host verifier runs; not read for a pure one.
    """
    verdict = judge.make_judge(task, "train", workers=workers, mesh=mesh)
    return jax.jit(composed(make_pieces(recipe, task, network, optimiser, verdict, microbatches=microbatches)),
                   donate_argnums=0)


def composed(pieces: Pieces, *, steps_per_call: int = 1, seeds: int = 1,
             shown_groups: int | None = None) -> Callable[..., tuple[TrainState, Metrics, Experience]]:
    """Returns step(state, prompts) -> (state, metrics, experience), not compiled yet.

    Args:
      steps_per_call: K steps in one dispatch. With K > 1 `prompts` and all results but the
        state carry a leading axis K.
      seeds: R replicas, vmapped. With R > 1 the state and all results carry a leading axis R
        (before K); the prompts are the same for all.
      shown_groups: return only the experience of the first so many prompts; None returns all of it.
    """
    def once(state: TrainState, prompts: Prompts, uniforms: Array) -> tuple[TrainState, Metrics, Experience]:
        drawn = pieces.ask(state.parameters["policy"], prompts, uniforms, state.step)
        state, learnt, x = pieces.learn(state, *drawn[:3])
        return state, {**drawn[3], **learnt}, first_groups(x, shown_groups)

    def single(state, prompts):
        return once(state, prompts, pieces.uniforms(state.key, state.step, prompts.lengths.shape[0]))

    def many(state, prompts):
        calls, count = prompts.lengths.shape
        numbers = jax.vmap(lambda n: pieces.uniforms(state.key, state.step + n, count))(jnp.arange(calls))

        def body(state, part):
            state, metrics, x = once(state, *part)
            return state, (_packed(metrics), x)

        # all random numbers are made before the scan and all metrics leave it as one array: small models are
        # bound by the number of operations in its body
        state, (metrics, x) = jax.lax.scan(body, state, (prompts, numbers))
        names = sorted(jax.eval_shape(single, state, jax.tree.map(lambda a: a[0], prompts))[1])
        return state, dict(zip(names, jnp.moveaxis(metrics, -1, 0), strict=True)), x

    step = single if steps_per_call == 1 else many
    return step if seeds == 1 else jax.vmap(step, in_axes=(0, None), axis_name=SEED_AXIS)


def _packed(metrics: Metrics) -> Array:
    return jnp.stack([metrics[name].astype(jnp.float32) for name in sorted(metrics)])


def make_draw(pieces: Pieces) -> Callable[..., Samples]:
    """The first of two programs: draw(parameters, key, prompts, index, version) -> samples of batch `index`.

    `version` is the number of steps that the weights have learned from.
    """
    def draw(parameters: Parameters, key: Array, prompts: Prompts, index: Array, version: Array) -> Samples:
        numbers = pieces.uniforms(key, index, prompts.lengths.shape[0])
        return pieces.ask(parameters["policy"], prompts, numbers, version)[1]

    return draw


def make_learn(pieces: Pieces,
               shown_groups: int | None = None) -> Callable[..., tuple[TrainState, Metrics, Experience]]:
    """The second of two programs: learn(state, prompts, samples, verdict) -> (state, metrics, experience)."""
    def learn(state: TrainState, prompts: Prompts, samples: Samples, verdict: Verdict):
        metrics = diagnostics.of_samples(assemble.experience(prompts, samples, verdict))
        state, learnt, x = pieces.learn(state, prompts, samples, verdict)
        return state, {**metrics, **learnt}, first_groups(x, shown_groups)

    return learn


def first_groups(x: Experience, groups: int | None) -> Experience:
    """The experience of the first so many prompts."""
    if groups is None:
        return x
    prompts = x.prompts.lengths.shape[0]
    groups = min(groups, prompts)
    rows = groups * (x.mask.shape[0] // prompts)
    rest = dataclasses.replace(x, prompts=None, coefficients=None)
    return dataclasses.replace(jax.tree.map(lambda a: a[:rows], rest),
                               prompts=jax.tree.map(lambda a: a[:groups], x.prompts))
