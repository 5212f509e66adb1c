"""Drawing ahead of learning, by at most so many versions of the weights: two orders of work over the same programs.

A version of the weights is the number of updates that made it. Batch b is learned from by version b; it may be drawn by
any version from b - k to b, k the staleness, and its samples carry that version. In the fixed order it is drawn by
version max(0, b - k), so a run repeats to the last bit; in the eager order a thread draws it by the newest version there
is, so its age depends on the clock, and an eager run is repeated by giving the fixed order its versions.
"""
import collections
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from rl_jax.learner import step
from rl_jax.tasks.stream import Stream
from rl_jax.types import Experience, Prompts, Samples, TrainState, Verdict

DRAW, LEARN = "draw", "learn"
Drawn = tuple[Prompts, Samples]
# the fields of `loop.Tick`, in their order
Ticked = tuple[int, TrainState, dict[str, Any], Experience, dict[str, Any], tuple[Drawn, ...] | None]


@dataclasses.dataclass(frozen=True)
class Event:
    """One dispatch of a fixed order: a batch is drawn or learned from, by one version of the weights."""

    kind: str
    batch: int
    version: int


@dataclasses.dataclass(frozen=True)
class Work:
    """What is done with a batch, on whichever devices; nothing here is compiled twice.

    Attributes:
      send: state -> what draws of it, on the sampler's devices.
      draw: (sent, prompts, batch) -> (prompts, samples) on the sampler's devices.
      score: (prompts, samples) -> a host verifier's verdict, waiting for it; None of a pure one.
      learn: (state, prompts, samples, verdict) -> (state, metrics, experience); donates the state.
    """

    send: Callable[[TrainState], TrainState]
    draw: Callable[[TrainState, Prompts, int], Drawn]
    score: Callable[[Prompts, Samples], Verdict | None]
    learn: Callable[[TrainState, Prompts, Samples, Verdict | None], tuple[TrainState, dict[str, Any], Experience]]


def versions(steps: int, staleness: int) -> list[int]:
    """The version that draws each batch in the fixed order, max(0, b - k)."""
    return [max(0, batch - staleness) for batch in range(steps)]


def order(drawn_by: Sequence[int], *, done: int = 0, in_flight: int = 0) -> Iterator[Event]:
    """Every batch drawn as soon as its version is there, and before that version is learned away.

    Args:
      drawn_by: the version that draws each batch, not falling, none newer than the batch's own number.
      done: batches that were learned from before.
      in_flight: batches that were drawn and not learned from before.

    Raises:
      ValueError: if a batch would have to be drawn by a version that is not there yet, or is gone.
    """
    falls = any(late < early for early, late in zip(drawn_by, drawn_by[1:], strict=False))
    if falls or any(not 0 <= version <= batch for batch, version in enumerate(drawn_by)):
        raise ValueError(f"versions {list(drawn_by)}: they must not fall, and version v first exists when batch v - 1 was "
                         "learned from, so batch b can be drawn by versions 0 to b.")
    waiting = collections.deque(range(done + in_flight, len(drawn_by)))
    for version in range(done, len(drawn_by)):
        while waiting and drawn_by[waiting[0]] <= version:
            yield Event(DRAW, waiting.popleft(), version)
        yield Event(LEARN, version, version)


def check_age(samples: Samples, batch: int, staleness: int) -> None:
    """Refuses a batch that weights too old, or not of its past, have drawn; waits for it.

    Raises:
      ValueError: naming the batch, its version and the bound.
    """
    drawn_by = np.asarray(samples.version)
    if drawn_by.min() < batch - staleness or drawn_by.max() > batch:
        raise ValueError(f"batch {batch} holds samples of versions {drawn_by.min()} to {drawn_by.max()} of the weights and "
                         f"would be learned from by version {batch}: asynchronous.staleness={staleness} allows versions "
                         f"{max(0, batch - staleness)} to {batch}.")


def fixed(work: Work, state: TrainState, stream: Stream, *, drawn_by: Sequence[int], staleness: int, done: int = 0,
          pending: Sequence[Drawn] = ()) -> Iterator[Ticked]:
    """Ticks in the fixed order. Dispatches follow `order`, whatever the clock says; the devices work side by side.

    Args:
      state: donated.
      drawn_by: see `order`.
      staleness: k, the most that a batch may be older than what learns from it.
      pending: batches in flight when `state` was saved, oldest first.
    """
    queue, sent = collections.deque(pending), {}
    for event in order(drawn_by, done=done, in_flight=len(pending)):
        if event.kind == DRAW:
            if event.version not in sent:
                sent = {event.version: work.send(state)}
            queue.append(work.draw(sent[event.version], next(stream), event.batch))
            continue
        sent = {}  # on shared devices it is the state, which is donated now
        prompts, samples = queue.popleft()
        check_age(samples, event.batch, staleness)
        state, metrics, experience = work.learn(state, prompts, samples, work.score(prompts, samples))
        yield event.batch + 1, state, metrics, experience, stream.state(), tuple(queue) or None


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch on its way to the learner, and the stream's state behind it."""

    prompts: Prompts
    samples: Samples
    verdict: Verdict | None
    data: dict[str, Any]


