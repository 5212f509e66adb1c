import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.tasks import stream
from rl_jax.tasks.toys import chain


@pytest.mark.parametrize("terms, modulus", [(3, 10), (5, 7)])
def test_answers_are_the_running_totals(terms, modulus):
    task = chain.chain(terms, modulus, train_size=60, validation_size=20, held_out_size=20)
    texts = [e.text for split in task.splits.values() for e in split]
    assert len(set(texts)) == 100
    for example in (e for split in task.splits.values() for e in split):
        signs = re.findall(r"[+-]", example.text)
        first, *rest = map(int, re.findall(r"\d", example.text))
        totals, total = "", first
        for sign, term in zip(signs, rest, strict=True):
            total = (total + term if sign == "+" else total - term) % modulus
            totals += str(total)
        assert task.tokenizer.decode(example.answer) == totals
        assert len(example.answer) == task.completion_length and len(example.prompt) == task.prompt_length


def test_question_numbers_are_all_questions():
    term, sign, _ = chain.questions(np.arange(3**3 * 4), 3, 3)
    assert len({tuple(row) for row in np.hstack([term, sign]).tolist()}) == 3**3 * 4


def test_score_is_the_last_total_and_steps_the_others():
    """Totals of "7-4+8+1=" modulo 10: 3, 1, 2; ids are digit + 2, 1 ends."""
    facts = {"answer": jnp.tile(jnp.array([[5, 3, 4, 1]]), (6, 1))}
    tokens = jnp.array([[5, 3, 4, 1], [5, 9, 4, 1], [9, 9, 4, 1], [5, 3, 9, 1], [5, 3, 4, 4], [5, 3, 4, 1]])
    mask = jnp.ones((6, 4), bool).at[5, 3].set(False)
    score, parts = jax.jit(chain.score)(facts, tokens, mask)
    np.testing.assert_array_equal(score, [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(parts["steps"], [1, 0.5, 0, 1, 1, 1])


def test_worked_solutions_score_1():
    task = chain.chain(train_size=32)
    prompts = stream.batch(task, task.splits["train"], need_answers=True)
    score, parts = task.verifier.score(
        {"answer": jnp.asarray(prompts.facts["answer"])}, jnp.asarray(prompts.answer), jnp.asarray(prompts.answer_mask))
    np.testing.assert_array_equal(score, 1)
    np.testing.assert_array_equal(parts["steps"], 1)
    assert task.final_answer("312") == "2" and task.final_answer("") is None


@pytest.mark.parametrize("wrong", [{"terms": 2}, {"terms": 13}, {"modulus": 11}, {"modulus": 1}, {"train_size": -1},
                                   {"terms": 3, "modulus": 2, "train_size": 40}])
def test_refused_arguments(wrong):
    with pytest.raises(ValueError, match="number of questions"):
        chain.chain(**wrong)
