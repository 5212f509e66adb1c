import dataclasses
import json
import time

import jax
import numpy as np
import pytest

from rl_jax.tasks import stream
from rl_jax.tasks.toys import addmod, bandit, chain, symbols


@pytest.fixture(scope="module")
def task():
    return addmod.addmod(5, validation_size=2, held_out_size=3)


def taken(source, batches):
    return [next(source).example.tolist() for _ in range(batches)]


def test_prompts_are_padded_numpy_arrays_without_a_device(task):
    with jax.transfer_guard("disallow"):
        prompts = next(stream.Stream(addmod.addmod(12), "train", 6, seed=0, need_answers=True))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(prompts))
    assert prompts.tokens.shape == (6, 6) and prompts.answer.shape == prompts.facts["answer"].shape == (6, 3)
    task = addmod.addmod(12)
    for row in range(6):
        example = task.splits["train"][prompts.example[row]]
        assert prompts.tokens[row, : prompts.lengths[row]].tolist() == list(example.prompt)
        assert not prompts.tokens[row, prompts.lengths[row] :].any()
        assert prompts.answer[row][prompts.answer_mask[row]].tolist() == list(example.answer)
    assert len(set(prompts.lengths.tolist())) > 1


def test_each_pass_asks_every_question_once_in_a_new_order(task):
    source = stream.Stream(task, "train", 5, seed=0)
    first, second = sum(taken(source, 4), []), sum(taken(source, 4), [])
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    assert first == sum(taken(stream.Stream(task, "train", 5, seed=0), 4), [])
    assert first != sum(taken(stream.Stream(task, "train", 5, seed=1), 4), [])


def test_a_split_smaller_than_a_batch_is_repeated(task):
    assert sorted(taken(stream.Stream(task, "held_out", 6, seed=0), 1)[0]) == [0, 0, 1, 1, 2, 2]
    assert taken(stream.Stream(bandit.bandit(), "train", 4, seed=0), 2) == [[0] * 4] * 2


@pytest.mark.parametrize("count", [2, 3])
def test_processes_together_see_what_one_would(task, count):
    alone = taken(stream.Stream(task, "train", 6, seed=3), 9)
    shares = [taken(stream.Stream(task, "train", 6, seed=3, process_index=i, process_count=count), 9)
              for i in range(count)]
    for batch, *parts in zip(alone, *shares, strict=True):
        assert batch == sum(parts, []) and all(len(part) == 6 // count for part in parts)


def test_a_restored_stream_goes_on_exactly(task):
    source = stream.Stream(task, "train", 6, seed=0)
    taken(source, 5)
    state = json.loads(json.dumps(source.state()))
    expected = taken(source, 7)
    again = stream.Stream(task, "train", 6, seed=0)
    taken(again, 2)
    again.restore(state)
    assert taken(again, 7) == expected
    sharded = stream.Stream(task, "train", 6, seed=0, process_index=1, process_count=2)
    sharded.restore(state)
    assert taken(sharded, 7) == [whole[3:] for whole in expected]


@pytest.mark.parametrize("change, named", [
    ({"seed": 1}, "seed: saved 0, now 1"), ({"split": "held_out"}, "split: saved 'train', now 'held_out'"),
    ({"prompts_per_batch": 4}, "prompts_per_batch: saved 6, now 4")])
def test_restoring_another_streams_state_says_what_differs(task, change, named):
    state = stream.Stream(task, "train", 6, seed=0).state()
    arguments = {"split": "train", "prompts_per_batch": 6, "seed": 0, **change}
    with pytest.raises(ValueError, match=named):
        stream.Stream(task, **arguments).restore(state)


def test_restoring_with_other_questions_or_another_tokenizer(task):
    state = stream.Stream(task, "train", 6, seed=0).state()
    other = addmod.addmod(5, validation_size=2, held_out_size=3, seed=1)
    with pytest.raises(ValueError, match="questions: saved"):
        stream.Stream(other, "train", 6, seed=0).restore(state)
    retokenized = dataclasses.replace(task, tokenizer=symbols.Symbols("9876543210+="))
    with pytest.raises(ValueError, match="tokenizer: saved"):
        stream.Stream(retokenized, "train", 6, seed=0).restore(state)
    state.pop("position")
    with pytest.raises(ValueError, match="no position"):
        stream.Stream(task, "train", 6, seed=0).restore(state)


@pytest.mark.parametrize("wrong, named", [
    ({"split": "test"}, "'held_out', 'train', 'validation'"), ({"prompts_per_batch": 0}, "multiple"),
    ({"prompts_per_batch": 5, "process_count": 2}, "multiple"), ({"process_index": 1}, "below"),
    ({"process_count": 0}, "process_count")])
def test_refused_arguments(task, wrong, named):
    with pytest.raises(ValueError, match=named):
        stream.Stream(task, **{"split": "train", "prompts_per_batch": 4, "seed": 0, **wrong})


def test_batch_of_examples(task):
    examples = task.splits["held_out"]
    prompts = stream.batch(task, examples)
    np.testing.assert_array_equal(prompts.example, np.arange(3))
    assert prompts.answer is None
    np.testing.assert_array_equal(stream.batch(task, examples[1:], indices=[1, 2]).tokens, prompts.tokens[1:])


def test_batch_refuses_what_it_cannot_make(task):
    examples = task.splits["train"]
    with pytest.raises(ValueError, match="at least one example"):
        stream.batch(task, [])
    with pytest.raises(ValueError, match="no worked solution"):
        stream.batch(task, [dataclasses.replace(examples[0], answer=None)], need_answers=True)
    with pytest.raises(ValueError, match="prompt_length is 4: set it to at least 5"):
        stream.batch(task, [dataclasses.replace(examples[0], prompt=[2] * 5)])


def test_answers_that_there_are_may_be_carried_without_being_needed(task):
    examples = task.splits["train"][:2]
    half = [examples[0], dataclasses.replace(examples[1], answer=None)]
    with pytest.raises(ValueError, match="no worked solution to learn from"):
        stream.batch(task, half, need_answers=True)
    made = stream.batch(task, half, with_answers=True)
    assert made.answer_mask[0].any() and not made.answer_mask[1].any()
    none = dataclasses.replace(task, splits={"train": [half[1]]})
    with pytest.raises(ValueError, match="no example of 'train' has a worked solution"):
        stream.Stream(none, "train", 1, seed=0, with_answers=True)


def test_a_batch_is_made_quickly():
    source = stream.Stream(chain.chain(), "train", 128, seed=0, need_answers=True)
    next(source)
    start = time.perf_counter()
    for _ in range(10):
        next(source)
    assert time.perf_counter() - start < 1.0
