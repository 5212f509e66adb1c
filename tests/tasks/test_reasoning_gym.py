import re

import numpy as np
import pytest

from rl_jax.reward import worker
from rl_jax.tasks import reasoning_gym, stream
from rl_jax.tasks.toys import symbols
from tests.tasks import checkpoints

SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def make(generator="chain_sum", **changes):
    return reasoning_gym.reasoning_gym(generator, **{
        "options": {"min_terms": 3, "max_terms": 4, "max_digits": 1}, "train_size": 400, "validation_size": 60,
        "held_out_size": 80, **changes})


@pytest.fixture(scope="module")
def task():
    return make()


def test_splits_have_their_sizes_and_share_no_question(task):
    questions = {name: [e.text for e in split] for name, split in task.splits.items()}
    assert {name: len(split) for name, split in questions.items()} == {"held_out": 80, "validation": 60, "train": 400}
    assert len(set(questions["held_out"])) == 80 and len(set(questions["validation"])) == 60
    assert not set(questions["train"]) & set(questions["held_out"] + questions["validation"])
    assert not set(questions["validation"]) & set(questions["held_out"])
    assert task.report.startswith("chain_sum: held_out 80 of 80 (") and "train 400 of 400 (" in task.report


def test_splits_of_a_small_generator_are_disjoint_and_the_loss_is_reported():
    """Two one-digit terms make 200 questions."""
    task = make(options=SMALL, held_out_size=50, validation_size=50, train_size=1000)
    held_out, validation, train = ({e.text for e in task.splits[name]} for name in ("held_out", "validation", "train"))
    assert len(held_out) == len(validation) == 50 and len(train) == 100
    assert not held_out & validation and not (held_out | validation) & train
    assert int(re.search(r"train 1000 of 1000 \(\d+ drawn, (\d+) left out", task.report)[1]) > 500


def test_a_generator_with_too_few_questions_is_an_error():
    with pytest.raises(ValueError, match="none is left for validation and train.*held_out 200 of 400"):
        make(options=SMALL, held_out_size=400)


def test_the_same_arguments_give_the_same_questions(task):
    assert make().fingerprint == task.fingerprint and make().splits["train"] == task.splits["train"]
    assert make(seed=1).fingerprint != task.fingerprint


def test_answers_to_learn_from_score_1_in_workers(task):
    examples = task.splits["validation"]
    texts = [task.tokenizer.decode(e.answer) for e in examples]
    with worker.Workers(task.verifier, 1) as workers:
        score, parts, failed = workers.score([e.fields for e in examples], texts)
        wrong = workers.score([e.fields for e in examples], ["1000"] * 60)[0]
    assert not failed.any()
    np.testing.assert_array_equal(score, 1)
    np.testing.assert_array_equal(parts["partial_credit"], 1)
    np.testing.assert_array_equal(wrong, 0)


def test_keep_after_leaves_the_arithmetic():
    task = make(keep_after=": ", prompt_length=11)
    assert all(e.text.endswith(" =") and e.text[0].isdigit() for e in task.splits["train"])
    assert {len(e.prompt) for e in task.splits["train"]} == {8, 11}
    assert task.fingerprint != make().fingerprint
    with pytest.raises(ValueError, match="'@' is not in the question"):
        make(keep_after="@")


def test_lengths_are_checked():
    with pytest.raises(ValueError, match="prompt_length allows 1 to 8.*'State the final.*Set prompt_length to at"):
        make(prompt_length=8)
    with pytest.raises(ValueError, match="completion_length allows 2"):
        make(completion_length=2)


def test_a_generator_without_answers_has_none_to_learn_from():
    task = make("graph_color", options={"min_num_vertices": 4, "max_num_vertices": 5}, prompt_length=1000,
                train_size=4, validation_size=0, held_out_size=2)
    assert set(task.splits) == {"held_out", "train"} and task.splits["train"][0].answer is None
    with pytest.raises(ValueError, match="no worked solution"):
        stream.batch(task, task.splits["train"], need_answers=True)


def test_another_tokenizer():
    task = make(keep_after=": ", tokenizer=symbols.Symbols("0123456789+-= "), prompt_length=16)
    assert task.tokenizer.decode(task.splits["train"][0].prompt) == task.splits["train"][0].text


def test_questions_as_chats():
    sizes = {"train_size": 4, "validation_size": 2, "held_out_size": 2, "prompt_length": 90, "completion_length": 12}
    arguments = {"keep_after": ": ", "tokenizer": str(checkpoints.FOLDER / "headers"), **sizes}
    plain, task = make(**arguments), make(**arguments, chat={"instruction": "Only the number."})
    for example, same in zip(task.splits["train"], plain.splits["train"], strict=True):
        assert example.text == ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n" + same.text +
                                "\nOnly the number.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
        assert example.prompt == task.tokenizer.encode(example.text)
        assert example.answer == same.answer and example.answer[-1] == task.tokenizer.end_id
        assert same.prompt == [*task.tokenizer.begin_ids, *task.tokenizer.encode(same.text)]
    assert task.fingerprint != plain.fingerprint


@pytest.mark.parametrize("sizes", [{"train_size": 0}, {"held_out_size": -1}])
def test_refused_sizes(sizes):
    with pytest.raises(ValueError, match="train_size >= 1"):
        make(**sizes)
