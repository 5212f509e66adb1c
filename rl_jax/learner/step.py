"""One step of any recipe as one compiled program, or as two with the host's verifier between them."""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from rl_jax.batching import Batching
from rl_jax.learner import ask as asking
from rl_jax.learner import assemble, carry, collect, diagnostics, evaluate, roles, update
from rl_jax.models import lora, mixture, trainable
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
      ask: (state, prompts, uniforms, version) -> (prompts, samples, verdict, metrics, carried); of the
        state it reads the policy, the control and what is carried, nothing else.
      learn: (state, prompts, samples, verdict) -> (state, metrics, experience).
      carried: prompts -> what the first state carries, given a batch of prompts (arrays or shapes).
    """

    uniforms: Callable[..., Array]
    ask: Callable[..., tuple[Prompts, Samples, Verdict, Metrics, dict[str, Any]]]
    learn: Callable[..., tuple[TrainState, Metrics, Experience]]
    carried: Callable[[Prompts], dict[str, Any]]


def initial_state(recipe: Recipe, network: Network, optimiser: optax.GradientTransformation, key: Key[Array, ""],
                  policy: Parameters | None = None, teacher: Parameters | None = None, *, examples: int = 0,
                  carried: dict[str, Any] | None = None, train: str = trainable.ALL) -> TrainState:
    """The state before the first step; the key is consumed.

    Args:
      policy: weights to start from, without adapters; fresh ones if None. The reference and the
        critic's body start as they do (`roles.begin`).
      teacher: weights of the teacher, for a recipe that asks for one.
      examples: number of training examples, for a recipe that remembers something of each.
      carried: from `Pieces.carried`, for a recipe that carries rollouts from step to step.
      train: which weights are trained (`models.trainable.split`); only those have an optimiser state.

    Raises:
      ValueError: if the recipe needs a teacher, the number of examples or something carried, and it is not given.
    """
    if asking.carries(recipe) and carried is None:
        raise ValueError(f"recipe {recipe.name!r} carries rollouts from step to step: give initial_state their room "
                         "(carried=pieces.carried(prompts)).")
    if "teacher" in recipe.models and teacher is None:
        raise ValueError(f"recipe {recipe.name!r} learns from a teacher: give initial_state its weights "
                         "(teacher=...), of the same network.")
    own, fresh = jax.random.split(key)
    if policy is None or network.adapters is not None:
        made = network.initialise(fresh)  # of which only the adapters are used, where there are weights
        policy = made if policy is None else lora.fresh(policy, made)
    # copied: the state is donated to the first step, the caller's weights are not
    parameters, frozen = roles.begin(recipe, network, policy, teacher, train)
    control = {name: one.init(examples) for name, one in recipe.schedule.controls.items()}
    zero = jnp.zeros((), jnp.int32)
    return TrainState(step=zero, key=own, parameters=parameters, optimiser=optimiser.init(parameters), frozen=frozen,
                      control=control, skipped=jnp.zeros((), jnp.int32), carried=carried or {})


def make_pieces(recipe: Recipe, task: tasks.Task, network: Network, optimiser: optax.GradientTransformation,
                verdict: collect.Judge | None, *, microbatches: int = 1, axis: str | None = None,
                learning_rate: Callable[[Array], Array] | None = None, quantise: str = "",
                batching: Batching = Batching()) -> Pieces:
    """The draw-and-judge half and the learning half of a step.

    Args:
      task: its tokenizer's stop and pad ids and its completion length are read.
      verdict: (prompts, samples) -> Verdict, from `tasks.judge`.
      axis: name of the vmap axis over replicas, if there is one.
      learning_rate: the optimiser's schedule, for the metrics.
      quantise: see `ask.make_ask`.
      batching: in which shapes answers are drawn and learned from.
    """
    temperature = 1.0 if recipe.rollout is None else recipe.rollout.temperature
    if temperature == 0:
        raise ValueError("rollout temperature=0 draws the same answer every time and leaves nothing to learn; "
                         "give a positive one (1.0 samples the policy itself).")
    ask = asking.make_ask(recipe, network, verdict, completion_length=task.completion_length,
                          stop_ids=task.tokenizer.stop_ids, pad_id=task.tokenizer.pad_id, axis=axis,
                          quantise=quantise, slots=batching.slots)
    policy_of = evaluate.make_evaluate(network, temperature)
    objective = evaluate.make_objective(recipe, network, temperature)
    replay = 0 if recipe.rollout is None else recipe.rollout.replay

    def learn(state: TrainState, prompts: Prompts, samples: Samples, verdict: Verdict):
        carried, drawn = state.carried, (prompts, samples, verdict)
        if replay:
            prompts, samples, verdict = carry.joined(drawn, carried["replay"])
            carried = {**carried, "replay": carry.pushed(drawn, carried["replay"])}
        coefficients = asking.coefficients_of(recipe, state.control)
        lots, deal = jax.random.split(jax.random.fold_in(state.key, 2 * state.step + 1))
        x = assemble.experience(prompts, samples, verdict, coefficients=coefficients,
                                seed=jax.random.bits(lots, verdict.failed.shape, jnp.uint32))
        scored = x.mask.any(axis=1) & x.complete  # neither failed nor an empty slot nor half an answer
        balance = {} if x.routes is None else mixture.load(x.routes, x.mask, network.shape.mixture.experts)
        whole = roles.whole(state.parameters, state.frozen)
        x = evaluate.with_models(recipe, network, policy_of, whole, state.frozen, x, microbatches, batching=batching)
        if samples.given is not None:
            x = dataclasses.replace(x, rollout_logp=jnp.where(samples.given[:, None], x.old_logp, x.rollout_logp))
        x = assemble.with_advantage(recipe, x)
        of_trained, of_loss = (roles.bound(one, state.frozen) for one in (policy_of, objective))
        passes = update.make_passes(recipe, of_trained, optimiser, microbatches, of_loss, batching)
        parameters, optimiser_state, metrics = passes(state.parameters, state.optimiser, x, deal)
        control = state.control
        if control:
            policy = jax.lax.stop_gradient(update.in_parts(of_trained, state.parameters, x, microbatches, batching))
            policy = assemble.hide_policy(policy, x.mask)
            control = {name: one.update(control[name], x, policy, metrics)
                       for name, one in recipe.schedule.controls.items()}
        state = dataclasses.replace(
            state, step=state.step + 1, parameters=parameters, optimiser=optimiser_state, control=control,
            skipped=jnp.where(metrics["gradient/skipped"] > 0, state.skipped + 1, 0), carried=carried)
        metrics |= balance | _numbers(coefficients)
        if recipe.rollout is not None:
            scored = scored if x.row is None else scored[x.row]
            metrics["reward/mean"] = jnp.where(scored, x.reward, 0.0).sum() / jnp.maximum(scored.sum(), 1)
        if replay:
            age = jnp.where(x.mask.any(axis=1), state.step - 1 - x.version, 0)
            metrics["rollout/age_steps"] = age.sum() / jnp.maximum(x.mask.any(axis=1).sum(), 1)
        if learning_rate is not None:
            metrics["optimiser/learning_rate"] = jnp.asarray(
                learning_rate((state.step - 1) * recipe.schedule.updates), jnp.float32)
        trivial = {name: None for name in ("complete", "fresh", "turn") if vars(samples)[name] is None}
        return state, metrics, dataclasses.replace(evaluate.unrouted(x), seed=None, example=None, domain=None, **trivial)

    def uniforms(key: Array, index: Array, prompts: int) -> Array:
        group = recipe.group_size if recipe.rollout is not None else 0
        return decode.make_uniforms(jax.random.fold_in(key, 2 * index), prompts, group, task.completion_length)

    def carried(prompts: Prompts) -> dict[str, Any]:
        return asking.room(recipe, network, ask, prompts, task.completion_length, axis)

    return Pieces(uniforms=uniforms, ask=ask, learn=learn, carried=carried)


def _numbers(coefficients: dict[str, Any]) -> Metrics:
    """The adapting coefficients that are numbers, for the metrics."""
    return {f"control/{name}": value for name, value in coefficients.items()
            if isinstance(value, jax.Array) and value.ndim == 0}


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
        *drawn, metrics, carried = pieces.ask(state, prompts, uniforms, state.step)
        state, learnt, x = pieces.learn(dataclasses.replace(state, carried=carried), *drawn)
        return state, {**metrics, **learnt}, first_groups(x, shown_groups)

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
    """The first of two programs: draw(state, prompts, index) -> samples of batch `index`, by the weights of the state."""
    def draw(state: TrainState, prompts: Prompts, index: Array) -> Samples:
        numbers = pieces.uniforms(state.key, index, prompts.lengths.shape[0])
        return pieces.ask(state, prompts, numbers, state.step)[1]

    return draw


def make_learn(pieces: Pieces,
               shown_groups: int | None = None) -> Callable[..., tuple[TrainState, Metrics, Experience]]:
    """The second of two programs: learn(state, prompts, samples, verdict) -> (state, metrics, experience)."""
    def learn(state: TrainState, prompts: Prompts, samples: Samples, verdict: Verdict):
        metrics = diagnostics.of_samples(assemble.experience(prompts, samples, verdict), samples.given)
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
