"""The loop as a generator of ticks; metrics, checkpoints and validation consume them."""
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from rl_jax.experiment import Phase
from rl_jax.learner import optimiser, step
from rl_jax.models import mesh as meshes
from rl_jax.models import sharding
from rl_jax.models.network import Network
from rl_jax.recipe import Recipe
from rl_jax.tasks import judge
from rl_jax.tasks import task as tasks
from rl_jax.tasks.stream import Stream, batch
from rl_jax.types import Experience, Parameters, Prompts, TrainState, Verdict

# the fields of a state that hold weights, or one number for each
WEIGHTS = tuple(jax.tree_util.GetAttrKey(name) for name in ("parameters", "optimiser", "frozen"))


@dataclasses.dataclass(frozen=True)
class Tick:
    """One dispatch later.

    Attributes:
      done: steps of this phase.
      state: after them. It is donated to the next dispatch: use it before the next tick, and set it to None
        in a tick that is kept longer.
      metrics: on the device; with a leading axis where a dispatch makes several steps, behind one of
        replicas where there are several.
      experience: of the first groups of the batch, on the device, with the same leading axes.
      data: the stream's state.
      pending: rollouts in flight, (prompts, samples); None in the one-program mode.
    """

    done: int
    state: TrainState | None
    metrics: dict[str, Array]
    experience: Experience
    data: dict[str, Any]
    pending: Any


