"""Given answers in the place of drawn ones: which rows, and that nothing else changes."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.linear_logprob.support import unpack_support
from rl_jax.rollout import mixed
from rl_jax.types import Samples
from tests.recipes import toy

P, G, T, V = 3, 4, 5, 40  # two words of support bits
ROWS = P * G
LENGTH = np.array([3, 0, 5])  # the second prompt has no answer
ANSWER = np.arange(P * T).reshape(P, T) + 20
ANSWER_MASK = np.arange(T) < LENGTH[:, None]


def prompts(**fields):
    given = {"answer": jnp.asarray(ANSWER), "answer_mask": jnp.asarray(ANSWER_MASK)}
    return dataclasses.replace(toy.prompts(P), **given | fields)


def samples(support=None):
    number = jnp.arange(ROWS * T, dtype=jnp.float32).reshape(ROWS, T)
    return Samples(tokens=number.astype(int), mask=number % 3 != 0, rollout_logp=-1 - number,
                   rollout_entropy=1 + number, finished=jnp.zeros(ROWS, bool), version=jnp.arange(ROWS),
                   support=support)


@pytest.mark.parametrize("count", [1, 3])
def test_the_last_rows_of_each_group_are_the_prompts_answer(count):
    before, found = samples(), mixed.with_answers(samples(), prompts(), count)
    for row in range(ROWS):
        prompt, place = divmod(row, G)
        given = place >= G - count and LENGTH[prompt] > 0
        assert bool(found.given[row]) is bool(given)
        if given:
            np.testing.assert_array_equal(found.tokens[row], ANSWER[prompt])
            np.testing.assert_array_equal(found.mask[row], ANSWER_MASK[prompt])
            assert found.finished[row]
            assert not found.rollout_logp[row].any() and not found.rollout_entropy[row].any()
        else:
            for name in ("tokens", "mask", "rollout_logp", "rollout_entropy", "finished"):
                np.testing.assert_array_equal(vars(found)[name][row], vars(before)[name][row])
    np.testing.assert_array_equal(found.version, before.version)
    assert found.support is None


def test_a_given_answer_may_hold_tokens_that_truncated_sampling_would_not_keep():
    bits = jnp.full((ROWS, T, 2), 0b101, jnp.uint32)
    found = mixed.with_answers(samples(bits), prompts(), 1)
    kept = np.asarray(unpack_support(found.support, V))
    np.testing.assert_array_equal(kept.all(axis=(1, 2)), found.given)
    np.testing.assert_array_equal(found.support[~np.asarray(found.given)], bits[~np.asarray(found.given)])


def test_prompts_without_answers_are_refused():
    with pytest.raises(ValueError, match="rollout.given.*the prompts have none: take a task whose training examples"):
        jax.eval_shape(lambda: mixed.with_answers(samples(), prompts(answer=None, answer_mask=None), 1))
