"""Rollouts of earlier steps: learned from again, with the versions that drew them, and saved with everything else."""
import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console

from rl_jax import experiment, sections
from rl_jax.learner import assemble, carry, step
from rl_jax.loss import gate, ratio
from rl_jax.recipe import Recipe, Rollout, replace
from rl_jax.recipes.rollout import t_ppo
from rl_jax.tasks.toys import addmod, chain
from rl_jax.train import metrics, session
from rl_jax.types import Samples, Verdict
from rl_jax.weighting import aggregate
from tests.ends import tiny as ends
from tests.ends.conftest import cache_directory, compiled_once  # noqa: F401  (fixtures)
from tests.learner import tiny
from tests.recipes import toy

P, G, T, COUNT = 4, 2, 3, 2
TASK = addmod.addmod(4, validation_size=0, held_out_size=0)
OPTIMISER = optax.adam(1e-2)


def recipe(replay=COUNT, **rollout):
    def loss(policy, x):
        return gate.ppo_clip(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, 0.2, 0.2)

    return Recipe(rollout=Rollout(G, replay=replay, **rollout), advantage=lambda x: x.reward - 0.3, loss=loss,
                  weighting=lambda x: aggregate.token_mean(x.mask), name="again")


# The record


def drawn(number):
    """A batch in which every number is its own."""
    shape, value = (2 * G, T), jnp.full((2 * G, T), float(number))
    samples = Samples(tokens=value.astype(int), mask=jnp.ones(shape, bool), rollout_logp=value, rollout_entropy=value,
                      finished=jnp.ones(2 * G, bool), version=jnp.full(2 * G, number))
    verdict = Verdict(score=value[:, 0], parts={"steps": value[:, 1]}, failed=jnp.zeros(2 * G, bool))
    return toy.prompts(2), samples, verdict


def test_the_newest_batch_comes_first_and_the_oldest_is_forgotten():
    earlier = carry.empty(drawn(0), COUNT)
    for number in (1, 2, 3):
        earlier = carry.pushed(drawn(number), earlier)
    prompts, samples, verdict = carry.joined(drawn(4), earlier)
    expected = np.repeat([4, 3, 2], 2 * G)
    for values in (samples.tokens[:, 0], samples.rollout_logp[:, 1], samples.version, verdict.score,
                   verdict.parts["steps"]):
        np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(prompts.example, [0, 1] * 3)
    np.testing.assert_array_equal(prompts.facts["answer"], [0, 1] * 3)
    np.testing.assert_array_equal(samples.fresh, (expected == 4)[:, None] & samples.mask)
    assert not verdict.failed.any()


def test_empty_places_have_no_tokens_and_no_group():
    prompts, samples, verdict = carry.joined(drawn(1), carry.empty(drawn(0), COUNT))
    x = assemble.experience(prompts, samples, verdict)
    empty = np.repeat([False, True, True], 2 * G)
    np.testing.assert_array_equal(x.mask.any(axis=1), ~empty)
    np.testing.assert_array_equal(x.failed, empty)
    assert len(set(np.asarray(x.group)[empty])) == empty.sum() and (prompts.lengths >= 1).all()


# In the step


@functools.cache
def program(replay=COUNT):
    pieces = tiny.pieces(recipe(replay), TASK, OPTIMISER)
    return pieces, jax.jit(step.composed(pieces))


def start(replay=COUNT, seed=0):
    pieces, _ = program(replay)
    return step.initial_state(recipe(replay), tiny.network(TASK), OPTIMISER, jax.random.key(seed),
                              carried=pieces.carried(tiny.prompts(TASK, P)))


def batches(count):
    return [tiny.prompts(TASK, P, first=P * k) for k in range(count)]


@pytest.fixture(scope="module")
def replayed():
    """(state before, metrics, experience) of four steps."""
    state, found = start(), []
    for prompts in batches(4):
        before = state
        state, *rest = program()[1](state, prompts)
        found.append((before, *rest))
    return found


def test_the_batch_of_a_step_holds_those_of_the_steps_before(replayed):
    """Tokens, log-probabilities and scores as they were drawn, with the version of the weights that drew them."""
    rows = P * G
    fresh = [jax.tree.map(lambda a: np.asarray(a)[:rows], dataclasses.replace(x, prompts=None, coefficients=None))
             for _, _, x in replayed]
    for k, (_, metrics, x) in enumerate(replayed):
        for age in range(COUNT + 1):
            part = slice(age * rows, (age + 1) * rows)
            if age > k:
                assert not np.asarray(x.mask)[part].any()
                continue
            for name in ("tokens", "mask", "rollout_logp", "score", "finished"):
                np.testing.assert_array_equal(np.asarray(vars(x)[name])[part], vars(fresh[k - age])[name])
            np.testing.assert_array_equal(x.version[part], k - age)
            np.testing.assert_array_equal(x.prompts.example[age * P:(age + 1) * P], P * (k - age) + np.arange(P))
        ages = np.repeat(np.arange(COUNT + 1), rows)[np.asarray(x.mask).any(axis=1)]
        assert float(metrics["rollout/age_steps"]) == pytest.approx(ages.mean())
        np.testing.assert_array_equal(x.fresh, np.asarray(x.mask) & (np.arange(len(x.mask)) < rows)[:, None])


