import dataclasses
import json
import pathlib
import sys
import types

import pytest

from rl_jax import experiment
from rl_jax.tasks import chat, gsm8k, stream, task
from tests.ends import tiny
from tests.tasks import checkpoints

PUBLISHED = pathlib.Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


def problem(i):
    return {"question": f"Ann has {i} apples and buys {i + 1} more. How many has she\u2028now?",
            "answer": f"She has {i} + {i + 1} = <<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1} apples.\n#### {2 * i + 1}"}


def write(folder, train, test):
    for name, problems in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in problems), encoding="utf-8")
    return str(folder)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path, [problem(i) for i in range(20)], [problem(i) for i in range(17, 27)])


def test_splits_from_files(path):
    """Training problems 17 to 19 are test problems too: they are held out."""
    task = gsm8k.gsm8k(path, validation_size=5)
    questions = {name: {e.text for e in split} for name, split in task.splits.items()}
    assert len(questions["held_out"]) == 10
    assert len(questions["train"] | questions["validation"]) == 17 and not questions["train"] & questions["validation"]
    assert not questions["held_out"] & (questions["train"] | questions["validation"])
    again = gsm8k.gsm8k(path, validation_size=5)
    assert again.splits == task.splits and again.fingerprint == task.fingerprint
    assert gsm8k.gsm8k(path, validation_size=5, seed=1).fingerprint != task.fingerprint


def test_solutions_lose_their_annotations_and_score_1(path):
    task = gsm8k.gsm8k(path, validation_size=0)
    assert set(task.splits) == {"train", "held_out"}
    example = task.splits["train"][3]
    solution = task.tokenizer.decode(example.answer)
    assert solution == "She has 3 + 4 = 7 apples.\n#### 7" and example.answer[-1] == task.tokenizer.end_id
    assert task.verifier.score(example.fields, solution) == {"score": 1.0, "marked": 1.0}
    assert task.verifier.score(example.fields, "#### 8") == {"score": 0.0, "marked": 1.0}
    assert stream.batch(task, task.splits["train"], need_answers=True).tokens.shape == (17, task.prompt_length)


def test_lengths_are_checked(path):
    with pytest.raises(ValueError, match="prompt_length allows 1 to 5"):
        gsm8k.gsm8k(path, validation_size=5, prompt_length=5)
    with pytest.raises(ValueError, match="completion_length allows 6"):
        gsm8k.gsm8k(path, validation_size=5, completion_length=6)


@pytest.mark.parametrize("line", ["not json", "[1]", '{"question": "a"}', '{"question": "a", "answer": "5"}',
                                  '{"question": " ", "answer": "#### 5"}', "", '{"question": 1, "answer": "#### 5"}'])
def test_a_line_that_is_no_problem_is_named(path, line):
    file = pathlib.Path(path) / "train.jsonl"
    file.write_text(json.dumps(problem(1)) + "\n" + line + "\n" + json.dumps(problem(2)) + "\n")
    with pytest.raises(ValueError, match="train.jsonl, line 2: expected"):
        gsm8k.gsm8k(path, validation_size=0)


