import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.tasks import stream
from rl_jax.tasks.toys import addmod


@pytest.mark.parametrize("modulus", [7, 10, 23])
def test_every_question_is_in_one_split_and_its_answer_is_right(modulus):
    task = addmod.addmod(modulus, validation_size=5, held_out_size=9)
    sizes = {name: len(split) for name, split in task.splits.items()}
    assert sizes == {"held_out": 9, "validation": 5, "train": modulus**2 - 14}
    seen = set()
    for example in (e for split in task.splits.values() for e in split):
        a, b = map(int, example.text.rstrip("=").split("+"))
        assert task.tokenizer.decode(example.answer) == str((a + b) % modulus) and example.answer[-1] == 1
        assert task.tokenizer.decode(example.prompt) == example.text and len(example.prompt) <= task.prompt_length
        seen.add((a, b))
    assert len(seen) == modulus**2


def test_the_verifier_wants_the_number_and_the_end():
    task = addmod.addmod(23)
    prompts = stream.batch(task, task.splits["train"][:50], need_answers=True)
    score = jax.jit(task.verifier.score)
    tokens, mask = jnp.asarray(prompts.answer), jnp.asarray(prompts.answer_mask)
    np.testing.assert_array_equal(score(prompts.facts, tokens, mask)[0], 1)
    np.testing.assert_array_equal(score(prompts.facts, tokens.at[:, 0].set(12), mask)[0], 0)
    np.testing.assert_array_equal(score(prompts.facts, tokens, mask.at[:, 0].set(False))[0], 0)
    unended = mask & (tokens != task.tokenizer.end_id)
    np.testing.assert_array_equal(score(prompts.facts, tokens, unended)[0], 0)


@pytest.mark.parametrize("wrong", [{"modulus": 1}, {"modulus": 3, "held_out_size": 9, "validation_size": 0},
                                   {"validation_size": -1}])
def test_refused_arguments(wrong):
    with pytest.raises(ValueError, match="modulus"):
        addmod.addmod(**wrong)


def test_splits_may_be_left_out():
    assert set(addmod.addmod(3, validation_size=0, held_out_size=0).splits) == {"train"}