class Exchange:
    """Where the sampler's thread and the learner meet: batches one way, weights the other.

    Programs are dispatched while `moved` is held: no state is donated between the choice of it and the draw, and devices
    that both share see one order of programs.
    """

    def __init__(self, weights: TrainState, version: int, waiting: Sequence[Batch]):
        """Opens with the weights of a version and the batches that are waiting."""
        self.moved = threading.Condition()
        self.weights, self.version, self.batches = weights, version, collections.deque(waiting)
        self.error: BaseException | None = None
        self.closed = False

    def sample(self, work: Work, stream: Stream, numbers: range, staleness: int) -> None:
        """Draws and scores batches of these numbers, each as soon as its weights are allowed to be there; never raises."""
        try:
            for number in numbers:
                prompts, data = next(stream), stream.state()
                with self.moved:
                    self.moved.wait_for(lambda number=number: self.closed or self.version >= number - staleness)
                    if self.closed:
                        return
                    drawn = work.draw(self.weights, prompts, number)
                # waits: the next batch shall be drawn by the weights that are the newest then
                jax.block_until_ready(drawn)
                batch = Batch(*drawn, work.score(*drawn), data)
                with self.moved:
                    self.batches.append(batch)
                    self.moved.notify_all()
        except BaseException as error:  # the learner raises it
            with self.moved:
                self.error = error
                self.moved.notify_all()

    def take(self) -> Batch:
        """The oldest batch; waits for it, and raises what the sampler's thread could not."""
        with self.moved:
            self.moved.wait_for(lambda: self.batches or self.error is not None)
            if not self.batches:
                raise self.error
            return self.batches.popleft()

    def close(self) -> None:
        """Lets the sampler's thread end instead of drawing another batch."""
        with self.moved:
            self.closed = True
            self.moved.notify_all()


def eager(work: Work, state: TrainState, stream: Stream, *, steps: int, staleness: int, done: int = 0,
          pending: Sequence[Drawn] = ()) -> Iterator[Ticked]:
    """Ticks in the eager order: a thread draws while this one learns; it waits where it would draw too old a batch.

    At most k + 1 batches are in flight. One that is being drawn when a tick is made is not among its pending ones, and
    its stream's state is that before it: a run that continues there draws it anew.

    Args:
      state: donated.
      staleness: k, the most that a batch may be older than what learns from it.
      pending: batches in flight when `state` was saved, oldest first.
    """
    data = stream.state()
    waiting = [Batch(*drawn, work.score(*drawn), data) for drawn in pending]
    exchange = Exchange(work.send(state), done, waiting)
    numbers = range(done + len(waiting), steps)
    thread = threading.Thread(target=exchange.sample, args=(work, stream, numbers, staleness), name="sampler", daemon=True)
    thread.start()
    try:
        for number in range(done, steps):
            batch = exchange.take()
            check_age(batch.samples, number, staleness)
            with exchange.moved:
                state, metrics, experience = work.learn(state, batch.prompts, batch.samples, batch.verdict)
                exchange.weights, exchange.version = work.send(state), number + 1
                exchange.moved.notify_all()
                waiting = tuple(exchange.batches)
            data = waiting[-1].data if waiting else batch.data
            yield (number + 1, state, metrics, experience, data,
                   tuple((one.prompts, one.samples) for one in waiting) or None)
    finally:
        exchange.close()
        thread.join()


def make_learn(pieces: step.Pieces, verdict: Callable[[Prompts, Samples], Verdict] | None,
               shown_groups: int | None = None) -> Callable[..., tuple[TrainState, dict[str, Any], Experience]]:
    """learn(state, prompts, samples, said) -> (state, metrics, experience), the age of the samples among the metrics.

    Args:
      verdict: a pure verifier's, for where `said` is None.
      shown_groups: see `step.make_learn`.
    """
    learn_from = step.make_learn(pieces, shown_groups)

    def learn(state: TrainState, prompts: Prompts, samples: Samples, said: Verdict | None):
        said = verdict(prompts, samples) if said is None else said
        age = (state.step - samples.version).astype(np.float32).mean()
        state, metrics, x = learn_from(state, prompts, samples, said)
        return state, {**metrics, "rollout/age_steps": age}, x

    return learn


def drawing(state: TrainState) -> TrainState:
    """What draws of a state: the policy, the key, the control and the version."""
    kept = {"policy": state.frozen["policy"]} if "policy" in state.frozen else {}
    return dataclasses.replace(state, parameters={"policy": state.parameters["policy"]}, optimiser=None, frozen=kept,
                               carried={})
