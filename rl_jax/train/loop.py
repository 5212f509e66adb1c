"""The loop as a generator of ticks; metrics, checkpoints and validation consume them."""
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from rl_jax.ahead import EAGER, Asynchronous
from rl_jax.batching import Batching
from rl_jax.experiment import Phase
from rl_jax.learner import optimiser, step
from rl_jax.models import mesh as meshes
from rl_jax.models import sharding
from rl_jax.models.network import Network
from rl_jax.recipe import Recipe
from rl_jax.tasks import judge
from rl_jax.tasks import task as tasks
from rl_jax.tasks.stream import Stream, batch
from rl_jax.train import asynchronous, machine
from rl_jax.types import Experience, Parameters, Prompts, Samples, TrainState, Verdict

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
      pending: rollouts in flight, (prompts, samples) of each batch; None where there are none.
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
                 shown_groups: int | None = None, mesh: Mesh | None = None,
                 ahead: Asynchronous = Asynchronous(), offload: tuple[str, ...] = (),
                 batching: Batching = Batching()):
        """Composes the programs; nothing is compiled before `prepare` or the first tick.

        Args:
          workers: where a host verifier runs (`reward.worker.Workers`).
          shown_groups: groups whose experience a tick carries; None carries all.
          mesh: the devices that batch and weights are cut over; None for one. Everything that compiles must run
            under `jax.set_mesh(mesh)`.
          ahead: how far and where a phase with scale.program="async" draws ahead; it has the first devices, `mesh` others.
          offload: what of the state is kept in the host's memory between steps (`models.mesh.Sizes`); needs a mesh.
          batching: in which shapes answers are drawn and learned from.
        """
        self.mesh, self.offload = mesh, offload
        # in two programs the host scores a batch while the device draws the next: one version late
        self.ahead = ahead if phase.scale.program == "async" else Asynchronous(staleness=1)
        self.sampler_mesh = mesh if self.ahead.sampler is None else meshes.make(self.ahead.sampler)
        self.phase, self.task, self.workers = phase, task, workers
        self.network = dataclasses.replace(network, adapters=phase.adapters)
        numbers = phase.optimiser
        self.optimiser = optimiser.transform(numbers, phase.updates)
        scale, recipe = phase.scale, phase.recipe
        self._pure, verdict = isinstance(task.verifier, tasks.PureVerifier), None
        if scale.program != "one" and not self._pure:
            verdict = no_verdict(task)
        elif recipe.rollout is not None:
            verdict = judge.make_judge(task, "train", workers=workers, mesh=mesh)
        self.pieces = step.make_pieces(
            recipe, task, self.network, self.optimiser, verdict, microbatches=scale.microbatches,
            axis=step.SEED_AXIS if scale.seeds > 1 else None, quantise=scale.draw_with, batching=batching,
            learning_rate=optimiser.learning_rate(numbers, phase.updates))
        self._fresh, self._warm = self._initialisers()
        self._shown = shown_groups
        self.compiled: dict[str, Any] = {}

    def stream(self, seed: int) -> Stream:
        """The phase's prompts, at their beginning; of each batch the rows of this process."""
        return Stream(self.task, "train", self.phase.prompts_asked, seed=seed, process_index=jax.process_index(),
                      process_count=jax.process_count(), **_answers(self.phase.recipe))

    def asked(self) -> Prompts:
        """Shapes of the prompts of one dispatch, those of all processes."""
        stream = Stream(self.task, "train", self.phase.prompts_asked, seed=0, **_answers(self.phase.recipe))
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype),
                            batches(stream, self.phase.scale.steps_per_call))

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
        """Where the parts of a state lie between steps: on the mesh, or in its hosts' memory."""
        def of(path: tuple, leaf: Any, on_device: NamedSharding) -> NamedSharding:
            frozen = path[0] == WEIGHTS[2] and path[1].key in self.offload
            away = (frozen or path[0] == WEIGHTS[1] and "optimiser" in self.offload) and leaf.ndim > 0
            return on_device.with_memory_kind("pinned_host") if away else on_device

        return jax.tree_util.tree_map_with_path(of, state, shardings(state, self.mesh))

    def _rows(self) -> NamedSharding:
        calls = self.phase.scale.steps_per_call > 1
        return NamedSharding(self.mesh, PartitionSpec(*[None] * calls, meshes.ROWS))

    def place(self, prompts: Prompts) -> Prompts:
        """A batch on the devices, its rows cut over those of the batch.

        Args:
          prompts: the rows of this process.
        """
        return jax.device_put(prompts) if self.mesh is None else meshes.joined(prompts, self._rows())

    def _compiled(self, program: Callable[..., Any], state: TrainState, *others: Any, results: int) -> Any:
        """The program of a state, which it donates, and of further arguments; its first result is the next state.

        Args:
          results: how many there are beside the state.
        """
        if self.mesh is None:
            return jax.jit(program, donate_argnums=0).lower(state, *others).compile()
        here, on_device = self.shardings(state), shardings(state, self.mesh)

        def fetched(state, *others):
            state, *rest = program(jax.device_put(state, on_device), *others)
            return jax.device_put(state, here), *rest

        shown = meshes.whole(self.mesh) if jax.process_count() > 1 else None  # None: where the compiler puts them
        jitted = jax.jit(fetched if self.offload else program, donate_argnums=0, in_shardings=(here, *[self._rows()] * len(others)),
                         out_shardings=(here, meshes.whole(self.mesh), *[shown] * (results - 1)))
        return jitted.lower(state, *others).compile()

    def prepare(self, state: TrainState, prompts: Prompts) -> dict[str, Any]:
        """Compiles for these shapes, once; returns the compiled programs by name.

        Args:
          state, prompts: arrays or shapes of one dispatch.
        """
        if not self.compiled:
            self._compile(state, prompts)
            machine.give_back_memory()  # of the compiler, which is more than a small network's step needs
        return self.compiled

    def _compile(self, state: TrainState, prompts: Prompts) -> None:
        scale = self.phase.scale
        if scale.program == "one":
            program = step.composed(self.pieces, steps_per_call=scale.steps_per_call, seeds=scale.seeds,
                                     shown_groups=self._shown)
            self.compiled["step"] = self._compiled(program, state, prompts, results=2)
            return
        draw, index = step.make_draw(self.pieces), jax.ShapeDtypeStruct((), jnp.int32)
        sent = jax.eval_shape(asynchronous.drawing, state)
        samples = jax.eval_shape(draw, sent, prompts, index)
        self.compiled["draw"] = self._compiled_draw(draw, sent, prompts, index)
        verdict = judge.pure(self.task.verifier) if self._pure else None
        said = None if self._pure else jax.eval_shape(no_verdict(self.task), prompts, samples)
        learn = asynchronous.make_learn(self.pieces, verdict, self._shown)
        self.compiled["learn"] = self._compiled(learn, state, prompts, samples, said, results=2)

    def _compiled_draw(self, draw: Callable[..., Any], sent: TrainState, prompts: Prompts, index: Any) -> Any:
        """The program that draws, for the sampler's devices."""
        mesh = self.sampler_mesh
        if mesh is None:
            return jax.jit(draw).lower(sent, prompts, index).compile()
        rows, shapes = meshes.rows_sharding(mesh), jax.tree.map(_shape, (sent, prompts, index))
        with jax.set_mesh(mesh):
            return jax.jit(draw, in_shardings=(shardings(sent, mesh), rows, meshes.whole(mesh)),
                           out_shardings=rows).lower(*shapes).compile()

    def ticks(self, state: TrainState, stream: Stream, *, done: int = 0, pending: Any = None) -> Iterator[Tick]:
        """Goes on from `done` steps to the end of the phase.

        Args:
          state: donated.
          pending: rollouts in flight when `state` was saved; None at the start of a phase.
        """
        scale, at = self.phase.scale, {"done": done, "pending": pending or ()}
        if scale.program == "one":
            yield from self._one(state, stream, done)
            return
        work, bound = self.work(state), {"staleness": self.ahead.staleness, **at}
        if self.ahead.order == EAGER:
            found = asynchronous.eager(work, state, stream, steps=scale.steps, **bound)
        else:
            found = asynchronous.fixed(work, state, stream, **bound,
                                       drawn_by=asynchronous.versions(scale.steps, self.ahead.staleness))
        with contextlib.closing(found):
            yield from (Tick(*one) for one in found)

    def _one(self, state: TrainState, stream: Stream, done: int) -> Iterator[Tick]:
        per_call = self.phase.scale.steps_per_call
        while done < self.phase.scale.steps:
            prompts = self.place(batches(stream, per_call))
            program = self.prepare(state, prompts)["step"]
            state, metrics, experience = program(state, prompts)
            done += per_call
            yield Tick(done, state, metrics, experience, stream.state(), None)

    def work(self, state: TrainState) -> asynchronous.Work:
        """What is done with a batch where drawing and learning are two programs.

        Args:
          state: the first one.
        """
        programs = self.prepare(state, self.asked())
        sampler, apart = self.sampler_mesh, self.ahead.sampler is not None

        def send(state: TrainState) -> TrainState:
            sent = asynchronous.drawing(state)
            return jax.device_put(sent, shardings(sent, sampler)) if apart else sent

        def draw(sent: TrainState, prompts: Prompts, index: int) -> asynchronous.Drawn:
            prompts = jax.device_put(prompts, meshes.rows_sharding(sampler)) if apart else self.place(prompts)
            index = np.int32(index)
            index = jax.device_put(index) if sampler is None else jax.device_put(index, meshes.whole(sampler))
            return prompts, programs["draw"](sent, prompts, index)

        def score(prompts: Prompts, samples: Samples) -> Verdict | None:
            if self._pure:
                return None
            return judge.score_on_host(self.task, "train", self.workers, *judge.rows_of(prompts, samples))

        def learn(state: TrainState, *batch: Any) -> tuple[TrainState, dict[str, Array], Experience]:
            return programs["learn"](state, *(jax.device_put(batch) if self.mesh is None else
                                              jax.device_put(batch, meshes.rows_sharding(self.mesh))))

        return asynchronous.Work(send=send, draw=draw, score=score, learn=learn)


def shardings(state: Any, mesh: Mesh) -> Any:
    """Where the parts of a state lie on a mesh: weights and their moments cut as `models.sharding` says, the rest whole on
    every device."""
    def of(path: tuple, leaf: Any) -> NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        of_weights = path[0] in WEIGHTS and leaf.ndim > 0
        return sharding.of(tuple(names), leaf.shape, mesh) if of_weights else meshes.whole(mesh)

    return jax.tree_util.tree_map_with_path(of, state)


def _shape(a: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype)


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
