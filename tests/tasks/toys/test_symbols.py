import pytest

from rl_jax.tasks import task
from rl_jax.tasks.toys import symbols


def test_round_trip_and_protocol():
    tokenizer = symbols.Symbols("01+=")
    assert isinstance(tokenizer, task.Tokenizer)
    ids = tokenizer.encode("1+0=")
    assert ids == [3, 4, 2, 5] and tokenizer.size == 6
    assert tokenizer.decode([*ids, tokenizer.end_id, tokenizer.pad_id]) == "1+0="


def test_fingerprint_is_of_the_vocabulary():
    assert symbols.Symbols("01").fingerprint == symbols.Symbols("01").fingerprint != symbols.Symbols("10").fingerprint


def test_unknown_and_repeated_characters():
    with pytest.raises(ValueError, match=r"\['x'\]"):
        symbols.Symbols("01").encode("0x")
    with pytest.raises(ValueError, match="once"):
        symbols.Symbols("00")
