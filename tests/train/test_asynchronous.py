"""Drawing ahead: no batch older than allowed, the synchronous run where none is, repeatable orders, batches in flight."""
import collections
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.ahead import Asynchronous
from rl_jax.experiment import Phase, Scale
from rl_jax.learner.optimiser import Optimiser
from rl_jax.recipes.baselines import grpo
from rl_jax.tasks.toys import addmod
from rl_jax.train import asynchronous
from rl_jax.train.loop import PhaseLoop
from tests.ends import tiny as ends
from tests.ends.conftest import cache_directory, compiled_once  # noqa: F401  (fixtures)
from tests.learner import tiny

TASK = addmod.addmod(4, validation_size=0, held_out_size=0)
STEPS = 7
KEY = jax.random.key(3)


def loop_of(task=TASK, *, workers=None, **ahead):
    phase = Phase(grpo.grpo(4), Optimiser(learning_rate=1e-2),
                  Scale(steps=STEPS, prompts_per_step=4, program="async"))
    return PhaseLoop(phase, task, tiny.network(task), workers=workers, ahead=Asynchronous(**ahead))


@pytest.fixture(scope="module")
def one():
    return loop_of()


@pytest.fixture(scope="module")
def work(one):
    """Its programs, compiled once for all tests here: how far ahead they are used is not compiled in."""
    return one.work(one.initial_state(KEY))


def fixed(one, work, staleness, **options):
    return asynchronous.fixed(work, one.initial_state(KEY), one.stream(0), staleness=staleness,
                              **{"drawn_by": asynchronous.versions(STEPS, staleness)} | options)


def eager(one, work, staleness):
    return asynchronous.eager(work, one.initial_state(KEY), one.stream(0), steps=STEPS, staleness=staleness)


def told(ticks, between=lambda done: None):
    """Of each tick: version of the samples, prompts, tokens, metrics, batches in flight; and the bits of the last state.

    What is done between ticks delays the learner.
    """
    found, state = [], None
    for done, state, metrics, x, _, pending in ticks:
        assert int(state.step) == done == len(found) + 1
        version = set(np.asarray(x.version).tolist())
        assert len(version) == 1
        found.append((version.pop(), np.asarray(x.prompts.example).tolist(), ends.bits(x.tokens),
                      {name: float(value) for name, value in metrics.items()}, len(pending or ())))
        between(done)
    assert len(found) == STEPS
    return found, ends.bits(state)


class Watched:
    """Work of which is known how many batches the sampler has drawn and scored."""

    def __init__(self, work):
        self.drawn, self._score = 0, work.score
        self.work = dataclasses.replace(work, score=self.score)

    def score(self, *drawn):
        self.drawn += 1
        return self._score(*drawn)

    def until(self, count):
        """Waits until so many are, or all; a moment longer, for one more than are allowed."""
        limit = time.monotonic() + 60
        while self.drawn < min(count, STEPS) and time.monotonic() < limit:
            time.sleep(0.001)
        time.sleep(0.02)


def slow_sampler(work, seconds=0.05):
    def score(*drawn):
        time.sleep(seconds)
        return work.score(*drawn)

    return dataclasses.replace(work, score=score)


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize(("done", "in_flight"), [(0, 0), (3, None)])
def test_the_fixed_order_is_what_it_is_said_to_be(staleness, done, in_flight):
    in_flight = staleness if in_flight is None else in_flight
    version, waiting, learned = done, collections.deque(range(done, done + in_flight)), []
    for event in asynchronous.order(asynchronous.versions(9, staleness), done=done, in_flight=in_flight):
        assert event.version == version, "only the weights that there are"
        if event.kind == asynchronous.DRAW:
            assert event.version == max(0, event.batch - staleness)
            waiting.append(event.batch)
            assert len(waiting) <= staleness + 1
        else:
            assert event.kind == asynchronous.LEARN and event.batch == waiting.popleft() == version
            learned.append(event.batch)
            version += 1
    assert learned == [*range(done, 9)] and not waiting


@pytest.mark.parametrize("drawn_by", [[0, 2], [0, 1, 0], [-1, 0]])
def test_an_order_that_cannot_be_is_refused(drawn_by):
    with pytest.raises(ValueError, match="must not fall.*batch b can be drawn by versions 0 to b"):
        list(asynchronous.order(drawn_by))


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_in_the_fixed_order_samples_are_exactly_so_old(one, work, staleness):
    found, _ = told(fixed(one, work, staleness))
    for batch, (version, _, _, metrics, in_flight) in enumerate(found):
        assert batch - version == metrics["rollout/age_steps"] == min(batch, staleness)
        assert in_flight == min(staleness, STEPS - batch - 1)
    assert sum(metrics["gradient/norm"] > 1e-3 for *_, metrics, _ in found) >= 3, "there is something to learn"


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("late", ["sampler", "learner"])
def test_in_the_eager_order_no_sample_is_older(one, work, staleness, late):
    """Whichever of the two is the slower."""
    if late == "sampler":
        found, _ = told(eager(one, slow_sampler(work), staleness))
    else:
        watched = Watched(work)
        found, _ = told(eager(one, watched.work, staleness), lambda done: watched.until(done + staleness + 1))
    ages = [batch - version for batch, (version, *_) in enumerate(found)]
    assert all(0 <= age <= staleness for age in ages)
    assert ages == [metrics["rollout/age_steps"] for *_, metrics, _ in found]
    assert max(in_flight for *_, in_flight in found) <= staleness + 1
    if late == "learner":
        assert max(ages) == staleness, "it is drawn ahead of, as far as it may be"
    assert [prompts for _, prompts, *_ in found] == [prompts for _, prompts, *_ in told(fixed(one, work, 0))[0]]


