import random
import subprocess
import sys

import pytest

from rl_jax.tasks import task, tokenizer


@pytest.fixture(scope="module")
def shipped():
    return tokenizer.load()


@pytest.mark.parametrize("text", [
    "", " ", "   ", "a", " a", "a ", "  two  spaces  ", "\n", "\n\n a\n", "\t\ttabs\t", "\r\n", "a\x00b", "▁", " ▁ ▁▁a▁",
    "é", "e\u0301", "ﬁ Å ½ ²", "漢字かな", "🙂👩‍👩‍👧", "\ufeffbom", "<s></s><pad><unk>", "<0x0A>", "\u2028\u2029\u00a0",
    "State the final answer to the following arithmetic problem: 0 - 4 - 8 - 7 ="])
def test_any_text_round_trips(shipped, text):
    assert shipped.decode(shipped.encode(text)) == text


def test_random_text_round_trips(shipped):
    draw = random.Random(0)
    for _ in range(300):
        points = (draw.choice((draw.randrange(128), draw.randrange(0x800), draw.randrange(0x10000, 0x11000), 32, 0x2581))
                  for _ in range(20))
        text = "".join(map(chr, points))
        assert shipped.decode(shipped.encode(text)) == text


def test_special_ids_have_no_text(shipped):
    assert isinstance(shipped, task.Tokenizer)
    assert len({shipped.pad_id, shipped.end_id, shipped.begin_id}) == 3 and shipped.size == 512
    assert shipped.decode([shipped.begin_id, *shipped.encode("a b"), shipped.end_id, shipped.pad_id]) == "a b"


def test_every_single_id_can_be_decoded(shipped):
    assert all(isinstance(shipped.decode([i]), str) for i in range(shipped.size))


def test_bytes_that_are_no_text_are_replaced(shipped):
    half = shipped.encode("漢")[:1]
    assert shipped.decode(half) == "\ufffd"


def test_digits_and_line_ends_are_tokens_of_their_own(shipped):
    assert len(shipped.encode("1234567890")) == 10
    assert len(shipped.encode("\n\n")) == 2
    assert shipped.encode("12\n3")[:2] == shipped.encode("12")


def test_arithmetic_is_short(shipped):
    """Three and four terms are 8 and 11 tokens; the whole question has 11 more."""
    assert [len(shipped.encode(text)) for text in ("1 + 2 - 3 =", "0 - 4 - 8 - 7 =")] == [8, 11]
    assert len(shipped.encode("State the final answer to the following arithmetic problem: 0 - 4 - 8 - 7 =")) == 22


def test_a_path_and_a_missing_one(shipped, tmp_path):
    file = tmp_path / "other.model"
    file.write_bytes((tokenizer.importlib.resources.files("rl_jax.tasks") / "tokenizer.model").read_bytes())
    assert tokenizer.load(str(file)).fingerprint == shipped.fingerprint
    with pytest.raises(ValueError, match="no tokenizer at"):
        tokenizer.load(str(tmp_path / "none.model"))


@pytest.mark.slow
def test_the_script_makes_the_shipped_model(shipped, tmp_path):
    file = tmp_path / "again.model"
    subprocess.run([sys.executable, "scripts/train_tokenizer.py", f"--output={file}"], check=True,
                   env={"PYTHONPATH": "."})
    assert tokenizer.load(str(file)).fingerprint == shipped.fingerprint