class PhaseLoop:
    """The compiled programs of one phase, by name in `compiled`, and the ticks that they make."""

    def __init__(self, phase: Phase, task: tasks.Task, network: Network, *, workers: Any = None,
                 shown_groups: int | None = None, mesh: Mesh | None = None):
        """Composes the programs; nothing is compiled before `prepare` or the first tick.

        Args:
          workers: where a host verifier runs (`reward.worker.Workers`).
          shown_groups: groups whose experience a tick carries; None carries all.
          mesh: the devices that batch and weights are cut over; None for one. Everything that compiles must run
            under `jax.set_mesh(mesh)`.
        """
        self.mesh = mesh
        self.phase, self.task, self.workers = phase, task, workers
        self.network = dataclasses.replace(network, adapters=phase.adapters)
        numbers = phase.optimiser
        self.optimiser = optimiser.transform(numbers, phase.updates)
        scale, recipe = phase.scale, phase.recipe
        verdict = None
        if recipe.rollout is not None:
            verdict = judge.make_judge(task, "train", workers=workers, mesh=mesh)
        if scale.program == "split":
            verdict = no_verdict(task)
        self.pieces = step.make_pieces(
            recipe, task, self.network, self.optimiser, verdict, microbatches=scale.microbatches,
            axis=step.SEED_AXIS if scale.seeds > 1 else None, quantise=scale.draw_with,
            learning_rate=optimiser.learning_rate(numbers, phase.updates))
        self._fresh, self._warm = self._initialisers()
        self._shown = shown_groups
        self.compiled: dict[str, Any] = {}

    def stream(self, seed: int) -> Stream:
        """The phase's prompts, at their beginning."""
        return Stream(self.task, "train", self.phase.prompts_asked, seed=seed,
                      **_answers(self.phase.recipe))

    def initial_state(self, key: Key[Array, ""], policy: Parameters | None = None) -> TrainState:
        """The state before the first step, with a leading axis of replicas if there are several.

        Args:
          key: consumed.
          policy: weights to start from, without adapters, with the same leading axis; None for fresh ones.
        """
        seeds = self.phase.scale.seeds
        return (self._fresh if policy is None else self._warm)(key if seeds == 1 else jax.random.split(key, seeds),
                                                               policy)

    def _initialisers(self) -> tuple[Callable[..., TrainState], Callable[..., TrainState]]:
        """Compiled once each: from fresh weights, and from those of the phase before."""
        examples = self.task.splits["train"]
        like = batch(self.task, [examples[0]] * self.phase.prompts_asked, **_answers(self.phase.recipe))

        def one(key, policy):
            return step.initial_state(self.phase.recipe, self.network, self.optimiser, key, policy,
                                      examples=len(examples), carried=self.pieces.carried(like), train=self.phase.scale.train)

        if self.mesh is not None:
            placed = {"out_shardings": self.shardings(jax.eval_shape(one, jax.random.key(0), None))}
            return jax.jit(one, **placed), jax.jit(one, **placed)
        if self.phase.scale.seeds == 1:
            return jax.jit(one), jax.jit(one)
        return jax.jit(jax.vmap(one, (0, None))), jax.jit(jax.vmap(one))

    def shardings(self, state: Any) -> Any:
        """Where the parts of a state lie on the mesh: weights and their moments cut as `models.sharding` says, the rest
        whole on every device."""
        def of(path: tuple, leaf: Any) -> NamedSharding:
            names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            of_weights = path[0] in WEIGHTS and leaf.ndim > 0
            return sharding.of(tuple(names), leaf.shape, self.mesh) if of_weights else meshes.whole(self.mesh)

        return jax.tree_util.tree_map_with_path(of, state)

    def _rows(self) -> NamedSharding:
        calls = self.phase.scale.steps_per_call > 1
        return NamedSharding(self.mesh, PartitionSpec(*[None] * calls, meshes.ROWS))

    def place(self, prompts: Prompts) -> Prompts:
        """A batch on the devices, its rows cut over those of the batch."""
        return jax.device_put(prompts) if self.mesh is None else jax.device_put(prompts, self._rows())

    def _compiled(self, program: Callable[..., Any], state: TrainState, *others: Any, results: int) -> Any:
        """The program of a state, which it donates, and of further arguments; its first result is the next state.

        Args:
          results: how many there are beside the state.
        """
        if self.mesh is None:
            return jax.jit(program, donate_argnums=0).lower(state, *others).compile()
        here = self.shardings(state)
        # None: where the arguments lie, or where the compiler puts the results
        jitted = jax.jit(program, donate_argnums=0, in_shardings=(here, self._rows(), *[None] * (len(others) - 1)),
                         out_shardings=(here, meshes.whole(self.mesh), *[None] * (results - 1)))
        return jitted.lower(state, *others).compile()

    def prepare(self, state: TrainState, prompts: Prompts) -> dict[str, Any]:
        """Compiles for these shapes, once; returns the compiled programs by name.

        Args:
          state, prompts: arrays or shapes of one dispatch.
        """
        if self.compiled:
            return self.compiled
        scale = self.phase.scale
        if scale.program == "one":
            program = step.composed(self.pieces, steps_per_call=scale.steps_per_call, seeds=scale.seeds,
                                     shown_groups=self._shown)
            self.compiled["step"] = self._compiled(program, state, prompts, results=2)
            return self.compiled
        draw, index = step.make_draw(self.pieces), jax.ShapeDtypeStruct((), jnp.int32)
        lowered = jax.jit(draw).lower(state, prompts, index)
        self.compiled["draw"] = lowered.compile()
        samples = jax.eval_shape(draw, state, prompts, index)
        blank = jax.eval_shape(no_verdict(self.task), prompts, samples)
        learn = step.make_learn(self.pieces, self._shown)
        self.compiled["learn"] = self._compiled(learn, state, prompts, samples, blank, results=2)
        return self.compiled

    def ticks(self, state: TrainState, stream: Stream, *, done: int = 0, pending: Any = None) -> Iterator[Tick]:
        """Goes on from `done` steps to the end of the phase.

        Args:
          state: donated.
          pending: rollouts in flight when `state` was saved; None at the start of a phase.
        """
        return (self._one if self.phase.scale.program == "one" else self._two)(state, stream, done, pending)

    def _one(self, state: TrainState, stream: Stream, done: int, pending: Any) -> Iterator[Tick]:
        per_call = self.phase.scale.steps_per_call
        while done < self.phase.scale.steps:
            prompts = self.place(batches(stream, per_call))
            program = self.prepare(state, prompts)["step"]
            state, metrics, experience = program(state, prompts)
            done += per_call
            yield Tick(done, state, metrics, experience, stream.state(), None)

    def _two(self, state: TrainState, stream: Stream, done: int, pending: Any) -> Iterator[Tick]:
        def drawn(prompts, index):
            program = self.prepare(state, prompts)["draw"]
            index = jax.device_put(np.int32(index))
            return prompts, program(state, prompts, index)

        pending = drawn(self.place(next(stream)), 0) if pending is None else pending
        while done < self.phase.scale.steps:
            now, pending = pending, None
            if done + 1 < self.phase.scale.steps:  # the device draws this while the host scores
                pending = drawn(self.place(next(stream)), done + 1)
            prompts, samples = now
            verdict = judge.score_on_host(self.task, "train", self.workers, *judge.rows_of(prompts, samples))
            program = self.prepare(state, prompts)["learn"]
            state, metrics, experience = program(state, prompts, samples, jax.device_put(verdict))
            done += 1
            yield Tick(done, state, metrics, experience, stream.state(), pending)


def _answers(recipe: Recipe) -> dict[str, bool]:
    drawn = recipe.rollout is not None
    return {"need_answers": not drawn, "with_answers": drawn and recipe.needs_answers}


def batches(stream: Iterator[Prompts], count: int) -> Prompts:
    """The next batch; with count > 1 so many of them, stacked on a new leading axis."""
    if count == 1:
        return next(stream)
    return jax.tree.map(lambda *rows: np.stack(rows), *(next(stream) for _ in range(count)))


def no_verdict(task: tasks.Task) -> Callable[..., Any]:
    """A judge that scores nothing, for the program that only draws."""
    def judge_nothing(prompts, samples):
        zero = jnp.zeros(samples.finished.shape, jnp.float32)
        return Verdict(score=zero, failed=jnp.zeros(samples.finished.shape, bool),
                       parts={name: zero for name in task.verifier.parts})

    return judge_nothing
