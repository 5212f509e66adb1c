"""From verdicts to credit: what failed, what was rejected and what nobody chose must not count."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.advantage import group
from rl_jax.learner import assemble, update
from rl_jax.recipe import Recipe, Rollout
from rl_jax.recipes.baselines.rloo import rloo
from rl_jax.tasks import judge
from rl_jax.tasks.task import PureVerifier
from rl_jax.tasks.toys import bandit
from rl_jax.types import Evaluated, Samples, Verdict
from rl_jax.weighting import aggregate
from tests.learner import tiny
from tests.recipes import toy

P, G, T = 2, 3, 4
SCORE = np.array([1.0, 0.0, 0.5, 0.0, 1.0, 1.0], np.float32)
MASK = np.arange(T) < np.array([4, 2, 1, 3, 4, 1])[:, None]


def samples():
    number = jnp.arange(P * G * T, dtype=jnp.float32).reshape(P * G, T)
    return Samples(tokens=number.astype(jnp.int32), mask=jnp.asarray(MASK), rollout_logp=-1 - number,
                   rollout_entropy=number, finished=jnp.ones(P * G, bool), version=jnp.zeros(P * G, jnp.int32))


def verdict(failed=(), score=SCORE):
    flags = np.isin(np.arange(P * G), failed)
    return Verdict(score=jnp.asarray(np.where(flags, np.nan, score)), parts={}, failed=jnp.asarray(flags))


def recipe(**slots):
    return Recipe(**{"rollout": Rollout(G), "loss": lambda policy, x: policy.logp,
                     "weighting": lambda x: aggregate.token_mean(x.mask)} | slots)


def test_groups_are_numbered_by_prompt_and_failures_are_alone():
    failed = jnp.array([False, True, False, False, False, True])
    np.testing.assert_array_equal(assemble.group_ids(failed, G), [0, 7, 0, 1, 1, 11])


def test_what_failed_has_no_mask_and_moves_no_statistic_of_its_group():
    x = assemble.experience(toy.prompts(P), samples(), verdict(failed=[2]))
    np.testing.assert_array_equal(x.mask, MASK & (np.arange(P * G) != 2)[:, None])
    x = assemble.with_advantage(recipe(advantage=lambda x: group.centred(x.reward, x.group)), x)
    # the mean of the first group is that of 1 and 0, not of 1, 0 and a third number
    np.testing.assert_allclose(x.advantage[:, 0], [0.5, -0.5, 0.0, -2 / 3, 1 / 3, 1 / 3], rtol=1e-6)
    assert np.isfinite(x.reward).all()


def test_credit_per_sequence_reaches_every_token_and_is_constant():
    x = assemble.experience(toy.prompts(P), samples(), verdict())
    per_token = jnp.arange(P * G * T, dtype=jnp.float32).reshape(P * G, T)
    one = assemble.credited(recipe(advantage=lambda x: x.reward), x)
    many = assemble.credited(recipe(advantage=lambda x: per_token), x)
    np.testing.assert_array_equal(one.advantage, np.repeat(SCORE[:, None], T, axis=1))
    np.testing.assert_array_equal(many.advantage, per_token)

    def total(reward):
        return assemble.credited(recipe(advantage=lambda x: x.reward), dataclasses.replace(x, reward=reward)).advantage.sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.asarray(SCORE)), 0.0)


def test_the_reward_slot_shapes_and_selection_takes_tokens_away():
    x = assemble.experience(toy.prompts(P), samples(), verdict())
    x = assemble.selected(recipe(reward=lambda x: 2 * x.score, selection=lambda x: x.reward < 2), x)
    np.testing.assert_array_equal(x.reward, 2 * SCORE)
    np.testing.assert_array_equal(x.score, SCORE)
    np.testing.assert_array_equal(x.mask, MASK & (SCORE < 1)[:, None])


def test_slots_see_zeros_behind_the_mask():
    drawn = dataclasses.replace(samples(), rollout_logp=jnp.where(jnp.asarray(MASK), -1.0, jnp.nan))
    x = assemble.experience(toy.prompts(P), drawn, verdict())
    x = assemble.hide(dataclasses.replace(x, given={"old_logp": drawn.rollout_logp}))
    np.testing.assert_array_equal(x.rollout_logp, np.where(MASK, -1.0, 0.0))
    np.testing.assert_array_equal(x.old_logp, np.where(MASK, -1.0, 0.0))
    policy = Evaluated(logp=drawn.rollout_logp, entropy=drawn.rollout_logp)
    np.testing.assert_array_equal(assemble.hide_policy(policy, x.mask).entropy, np.where(MASK, -1.0, 0.0))


def test_reading_what_was_not_asked_for_says_how_to_ask():
    x = assemble.experience(toy.prompts(P), samples(), verdict())
    for name, remedy in (("reference_logp", '"reference"'), ("old_logp", '"old"'), ("teacher_logp", '"teacher"'),
                         ("values", '"critic"'), ("advantage", "no advantage slot")):
        with pytest.raises(ValueError, match=f"x.{name} is not there: .*{remedy}"):
            getattr(x, name)


def test_a_pure_verifiers_nan_is_a_failure():
    scores = jnp.array([1.0, jnp.nan, 0.0, jnp.inf, 0.5, -jnp.inf])
    said = judge.pure(PureVerifier(lambda facts, tokens, mask: (scores, {})))(toy.prompts(P), samples())
    np.testing.assert_array_equal(said.failed, [False, True, False, True, False, True])
    x = assemble.experience(toy.prompts(P), samples(), said)
    assert np.isfinite(x.score).all() and not x.mask[said.failed].any()


class Says:
    """A scorer that returns or raises what it is told to."""

    def __init__(self, said):
        self.said = said

    def score(self, fields, texts):
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


GOOD, NOT_FAILED = np.array([1.0, 0.5], np.float32), np.zeros(2, bool)
BAD = {"raises": RuntimeError("no"), "too short": (GOOD[:1], {"length": GOOD}, NOT_FAILED), "too few": (GOOD,),
       "part missing": (GOOD, {}, NOT_FAILED), "no numbers": (["a", "b"], {"length": GOOD}, NOT_FAILED)}


@pytest.mark.parametrize("bad", BAD)
def test_whatever_goes_wrong_on_the_host_is_a_failure(bad):
    """Raised through XLA it would delete the donated state."""
    task = tiny.on_host(bandit.bandit(), parts=("length",))
    rows = np.zeros(2, int), np.zeros((2, 1), int), np.ones((2, 1), bool)
    said = judge.score_on_host(task, "train", Says(BAD[bad]), *rows)
    assert said.failed.tolist() == [True, True] and said.score.shape == said.parts["length"].shape == (2,)
    fine = judge.score_on_host(task, "train", Says((np.array([1.0, np.nan]), {"length": GOOD}, NOT_FAILED)), *rows)
    assert fine.failed.tolist() == [False, True] and fine.score.tolist() == [1.0, 0.0]


def test_plain_arrays_are_enough_for_batch_loss():
    """RLOO on two answers, rewards 1 and 0: credit 1 and -1 (its sheet), halved by the mean over two rows."""
    logp = jnp.log(jnp.array([[0.5, 0.25], [0.5, 0.5]]))
    x = assemble.of_arrays(logp, jnp.ones((2, 2), bool), jnp.array([1.0, 0.0]), jnp.zeros(2, jnp.int32))
    gradient = jax.grad(lambda p: update.batch_loss(rloo(), Evaluated(logp=p, entropy=-p), x)[0])(logp)
    np.testing.assert_allclose(gradient, [[-0.5, -0.5], [0.5, 0.5]], rtol=1e-6)