def test_metrics_of_what_was_drawn_are_of_the_fresh_batch(replayed):
    for _, metrics, x in replayed:
        score, kept = np.asarray(x.score), np.asarray(x.mask).any(axis=1)
        assert float(metrics["reward/score"]) == pytest.approx(score[:P * G].mean())
        assert float(metrics["reward/mean"]) == pytest.approx(score[kept].mean())
        assert metrics["reward/failed"] == 0 and metrics["rollout/logp_gap_nats"] < 1e-5
    assert replayed[-1][1]["policy/ratio_max"] > 1.001, "what was drawn earlier has another probability now"


def test_empty_places_have_no_influence(replayed):
    """The first step is that of the same recipe without replay; the second one is not."""
    state, metrics, x = program(0)[1](start(0), batches(1)[0])
    found = replayed[1][0]
    tiny.same(found.parameters, state.parameters, rtol=1e-5, atol=1e-6)
    tiny.same(found.optimiser, state.optimiser, rtol=1e-5, atol=1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(replayed[0][1][name], value, rtol=1e-4, atol=1e-6)
    second = program(0)[1](state, batches(2)[1])[0]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), replayed[2][0].parameters, second.parameters)
    assert max(jax.tree.leaves(moved)) > 1e-3


def stacked(trees):
    return jax.tree.map(lambda *a: jnp.stack(a), *trees)


# Answers in windows and batches of earlier steps at once: everything that a recipe can carry. The reward is one that
# differs from the first step on.
BOTH = replace(t_ppo.t_ppo(), rollout=Rollout(1, window=2, replay=1), reward=lambda x: 0.5 * (x.tokens[:, 0] % 3))
CHAIN = chain.chain(4, 5, train_size=16, validation_size=0, held_out_size=0)


def test_steps_in_one_dispatch_and_replicas_are_single_steps():
    """Three steps per call for two replicas, twice: each replica is a run of its own, the carried state included."""
    pieces = tiny.pieces(BOTH, CHAIN, OPTIMISER)
    one = jax.jit(step.composed(pieces))
    side_by_side = tiny.pieces(BOTH, CHAIN, OPTIMISER, axis=step.SEED_AXIS)
    many = jax.jit(step.composed(side_by_side, steps_per_call=3, seeds=2))
    asked = [tiny.prompts(CHAIN, P, first=P * k) for k in range(6)]
    carried = pieces.carried(asked[0])
    tiny.same(side_by_side.carried(asked[0]), carried)
    states = [step.initial_state(BOTH, tiny.network(CHAIN), OPTIMISER, jax.random.key(seed), carried=carried)
              for seed in (9, 6)]
    found, tokens = stacked(states), []
    for k in range(2):
        found, _, x = many(found, stacked(asked[3 * k:3 * k + 3]))
        tokens.append(x.tokens)
    for r, state in enumerate(states):
        for k, prompts in enumerate(asked):
            state, _, x = one(state, prompts)
            np.testing.assert_array_equal(tokens[k // 3][r, k % 3], x.tokens)
        tiny.same(jax.tree.map(lambda a, r=r: a[r], found), state, rtol=1e-4, atol=1e-5)


# Whole runs


def run(workdir):
    """Six steps, two per call, of two replicas; from the newest checkpoint if there is one."""
    config = ends.config(steps=6, steps_per_call=2, seeds=2, run={"checkpoint_every": 2})
    parsed = experiment.parse(config)
    phase = dataclasses.replace(parsed.phases[0], recipe=BOTH)
    session.claim(workdir, sections.plain(config))
    console = rich.console.Console(file=io.StringIO())
    return session.Session(dataclasses.replace(parsed, task=CHAIN, phases=(phase,)), workdir, console=console).go()


def test_stopped_and_continued_is_as_if_never_stopped(tmp_path):
    """What is carried lies in the checkpoint: metrics, answers and weights are the same bits."""
    whole = run(tmp_path / "whole")
    with ends.stopped_after(1):
        stopped = run(tmp_path / "stopped")
    assert stopped.interrupted and 2 <= stopped.step < 6
    again = run(tmp_path / "stopped")
    assert whole.step == again.step == 6 and not again.interrupted
    assert ends.bits(again.policy) == ends.bits(whole.policy)
    assert ends.left_behind(tmp_path / "stopped") == ends.left_behind(tmp_path / "whole")
    rows = ends.left_behind(tmp_path / "whole")[0]
    for name in ("rollout/age_steps", "rollout/prompts_not_asked", "loss/policy", "loss/value"):
        assert all(np.isfinite(row[name]) for row in rows) and any(row[name] != 0 for row in rows)
    table = list(metrics.rows(tmp_path / "whole" / "rollouts.jsonl"))
    assert [row["step"] for row in table] == list(range(1, 7))
    assert table[0]["tokens"] <= 2, "half an answer is the tokens it has"
