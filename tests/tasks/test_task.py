import pytest

from rl_jax.tasks import task
from rl_jax.tasks.toys import symbols

TOKENIZER = symbols.Symbols("0123456789+=")


def make(splits):
    return task.Task(name="t", splits=splits, tokenizer=TOKENIZER, verifier=task.PureVerifier(lambda *_: None),
                     prompt_length=4, completion_length=2, fingerprint="f")


def test_an_empty_or_missing_split_is_an_error():
    example = task.Example(prompt=[2], text="0")
    assert make({"train": [example]}).splits["train"][0] is example
    with pytest.raises(ValueError, match="'train' is missing"):
        make({"held_out": [example]})
    with pytest.raises(ValueError, match="'validation' is empty"):
        make({"train": [example], "validation": []})


def test_fingerprint_depends_on_name_and_values_only():
    assert task.fingerprint("a", x=1, y=[2]) == task.fingerprint("a", y=[2], x=1)
    assert len({task.fingerprint("a", x=1), task.fingerprint("b", x=1), task.fingerprint("a", x=2)}) == 3


def test_prompt_length_names_length_limit_and_remedy():
    assert task.encoded_prompt(TOKENIZER, "1+2=", 4) == TOKENIZER.encode("1+2=")
    with pytest.raises(ValueError, match=r"5 tokens.*1 to 4.*'1\+23='.*at least 5"):
        task.encoded_prompt(TOKENIZER, "1+23=", 4)
    with pytest.raises(ValueError, match="0 tokens"):
        task.encoded_prompt(TOKENIZER, "", 4)


def test_answer_length_counts_the_end():
    assert task.encoded_answer(TOKENIZER, "3", 2) == [5, TOKENIZER.end_id]
    with pytest.raises(ValueError, match="3 tokens.*allows 2.*at least 3"):
        task.encoded_answer(TOKENIZER, "12", 2)
