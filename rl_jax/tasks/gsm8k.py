"""GSM8K: grade-school word problems with a number as answer. Cobbe et al. 2021, arXiv:2110.14168."""
import functools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from rl_jax.reward import numeric
from rl_jax.tasks import chat as chats
from rl_jax.tasks import task
from rl_jax.tasks import tokenizer as tokenizers

ANNOTATION = re.compile("<<[^>]*>>")

Problem = Mapping[str, str]


def gsm8k(
    path: str = "",
    *,
    prompt_length: int = 640,
    completion_length: int = 768,
    validation_size: int = 512,
    seed: int = 0,
    tokenizer: str | task.Tokenizer | None = "",
    chat: Mapping[str, Any] | None = None,
) -> task.Task:
    """Problems with a worked solution that ends in "#### <number>"; math-verify compares the number.

    Held out are the published test problems, validation is taken from the training problems. The
    solutions lose their calculator annotations (`<<48/2=24>>`). The part "marked" says whether an
    answer had the "####".

    Args:
      path: folder with train.jsonl and test.jsonl, lines of {"question", "answer"}; "" asks
        tensorflow-datasets, which downloads them once.
      prompt_length: S, in tokens; the longest question has 580 of the shipped tokenizer's.
      completion_length: T, in tokens, the end token included; the longest solution has 711.
      validation_size: problems taken from training.
      seed: fixes which.
      tokenizer: what the problems are written in: one, or a name as `tokenizer.load` has it; "" or None
        takes the shipped one.
      chat: None asks in plain text. Otherwise each question is a user turn of the tokenizer's chat
        template; the mapping may be empty or have "system" (a system turn), "instruction" (a line
        behind the question, such as one that asks for the answer behind "####") and variables of the
        template, such as enable_thinking.

    Raises:
      ValueError: for files that are missing or hold something else, and for a problem or solution
        that is too long.
    """
    tokenizer = tokenizers.resolved(tokenizer)
    train, held_out = (_from_files(path, split) if path else _from_tfds(split) for split in ("train", "test"))
    if not 0 <= validation_size < len(train):
        raise ValueError(f"validation_size={validation_size}: there are {len(train)} training problems, and at least "
                         "one must be left to train on.")
    held_out_questions = {problem["question"] for problem in held_out}
    order = np.random.default_rng(seed).permutation(len(train))
    chosen = {name: [train[i] for i in np.sort(part) if train[i]["question"] not in held_out_questions]
              for name, part in (("train", order[validation_size:]), ("validation", order[:validation_size]))}
    chosen["held_out"] = held_out
    splits = {name: tuple(_example(problem, tokenizer, chat, prompt_length, completion_length) for problem in problems)
              for name, problems in chosen.items() if problems}
    made_from = chosen if chat is None else {**chosen, "chat": dict(chat)}
    return task.Task(
        name="gsm8k", splits=splits, tokenizer=tokenizer,
        verifier=task.HostVerifier(numeric.Number(), numeric.Number.parts), prompt_length=prompt_length,
        completion_length=completion_length, fingerprint=task.fingerprint("gsm8k", **made_from),
        report="gsm8k: " + ", ".join(f"{name} {len(split)}" for name, split in splits.items()),
        final_answer=numeric.final,
        asked=functools.partial(chats.prompt, tokenizer, chat=chat, prompt_length=prompt_length))


def _from_files(path: str, split: str) -> list[Problem]:
    file = pathlib.Path(path) / f"{split}.jsonl"
    if not file.is_file():
        raise ValueError(f"there is no file {str(file)!r}: path={path!r} must be a folder with train.jsonl and "
                         "test.jsonl, or \"\" for tensorflow-datasets.")
    lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    if lines == [""]:
        raise ValueError(f"{file} is empty: it must have at least one problem.")
    problems = []
    for number, line in enumerate(lines, start=1):
        try:
            problems.append(_checked(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{file}, line {number}: expected {{"question": ..., "answer": "... #### <number>"}}, '
                             f"found {line[:80]!r} ({error!r}).") from error
    return problems


def _from_tfds(split: str) -> list[Problem]:
    try:
        import tensorflow_datasets
        import tensorflow_datasets.text.gsm8k  # Makes the name known.
    except ImportError as error:
        raise ImportError(f"GSM8K without files needs tensorflow-datasets ({error}): pip install rl_jax[tasks], or "
                          "give path=<folder with train.jsonl and test.jsonl>.") from error
    try:
        source = tensorflow_datasets.data_source("gsm8k", split=split)
    except Exception as error:
        raise ValueError(f"tensorflow-datasets cannot give GSM8K ({error!r}): it downloads once and needs the network "
                         "then. Otherwise give path=<folder with train.jsonl and test.jsonl>.") from error
    return [_checked({name: source[i][name].decode() for name in ("question", "answer")}) for i in range(len(source))]


def _checked(problem: Problem) -> Problem:
    question, solution = problem["question"], problem["answer"]
    _, marked = numeric.stated(solution)
    if not question.strip() or not marked:
        raise ValueError(f"no question, or no {numeric.MARKER!r} before the answer")
    return {"question": question, "answer": solution}


def _example(problem: Problem, tokenizer: task.Tokenizer, chat: Mapping[str, Any] | None, prompt_length: int,
             completion_length: int) -> task.Example:
    question = problem["question"] + ("\n" if chat is None else "")
    ids, text = chats.prompt(tokenizer, question, chat, prompt_length)
    solution = ANNOTATION.sub("", problem["answer"])
    return task.Example(
        prompt=ids, text=text, fields={"answer": numeric.stated(solution)[0]},
        answer=task.encoded_answer(tokenizer, solution, completion_length))