@pytest.mark.parametrize("order", ["fixed", "eager"])
@pytest.mark.parametrize(("version", "allowed"), [(0, "versions 2 to 3"), (4, "versions 2 to 3")])
def test_a_batch_that_is_too_old_is_refused(one, work, order, version, allowed):
    """Or one that weights of another run have drawn; nothing is learned from it."""
    ticks = fixed(one, work, 1)
    *_, (done, state, _, _, _, pending) = itertools.islice(ticks, 3)
    (prompts, samples), = pending
    wrong = (prompts, dataclasses.replace(samples, version=jnp.full_like(samples.version, version)))
    options = {"staleness": 1, "done": done, "pending": (wrong,)}
    more = {"fixed": {"drawn_by": asynchronous.versions(STEPS, 1)}, "eager": {"steps": STEPS}}[order]
    run = {"fixed": asynchronous.fixed, "eager": asynchronous.eager}[order]
    with pytest.raises(ValueError, match=rf"batch 3 holds samples of versions {version} to {version} .*staleness=1 allows {allowed}"):
        next(run(work, state, one.stream(0), **options, **more))
    assert not any(a.is_deleted() for a in jax.tree.leaves(state)), "it was not given away"


def test_with_no_staleness_the_eager_order_is_the_fixed_one(one, work):
    assert told(fixed(one, work, 0)) == told(eager(one, work, 0))


def test_with_no_staleness_it_learns_what_one_program_does(one, work):
    """The same tokens; numbers but for rounding, as two programs are not fused as one is (to the last bit: further down)."""
    phase = dataclasses.replace(one.phase, scale=dataclasses.replace(one.phase.scale, program="one"))
    synchronous = PhaseLoop(phase, TASK, one.network)
    ticks = list(synchronous.ticks(synchronous.initial_state(KEY), synchronous.stream(0)))
    for tick, (_, _, tokens, metrics, _) in zip(ticks, told(fixed(one, work, 0))[0], strict=True):
        assert tokens == ends.bits(tick.experience.tokens) and metrics.pop("rollout/age_steps") == 0
        assert metrics == pytest.approx({name: float(value) for name, value in tick.metrics.items()}, rel=1e-4, abs=1e-5)


def test_the_fixed_order_repeats_to_the_last_bit(one, work):
    first, again = told(fixed(one, work, 2)), told(fixed(one, slow_sampler(work, 0.02), 2))
    assert first == again
    assert first[1] != told(fixed(one, work, 0))[1], "which staleness changes"


def test_an_eager_run_is_repeated_by_its_versions(one, work):
    """Its rhythm changes midway, so that its ages do."""
    watched = Watched(slow_sampler(work, 0.03))
    found, state = told(eager(one, watched.work, 2), lambda done: watched.until(done + 3 if 2 <= done <= 3 else 0))
    versions = [version for version, *_ in found]
    assert len({batch - version for batch, version in enumerate(versions)}) > 1
    again, same = told(fixed(one, work, 2, drawn_by=versions))
    assert same == state
    assert [one[:4] for one in again] == [one[:4] for one in found]


def test_continued_with_batches_in_flight_is_as_if_never_stopped(one, work):
    whole, state = told(fixed(one, work, 2))
    ticks = fixed(one, work, 2)
    *_, (done, reached, _, _, data, pending) = itertools.islice(ticks, 3)
    assert len(pending) == 2
    stream = one.stream(0)
    stream.restore(data)
    *_, (_, last, *_) = asynchronous.fixed(work, reached, stream, drawn_by=asynchronous.versions(STEPS, 2), staleness=2,
                                           done=done, pending=pending)
    assert ends.bits(last) == state