def test_missing_and_empty_files(path, tmp_path):
    with pytest.raises(ValueError, match="there is no file.*train.jsonl"):
        gsm8k.gsm8k(str(tmp_path / "nowhere"))
    (pathlib.Path(path) / "test.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="test.jsonl is empty"):
        gsm8k.gsm8k(path, validation_size=0)


@pytest.mark.parametrize("size", [-1, 20])
def test_refused_validation_size(path, size):
    with pytest.raises(ValueError, match="20 training problems"):
        gsm8k.gsm8k(path, validation_size=size)


CHAT = {"system": "Count.", "instruction": "Answer behind ####.", "enable_thinking": False}


def test_problems_as_chats(path):
    """A user turn with the generation prompt; the solution ends with the token that ends turns."""
    task = gsm8k.gsm8k(path, validation_size=5, tokenizer=str(checkpoints.FOLDER / "chatml"), chat=CHAT)
    plain = gsm8k.gsm8k(path, validation_size=5)
    asked = chat.Chat(task.tokenizer)
    for example, same in zip(task.splits["held_out"], plain.splits["held_out"], strict=True):
        question = f"{same.text.removesuffix(chr(10))}\nAnswer behind ####."
        messages = [{"role": "system", "content": "Count."}, {"role": "user", "content": question}]
        assert example.prompt == asked.ids(messages, add_generation_prompt=True, enable_thinking=False)
        assert example.fields == same.fields and example.answer[-1] == task.tokenizer.end_id
        assert task.tokenizer.decode(example.answer) == plain.tokenizer.decode(same.answer)
    fingerprints = {plain.fingerprint, task.fingerprint}
    fingerprints.add(gsm8k.gsm8k(path, validation_size=5, tokenizer=task.tokenizer, chat={}).fingerprint)
    assert len(fingerprints) == 3
    assert gsm8k.gsm8k(path, validation_size=5, tokenizer=task.tokenizer).fingerprint == plain.fingerprint


def test_plain_problems_with_a_checkpoint_s_tokenizer_begin_as_it_does(path):
    task = gsm8k.gsm8k(path, validation_size=0, tokenizer=str(checkpoints.FOLDER / "headers"))
    example = task.splits["train"][0]
    assert example.prompt == [*task.tokenizer.begin_ids, *task.tokenizer.encode(example.text)]
    assert example.text[-1] == "\n"


@pytest.mark.parametrize("arguments", [{}, {"tokenizer": ""}, {"tokenizer": None, "chat": None}, {
    "tokenizer": str(checkpoints.FOLDER / "chatml"), "chat": CHAT}, {
    "tokenizer": str(checkpoints.FOLDER / "headers"), "chat": {}}], ids=str)
def test_tokenizer_and_chat_pass_through_a_config(path, arguments):
    found = experiment.parse(tiny.config(task="gsm8k", task_args={"path": path, "validation_size": 5, **arguments}))
    made = gsm8k.gsm8k(path, validation_size=5, **arguments)
    assert found.task.splits == made.splits and found.task.fingerprint == made.fingerprint
    assert found.shape.vocabulary == made.tokenizer.size


@pytest.mark.parametrize(("arguments", "named"), [
    ({"tokenizer": 3}, "config.task.args.tokenizer=3 is of type int"), ({"chat": "a"}, "config.task.args.chat='a'"),
    ({"chat": {}}, "needs the tokenizer of a published checkpoint"), ({"tokenizer": "./none"}, "neither a folder")])
def test_wrong_tokenizers_and_chats_in_a_config(path, arguments, named):
    with pytest.raises(ValueError, match=named):
        experiment.parse(tiny.config(task="gsm8k", task_args={"path": path, "validation_size": 5, **arguments}))


def stand_in(monkeypatch, data_source):
    """The two modules of tensorflow-datasets that are imported."""
    package = types.SimpleNamespace(data_source=data_source)
    for name in ("tensorflow_datasets", "tensorflow_datasets.text", "tensorflow_datasets.text.gsm8k"):
        monkeypatch.setitem(sys.modules, name, package)


def test_tensorflow_datasets_gives_bytes(monkeypatch, path):
    problems = {"train": range(17), "test": range(17, 27)}
    stand_in(monkeypatch, lambda name, split: [{k: v.encode() for k, v in problem(i).items()} for i in problems[split]])
    task = gsm8k.gsm8k(validation_size=0)
    assert task.splits == gsm8k.gsm8k(path, validation_size=0).splits


def test_tensorflow_datasets_without_network_or_not_installed(monkeypatch):
    def unreachable(name, split):
        raise OSError("no route to host")

    stand_in(monkeypatch, unreachable)
    with pytest.raises(ValueError, match="no route to host.*give path="):
        gsm8k.gsm8k()
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"pip install rl_jax\[tasks\].*path="):
        gsm8k.gsm8k()


if PUBLISHED.is_dir():

    def test_the_published_problems():
        task = gsm8k.gsm8k(str(PUBLISHED))
        assert {name: len(split) for name, split in task.splits.items()} == {
            "train": 6961, "validation": 512, "held_out": 1319}
        for example in task.splits["held_out"][:100]:
            assert task.verifier.score(example.fields, task.tokenizer.decode(example.answer))["score"] == 1.0


def test_a_question_of_ones_own_is_asked_as_the_tasks_are():
    plain, chatty = (gsm8k.gsm8k(str(tiny.ROOT / "tests/ends/gsm8k"), validation_size=1, **more) for more in (
        {}, {"tokenizer": str(checkpoints.FOLDER / "chatml"), "chat": {"system": "Be short."}}))
    text = plain.splits["held_out"][0].text
    assert task.question(plain, text) == dataclasses.replace(plain.splits["held_out"][0], fields={}, answer=None)
    asked = task.question(chatty, text.rstrip("\n"))
    assert asked.text.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nSam has 2 cats")
    assert chatty.splits["held_out"][0].prompt == asked.prompt
