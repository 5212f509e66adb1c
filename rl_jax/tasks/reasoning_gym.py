"""Any of reasoning_gym's generators as a task, with splits that share no question."""
import functools
from collections.abc import Mapping
from typing import Any

from rl_jax.tasks import chat as chats
from rl_jax.tasks import generators, task
from rl_jax.tasks import tokenizer as tokenizers

DRAWS_PER_QUESTION = 4

Drawn = tuple[str, Mapping[str, Any]]


def reasoning_gym(
    generator: str,
    *,
    options: Mapping[str, Any] | None = None,
    train_size: int = 20_000,
    validation_size: int = 256,
    held_out_size: int = 512,
    seed: int = 0,
    prompt_length: int = 32,
    completion_length: int = 8,
    keep_after: str = "",
    partial_credit: bool = False,
    tokenizer: str | task.Tokenizer | None = "",
    chat: Mapping[str, Any] | None = None,
) -> task.Task:
    """Questions of one generator; its own scorer is the verifier, and correct means full credit.

    Each split draws from seeds of its own. Held-out questions are distinct; validation repeats none
    of them, and training none of either. Training may ask a question twice, as the generator does.
    The part "partial_credit" is the scorer's number.

    Args:
      generator: one of reasoning_gym's names.
      options: fields of the generator's own configuration.
      train_size, validation_size, held_out_size: questions; 0 leaves the split out. A generator
        with few distinct questions gives fewer, see `report`.
      seed: fixes the questions; two seeds may share some.
      prompt_length: S, in tokens.
      completion_length: T, in tokens, the end token included.
      keep_after: only what follows the last of these in a question is asked: ": " leaves the
        arithmetic of "State the final answer to ...: 1 + 2 ="; "" asks the whole question.
      partial_credit: whether the score is the partial credit.
      tokenizer: what the questions are written in: one, or a name as `tokenizer.load` has it; "" or
        None takes the shipped one.
      chat: None asks in plain text. Otherwise each question is a user turn of the tokenizer's chat
        template; the mapping may be empty or have "system" (a system turn), "instruction" (a line
        behind the question that says how to answer) and variables of the template, such as
        enable_thinking.

    Raises:
      ValueError: for an unknown generator or option, a split that stays empty, or a question or
        answer that is too long.
    """
    options, tokenizer = dict(options or {}), tokenizers.resolved(tokenizer)
    sizes = {"held_out": held_out_size, "validation": validation_size, "train": train_size}
    if min(sizes.values()) < 0 or train_size < 1:
        raise ValueError(f"sizes={sizes}: allowed are train_size >= 1 and the others >= 0.")
    sources = _sources(generator, options, seed, sizes)
    splits, report = _deal(sources, sizes, keep_after)
    empty = [name for name, size in sizes.items() if size and not splits[name]]
    if empty:
        raise ValueError(f"{generator!r} with options {options} has too few distinct questions, none is left for "
                         f"{' and '.join(empty)} ({report}). Ask for smaller splits, or give options with more "
                         "questions.")
    examples = {name: tuple(_example(text, entry, tokenizer, chat, prompt_length, completion_length)
                            for text, entry in split) for name, split in splits.items() if split}
    made_from = {name: [text for text, _ in split] for name, split in splits.items()}
    if chat is not None:
        made_from["chat"] = dict(chat)
    return task.Task(
        name=f"reasoning_gym.{generator}", splits=examples, tokenizer=tokenizer,
        verifier=task.HostVerifier(generators.Scorer(generator, options, partial_credit), ("partial_credit",)),
        prompt_length=prompt_length, completion_length=completion_length,
        fingerprint=task.fingerprint(generator, **made_from), report=f"{generator}: {report}",
        asked=functools.partial(chats.prompt, tokenizer, chat=chat, prompt_length=prompt_length))


def _sources(generator: str, options: Mapping[str, Any], seed: int, sizes: Mapping[str, int]) -> dict[str, Any]:
    """A dataset per split, from seeds that no other split draws from."""
    span = DRAWS_PER_QUESTION * max(sizes.values())
    return {name: generators.dataset(generator, options, seed=(len(sizes) * seed + i) * span, size=span)
            for i, name in enumerate(sizes)}


def _deal(
    sources: Mapping[str, Any], sizes: Mapping[str, int], keep_after: str
) -> tuple[dict[str, list[Drawn]], str]:
    """(question and entry by split, how many were drawn and left out); no question is in two splits.

    The first splits choose first, and only the last, training, asks a question twice.
    """
    splits, counts, asked = {}, [], set()
    for name, size in sizes.items():
        split, drawn = [], 0
        while len(split) < size and drawn < DRAWS_PER_QUESTION * size:
            entry = sources[name][drawn]
            text = _rendered(entry["question"], keep_after)
            drawn += 1
            if text not in asked:
                split.append((text, entry))
                if name != "train":
                    asked.add(text)
        splits[name] = split
        counts.append(f"{name} {len(split)} of {size} ({drawn} drawn, {drawn - len(split)} left out as repeated)")
    return splits, "; ".join(counts)


def _rendered(question: str, keep_after: str) -> str:
    if keep_after not in question:
        raise ValueError(f"keep_after={keep_after!r} is not in the question {question[:200]!r}; \"\" asks whole "
                         "questions.")
    return question.rsplit(keep_after, 1)[-1] if keep_after else question


def _example(
    question: str, entry: Mapping[str, Any], tokenizer: task.Tokenizer, chat: Mapping[str, Any] | None,
    prompt_length: int, completion_length: int
) -> task.Example:
    """Some generators have no answer of their own, only a scorer."""
    answer = entry["answer"]
    ids, text = chats.prompt(tokenizer, question, chat, prompt_length)
    return task.Example(
        prompt=ids, text=text, fields=dict(entry),
        answer=None if answer is None else task.encoded_answer(tokenizer, str(answer), completion_length))
