"""The two small checkpoints' tokenizers beside this file, and what `transformers` says of them."""
import functools
import json
import pathlib

from rl_jax.tasks import checkpoint_tokenizer

FOLDER = pathlib.Path(__file__).parent
NAMES = ("chatml", "headers")


@functools.cache
def load(name):
    """One of them; do not change it."""
    return checkpoint_tokenizer.CheckpointTokenizer(FOLDER / name)


@functools.cache
def golden(name):
    """Texts and chats with what `transformers` made of them; scripts/make_test_tokenizers.py writes it."""
    return json.loads((FOLDER / name / "golden.json").read_text(encoding="utf-8"))


def ids(name, *texts):
    """The ids of tokens by their text."""
    return [load(name)._tokenizer.token_to_id(text) for text in texts]


def arguments(chat):
    """Keyword arguments of a golden chat's rendering."""
    return {"tools": chat.get("tools"), **chat.get("variables", {}),
            "add_generation_prompt": chat["add_generation_prompt"]}
