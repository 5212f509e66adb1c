"""Dynamic sampling on scripted scores: which groups are kept, where they land, what is counted."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.learner import collect
from rl_jax.recipe import Recipe, Rollout
from rl_jax.selection import outcome
from rl_jax.types import Samples, Verdict
from tests.recipes import toy

G, T, P, WAVES = 2, 3, 2, 3
RIGHT, WRONG, MIXED = (1.0, 1.0), (0.0, 0.0), (0.0, 1.0)
ASKED = []


def recipe(waves=WAVES):
    return Recipe(rollout=Rollout(G, resample=waves - 1), selection=lambda x: outcome.mixed(x.score, x.group),
                  loss=lambda policy, x: policy.logp, weighting=lambda x: x.mask)


def draw(parameters, prompts, uniforms, version, coefficient=None):
    """Every token is the number of its prompt, every log-probability the random number it was drawn with."""
    jax.debug.callback(lambda e: ASKED.append(e.tolist()), prompts.example)
    rows = prompts.lengths.shape[0] * G
    number = jnp.repeat(prompts.example, G)
    shape = (rows, T)
    return Samples(tokens=jnp.broadcast_to(number[:, None], shape), mask=jnp.ones(shape, bool),
                   rollout_logp=uniforms.reshape(shape), rollout_entropy=jnp.zeros(shape),
                   finished=jnp.ones(rows, bool), version=jnp.full(rows, version))


def run(scores, failed=(), waves=WAVES):
    """What comes of groups with these scores, in the order they are asked."""
    table = jnp.asarray(scores, jnp.float32)
    flags = jnp.asarray([i in failed for i in range(len(scores))])

    def judge(prompts, samples):
        return Verdict(score=table[prompts.example].reshape(-1), parts={"twice": 2 * table[prompts.example].reshape(-1)},
                       failed=jnp.repeat(flags[prompts.example], G))

    ASKED.clear()
    uniforms = jnp.arange(len(scores) * G * T, dtype=jnp.float32).reshape(-1, G, T)
    found = jax.jit(collect.make_collect(recipe(waves), draw, judge))(None, toy.prompts(len(scores)), uniforms, jnp.int32(4))
    jax.block_until_ready(found)
    jax.effects_barrier()
    return found


@pytest.mark.parametrize(("scores", "kept", "waves", "discarded"), [
    ([MIXED, MIXED, WRONG, WRONG, WRONG, WRONG], [0, 1], 1, 0),
    ([RIGHT, MIXED, MIXED, WRONG, MIXED, MIXED], [1, 2], 2, 2),
    ([WRONG, MIXED, MIXED, MIXED, WRONG, WRONG], [1, 2], 2, 2),  # the third good one finds no room
    ([WRONG, RIGHT, RIGHT, WRONG, MIXED, MIXED], [4, 5], 3, 4),
    ([WRONG, RIGHT, RIGHT, WRONG, WRONG, MIXED], [5], 3, 5),  # the budget ends before the batch is full
    ([WRONG] * 6, [], 3, 6)])
def test_groups_that_agree_are_replaced_within_the_budget(scores, kept, waves, discarded):
    prompts, samples, verdict, metrics = run(scores)
    filled = len(kept)
    np.testing.assert_array_equal(prompts.example[:filled], kept)
    np.testing.assert_array_equal(samples.tokens[:filled * G, 0], np.repeat(kept, G))
    np.testing.assert_array_equal(samples.rollout_logp[:filled * G].reshape(-1),
                                  [k * G * T + i for k in kept for i in range(G * T)])
    np.testing.assert_array_equal(verdict.score[:filled * G], np.tile(MIXED, filled))
    np.testing.assert_array_equal(verdict.parts["twice"], 2 * verdict.score)
    np.testing.assert_array_equal(samples.version[:filled * G], 4)
    assert not samples.mask[filled * G:].any() and samples.mask[:filled * G].all()
    assert ASKED == [[2 * w, 2 * w + 1] for w in range(waves)]  # no wave is asked that is not needed
    assert (metrics["rollout/waves"], metrics["rollout/groups_discarded"]) == (waves, discarded)
    assert metrics["reward/score"] == pytest.approx(np.mean(scores[:waves * P]))


def test_what_failed_is_not_kept_and_is_counted_over_all_waves():
    scores = [MIXED, MIXED, MIXED, WRONG, MIXED, MIXED]
    prompts, samples, _, metrics = run(scores, failed=(0, 2))
    np.testing.assert_array_equal(prompts.example, [1, 4])
    assert metrics["reward/failed"] == 2 * G and metrics["rollout/waves"] == 3


def test_without_a_budget_there_is_one_wave_and_selection_is_left_to_the_learner():
    prompts, samples, verdict, metrics = run([WRONG, MIXED], waves=1)
    np.testing.assert_array_equal(prompts.example, [0, 1])
    assert samples.mask.all() and "rollout/waves" not in metrics
    np.testing.assert_array_equal(verdict.score, [0, 0, 0, 1])


def test_replicas_wait_for_each_other_and_keep_their_own_groups():
    scores = jnp.array([[MIXED, MIXED, WRONG, WRONG, MIXED, WRONG], [RIGHT, WRONG, WRONG, MIXED, MIXED, MIXED]])

    def one(scores):
        def judge(prompts, samples):
            return Verdict(score=scores[prompts.example].reshape(-1), parts={}, failed=jnp.zeros(P * G, bool))

        ask = collect.make_collect(recipe(), draw, judge, axis="seed")
        return ask(None, toy.prompts(P * WAVES), jnp.zeros((P * WAVES, G, T)), jnp.int32(0))

    prompts, samples, _, metrics = jax.jit(jax.vmap(one, axis_name="seed"))(scores)
    np.testing.assert_array_equal(prompts.example, [[0, 1], [3, 4]])
    assert samples.mask.all()
    np.testing.assert_array_equal(metrics["rollout/waves"], 3)
    np.testing.assert_array_equal(metrics["rollout/groups_discarded"], 4)


def test_a_budget_without_a_selection_is_refused():
    with pytest.raises(ValueError, match="resample=2 replaces the groups that the selection slot rejects"):
        dataclasses.replace(recipe(), selection=None)


def test_a_slot_that_needs_another_model_cannot_replace_groups():
    reading = dataclasses.replace(recipe(), models=("reference",), reward=lambda x: x.reference_logp.sum(axis=1))
    x = dataclasses.replace(toy.experience(recipe()), given={})
    with pytest.raises(ValueError, match="resample=0"):
        collect.group_kept(reading, x, 2)
