"""Trains the shipped SentencePiece tokenizer on the tasks' own text. Needs no network.

Command: python scripts/train_tokenizer.py --output=rl_jax/tasks/tokenizer.model
Needs: pip install rl_jax[tasks]; about 15 seconds on one CPU core; the same text gives the same file.
"""
import io
import random
from collections.abc import Iterator

import reasoning_gym
import sentencepiece
from absl import app, flags

from rl_jax.tasks.toys import addmod, chain

OUTPUT = flags.DEFINE_string("output", "rl_jax/tasks/tokenizer.model", "Where the model file goes.")
SIZE = flags.DEFINE_integer("size", 512, "Pieces, 256 single bytes and 4 control pieces included.")

ARITHMETIC = ("chain_sum", "basic_arithmetic", "products", "gcd", "lcm", "leg_counting", "decimal_chain_sum",
              "fraction_simplification", "simple_equations", "prime_factorization", "number_sequence", "count_primes")
NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hiro", "Ines", "Jonas")
THINGS = ("apples", "books", "clips", "dollars", "eggs", "flowers", "hours", "minutes", "pages", "tickets")
STORIES = (
    "{name} has {a} {things} and buys {b} more every day for {c} days. How many {things} does {name} have now?",
    "{name} bought {a} {things} that cost ${b} each. How much money did {name} pay in total?",
    "There are {a} {things} in each of {b} boxes. If {name} takes {c} of them, how many {things} are left?",
    "{name} sold {a} {things} in April, and then sold half as many in May. How many {things} were sold altogether?",
    "{name} reads {a} pages on the first day and twice as many on each of the other {c} days of the week. "
    "How many pages is that?")
SOLUTION = "{name} has {a} * {b} = {product} {things}.\nSo there are {product} + {c} = {total} {things}.\n#### {total}"


def arithmetic(each: int) -> Iterator[str]:
    """Questions and answers of reasoning_gym's arithmetic generators."""
    for generator in ARITHMETIC:
        for entry in reasoning_gym.create_dataset(generator, size=each, seed=0):
            yield f"{entry['question']}\n{entry['answer']}"


def stories(count: int) -> Iterator[str]:
    """Word problems in the style of GSM8K, each with a solution."""
    draw = random.Random(0)
    for _ in range(count):
        a, b, c = (draw.randint(2, 100) for _ in range(3))
        words = {"name": draw.choice(NAMES), "things": draw.choice(THINGS), "a": a, "b": b, "c": c}
        solution = SOLUTION.format(**words, product=a * b, total=a * b + c)
        yield f"{draw.choice(STORIES).format(**words)}\n{solution}"


def toys() -> Iterator[str]:
    """Questions of the toy tasks."""
    for task in (addmod.addmod(), chain.chain(train_size=128)):
        yield from (example.text for example in task.splits["train"])


def train(texts: Iterator[str], size: int) -> bytes:
    """The serialised model: BPE, one token per digit and line end, byte fallback, text left as it is."""
    model = io.BytesIO()
    lines = (line for text in texts for line in text.split("\n"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=size, model_type="bpe", byte_fallback=True,
        split_digits=True, user_defined_symbols=["\n"], normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, character_coverage=1.0, num_threads=1, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        minloglevel=2)
    return model.getvalue()


def main(_):
    def texts():
        yield from arithmetic(each=400)
        yield from stories(2000)
        yield from toys()

    model = train(texts(), SIZE.value)
    with open(OUTPUT.value, "wb") as file:
        file.write(model)
    print(f"{OUTPUT.value}: {len(model)} bytes, {SIZE.value} pieces")


if __name__ == "__main__":
    app.run(main)