def test_an_eager_run_continues_with_what_is_in_its_queue(one, work):
    """Every prompt is learned from once, in the order of the stream, and the queue's samples are those that were drawn."""
    watched = Watched(work)
    ticks = eager(one, watched.work, 2)
    next(ticks), next(ticks)
    watched.until(5)
    done, reached, _, _, data, pending = next(ticks)
    ticks.close()
    assert done == 3 and len(pending) == 2
    stream = one.stream(0)
    stream.restore(data)
    rest = list(asynchronous.eager(work, reached, stream, steps=STEPS, staleness=2, done=done, pending=pending))
    expected = [prompts for _, prompts, *_ in told(fixed(one, work, 0))[0]]
    assert [np.asarray(x.prompts.example).tolist() for _, _, _, x, *_ in rest] == expected[done:]
    for (_, samples), (_, _, _, x, *_) in zip(pending, rest, strict=False):
        assert ends.bits(x.tokens) == ends.bits(samples.tokens) and ends.bits(x.version) == ends.bits(samples.version)


def samplers():
    return [thread for thread in threading.enumerate() if thread.name == "sampler"]


def test_the_sampler_ends_with_the_run(one, work):
    ticks = eager(one, work, 1)
    next(ticks)
    assert len(samplers()) == 1
    ticks.close()
    assert not samplers()


def test_a_fault_of_the_sampler_is_the_learner_s(one, work):
    calls = itertools.count()

    def draw(*args):
        if next(calls) == 2:
            raise MemoryError("no room for the cache")
        return work.draw(*args)

    reached = 0
    with pytest.raises(MemoryError, match="no room"):
        for reached, *_ in eager(one, dataclasses.replace(work, draw=draw), 1):
            pass
    assert reached == 2 and not samplers(), "what was drawn before is learned from"


@pytest.mark.parametrize("order", ["fixed", "eager"])
def test_a_host_verifier_scores_beside_the_learner(order):
    """In the sampler's thread where there is one; every answer once."""
    threads = set()

    def score(fields, text):
        threads.add(threading.current_thread().name)
        return float(len(text))

    workers = tiny.InProcess(score)
    one = loop_of(tiny.on_host(TASK), workers=workers, staleness=1, order=order)
    ticks = list(one.ticks(one.initial_state(KEY), one.stream(0)))
    assert [tick.done for tick in ticks] == [*range(1, STEPS + 1)] and sorted(one.compiled) == ["draw", "learn"]
    assert len(workers.calls) == STEPS and threads == {"sampler" if order == "eager" else "MainThread"}
    for texts, tick in zip(workers.calls, ticks, strict=True):
        np.testing.assert_array_equal(np.asarray(tick.experience.score), [len(text) for text in texts])
        assert float(tick.metrics["reward/failed"]) == 0


def whole_run(directory, order, stop=None):
    config = ends.config("toys.addmod", "baselines.grpo", recipe_args={"group_size": 4}, task_args={"modulus": 7},
                         steps=6, program="async")
    with config.unlocked():
        config.asynchronous = {"staleness": 2, "order": order}
    if stop is not None:
        with ends.stopped_after(stop):
            stopped, _ = ends.train(directory, config)
        assert stopped.interrupted and stopped.step < 6
        assert (stopped.checkpoint / "pending").is_dir()
    finished, _ = ends.train(directory, config)
    assert finished.step == 6
    return ends.left_behind(directory), ends.bits(finished.policy)


@pytest.mark.slow
def test_a_run_stopped_with_batches_in_flight_continues_to_the_last_bit(tmp_path):
    assert whole_run(tmp_path / "stopped", "fixed", stop=2) == whole_run(tmp_path / "whole", "fixed")


@pytest.mark.slow
def test_an_eager_run_is_stopped_and_continued(tmp_path):
    (rows, _), _ = whole_run(tmp_path / "stopped", "eager", stop=2)
    assert [row["step"] for row in rows] == [*range(1, 7)]
    assert all(0 <= row["rollout/age_steps"] <= 2 for row in rows)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, cache_directory):  # noqa: F811  (the fixture)
    """What a process with four devices has found."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache_directory),
                   **{option.upper(): str(value) for option, value in ends.CACHE_OPTIONS.items()}}
    done = subprocess.run([sys.executable, "-m", "tests.train.asynchronous_on_devices", tmp_path_factory.mktemp("runs")],
                          cwd=ends.ROOT, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("order", ["fixed", "eager"])
def test_without_staleness_it_is_the_synchronous_run(elsewhere, order):
    """program="one", bit for bit: tokens, metrics, weights, optimiser."""
    assert elsewhere["one"] == {"has no age": True, "learns": True}
    assert elsewhere[f"{order} 0"] == {"rows": True, "state": True}


@pytest.mark.slow
def test_devices_of_its_own_change_nothing(elsewhere):
    """A sampler and a learner on one device each give the bits of one device; two and two the same tokens, numbers within rounding."""
    assert elsewhere["1 + 1"] == {"learner": [1], "rows": True, "state": True}
    apart = elsewhere["2 + 2"]
    assert apart["learner"] == [2, 3] and apart["tokens"]
    assert apart["furthest"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("order", ["fixed", "eager"])
def test_a_run_on_devices_of_its_own_is_stopped_and_continued(elsewhere, order):
    assert elsewhere[f"continued {order}"]
