"""How a recipe's answers come about inside the step: given among drawn ones, and growing by windows."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_jax.advantage import group
from rl_jax.learner import evaluate, step
from rl_jax.loss import gate, ratio
from rl_jax.recipe import Recipe, Rollout, replace
from rl_jax.recipes.rollout import t_ppo
from rl_jax.rollout import decode
from rl_jax.tasks.toys import addmod, chain
from rl_jax.types import Verdict
from rl_jax.weighting import aggregate
from tests.learner import tiny

P = 4
OPTIMISER = optax.adam(1e-2)


def states(pieces, recipe, task, optimiser, prompts, seed=0):
    return step.initial_state(recipe, tiny.network(task), optimiser, jax.random.key(seed),
                              carried=pieces.carried(prompts))


def drawn_at_once(task, rollout, state, prompts):
    """Whole answers of step 0, by the weights of a state."""
    ends = {"completion_length": task.completion_length, "stop_ids": task.tokenizer.stop_ids,
            "pad_id": task.tokenizer.pad_id}
    numbers = decode.make_uniforms(jax.random.fold_in(state.key, 0), P, rollout.group_size, task.completion_length)
    return jax.jit(decode.make_rollout(tiny.network(task), rollout, **ends))(
        state.parameters["policy"], prompts, numbers, jnp.int32(0))


# Given answers


TASK, G, COUNT = addmod.addmod(4, validation_size=0, held_out_size=0), 3, 2
NO_ANSWER = 1


def with_given(count=COUNT, **rollout):
    def loss(policy, x):
        return gate.ppo_clip(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, 0.2, 0.2)

    return Recipe(rollout=Rollout(G, given=count, **rollout), loss=loss,
                  advantage=lambda x: group.centred(x.reward, x.group),
                  weighting=lambda x: aggregate.token_mean(x.mask), models=("old",), name="with_given")


def asked():
    """Four prompts: one has no answer, and the answer of another is wrong."""
    prompts = tiny.prompts(TASK, P, need_answers=True)
    wrong = prompts.answer.at[2, 0].set((prompts.answer[2, 0] - 2 + 1) % 4 + 2)
    return dataclasses.replace(prompts, answer=wrong, answer_mask=prompts.answer_mask.at[NO_ANSWER].set(False))


@pytest.fixture(scope="module", params=[{}, {"top_k": 2, "temperature": 0.7}], ids=["plain", "truncated"])
def mixed_step(request):
    """A recipe with given answers, its weights, and what one step without learning gives back."""
    recipe = with_given(**request.param)
    pieces = tiny.pieces(recipe, TASK, tiny.recorder())
    state = tiny.state(recipe, TASK, tiny.recorder())
    return recipe, state, jax.jit(step.composed(pieces))(state, asked())


def given_rows():
    rows = np.arange(P * G)
    return (rows % G >= G - COUNT) & (rows // G != NO_ANSWER)


def test_the_last_rows_are_the_prompts_answers_and_the_score_is_the_verifiers(mixed_step):
    _, _, (_, metrics, x) = mixed_step
    prompts, given = asked(), given_rows()
    for row in np.flatnonzero(given):
        np.testing.assert_array_equal(x.tokens[row], prompts.answer[row // G])
        np.testing.assert_array_equal(x.mask[row], prompts.answer_mask[row // G])
    score, _ = addmod.score(jax.tree.map(lambda a: jnp.repeat(a, G, axis=0), prompts.facts), x.tokens, x.mask)
    np.testing.assert_array_equal(x.score, score)
    np.testing.assert_array_equal(np.asarray(x.score)[given], [1, 1, 0, 0, 1, 1])
    assert float(metrics["reward/score"]) == pytest.approx(np.asarray(x.score)[~given].mean()), "of the drawn ones"
    length = np.asarray(x.mask).sum(axis=1)[~given]
    assert float(metrics["rollout/length"]) == pytest.approx(length.mean())
    entropy = np.asarray(x.rollout_entropy)[~given][np.asarray(x.mask)[~given]]
    assert float(metrics["rollout/entropy"]) == pytest.approx(entropy.mean(), rel=1e-5)


def test_the_drawn_rows_are_those_of_a_rollout_without_given_answers(mixed_step):
    recipe, state, (_, _, x) = mixed_step
    drawn = drawn_at_once(TASK, dataclasses.replace(recipe.rollout, given=0), state, asked())
    kept = ~given_rows()
    for name in ("tokens", "mask", "rollout_logp", "rollout_entropy", "finished"):
        np.testing.assert_array_equal(np.asarray(vars(x)[name])[kept], np.asarray(vars(drawn)[name])[kept])


def test_given_answers_have_the_learners_own_log_probability_so_every_ratio_is_one(mixed_step):
    """At the temperature that samples, over the whole vocabulary: nothing is cut off from what nobody drew."""
    recipe, state, (_, metrics, x) = mixed_step
    given = given_rows()
    whole = jax.jit(evaluate.make_evaluate(tiny.network(TASK), recipe.rollout.temperature))
    prompts = jax.tree.map(lambda a: jnp.repeat(a, G, axis=0)[given], asked())
    rows = jax.tree.map(lambda a: a[given], dataclasses.replace(x, prompts=None, coefficients=None, support=None))
    expected = whole(state.parameters, dataclasses.replace(rows, prompts=prompts)).logp
    mask, found = np.asarray(rows.mask), np.asarray(rows.rollout_logp)
    np.testing.assert_allclose(found[mask], np.asarray(expected)[mask], rtol=1e-5, atol=1e-6)
    assert (found[mask] < 0).all()
    np.testing.assert_allclose([metrics["policy/ratio_max"], metrics["policy/ratio_min"]], 1.0, rtol=1e-5)
    assert metrics["rollout/logp_gap_nats"] < 1e-5 and metrics["gradient/norm"] > 0


def test_the_given_answer_becomes_more_probable_although_nobody_drew_it():
    recipe = with_given(1)
    run = jax.jit(step.composed(tiny.pieces(recipe, TASK, OPTIMISER)))
    state, prompts, found = tiny.state(recipe, TASK, OPTIMISER), tiny.prompts(TASK, P, need_answers=True), []
    for _ in range(30):
        state, _, x = run(state, prompts)
        found.append(float(jnp.where(x.mask, x.rollout_logp, 0.0)[G - 1::G].sum(axis=1).mean()))
    assert found[-1] > found[0] + 1


# Windows


CHAIN = chain.chain(4, 5, train_size=16, validation_size=0, held_out_size=0)
WINDOWS = t_ppo.t_ppo(window=2)


@functools.cache
def windows(group_size=1, window=2):
    """Three steps without learning: what was before, what is after, metrics, experience, fresh prompts."""
    recipe = replace(WINDOWS, rollout=Rollout(group_size, window=window))
    pieces = tiny.pieces(recipe, CHAIN, tiny.recorder())
    run = jax.jit(step.composed(pieces))
    state, found = states(pieces, recipe, CHAIN, tiny.recorder(), tiny.prompts(CHAIN, P), seed=9), []
    for k in range(3):
        prompts = tiny.prompts(CHAIN, P, first=P * k)
        before = state
        state, metrics, x = run(state, prompts)
        found.append((before, state, metrics, x, prompts))
    return found


def test_without_learning_the_first_answers_are_those_of_a_whole_rollout():
    """End to end: what a place asks first is, when it is complete, what one draw at step 0 gives."""
    expected = drawn_at_once(CHAIN, Rollout(1), windows()[0][0], tiny.prompts(CHAIN, P))
    compared = []
    for _, _, _, x, _ in windows()[:2]:
        example, complete = np.asarray(x.prompts.example), np.asarray(x.complete)
        for place in np.flatnonzero(complete & (example == np.arange(P))):
            compared.append(int(place))
            for name in ("tokens", "mask", "finished"):
                np.testing.assert_array_equal(vars(x)[name][place], vars(expected)[name][place])
            np.testing.assert_allclose(x.rollout_logp[place], expected.rollout_logp[place], rtol=1e-5, atol=1e-6)
    assert sorted(compared) == list(range(P))


def test_a_busy_place_is_counted_and_keeps_its_prompt():
    for before, after, metrics, x, prompts in windows():
        busy = np.asarray(before.carried["window"].busy)
        assert metrics["rollout/prompts_not_asked"] == busy.sum()
        expected = np.where(busy, before.carried["window"].prompts.example, prompts.example)
        np.testing.assert_array_equal(x.prompts.example, expected)
        np.testing.assert_array_equal(after.carried["window"].busy, ~np.asarray(x.complete))
        np.testing.assert_array_equal(x.version, int(before.step))
    assert sum(int(m["rollout/prompts_not_asked"]) for _, _, m, _, _ in windows()) > 2


def test_metrics_are_of_complete_answers_and_of_the_fresh_tokens():
    for _, _, metrics, x, _ in windows():
        complete, fresh = np.asarray(x.complete), np.asarray(x.fresh)
        count = max(complete.sum(), 1)
        assert float(metrics["rollout/length"]) == pytest.approx(np.asarray(x.mask).sum(axis=1)[complete].sum() / count)
        assert float(metrics["rollout/finished"]) == pytest.approx(np.asarray(x.finished)[complete].sum() / count)
        assert float(metrics["reward/score"]) == pytest.approx(np.asarray(x.score)[complete].sum() / count)
        assert float(metrics["rollout/entropy"]) == pytest.approx(np.asarray(x.rollout_entropy)[fresh].mean(), rel=1e-5)
        assert not np.asarray(x.score)[~complete].any()
        assert fresh.sum(axis=1).max() <= 2 and (fresh <= np.asarray(x.mask)).all()
    assert any(x.complete.any() and not x.complete.all() for _, _, _, x, _ in windows())


def test_the_verifier_is_told_what_is_in_the_places_and_only_what_it_says_of_whole_answers_counts():
    """It fails on every other answer and says the prompt's number of the rest; half an answer is learned from all the
    same."""
    def verdict(prompts, samples):
        return Verdict(score=prompts.example + 0.5, parts={}, failed=jnp.arange(P) % 2 == 0)

    pieces = tiny.pieces(WINDOWS, CHAIN, tiny.recorder(), judged=verdict)
    state = states(pieces, WINDOWS, CHAIN, tiny.recorder(), tiny.prompts(CHAIN, P), seed=9)
    run = jax.jit(step.composed(pieces))
    odd, kinds = np.arange(P) % 2 == 1, set()
    for k in range(2):
        state, metrics, x = run(state, tiny.prompts(CHAIN, P, first=P * k))
        complete = np.asarray(x.complete)
        np.testing.assert_array_equal(x.failed, complete & ~odd)
        np.testing.assert_array_equal(x.score, np.where(complete & odd, x.prompts.example + 0.5, 0.0))
        np.testing.assert_array_equal(np.asarray(x.fresh).any(axis=1), ~np.asarray(x.failed))
        assert metrics["reward/failed"] == x.failed.sum() and np.isfinite(metrics["gradient/norm"])
        kinds |= {(bool(c), bool(o)) for c, o in zip(complete, odd, strict=True)}
    assert len(kinds) == 4


def test_the_room_for_what_is_carried_must_be_given():
    with pytest.raises(ValueError, match="'t_ppo' carries rollouts from step to step: give initial_state their room"):
        tiny.state(WINDOWS, CHAIN, OPTIMISER)


def test_groups_grow_together():
    """With two answers per prompt a place is free when both have ended; until then neither has a score."""
    waited = 0
    for _, _, _, x, _ in windows(2, window=1):
        complete = np.asarray(x.complete).reshape(P, 2)
        assert (complete[:, 0] == complete[:, 1]).all()
        ended = np.asarray(x.finished | x.mask.all(axis=1)).reshape(P, 2)
        np.testing.assert_array_equal(complete[:, 0], ended.all(axis=1))
        waited += (ended.any(axis=1) & ~ended.all(axis=1)).sum()
    assert waited
