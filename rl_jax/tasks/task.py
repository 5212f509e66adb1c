"""What is asked, and what counts as right."""
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back.

    `fingerprint` is a digest of the vocabulary: two tokenizers with one fingerprint give the
    same ids.

    Attributes:
      size: V, the largest id plus one.
      pad_id: fills rows up; may be one of `stop_ids`.
      end_id: put behind given answers; one of `stop_ids`, where there are any.
      stop_ids: every id that ends an answer; none where all answers have their whole budget.
      begin_ids: put in front of a prompt of plain text.
    """

    size: int
    pad_id: int
    end_id: int
    stop_ids: tuple[int, ...]
    begin_ids: tuple[int, ...]
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without begin and end tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; stop tokens and padding have none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One question.

    Attributes:
      prompt: token ids, at least one.
      text: the prompt as a person reads it.
      fields: what a host verifier is told (answer, metadata); plain Python values.
      facts: what a pure verifier is told: arrays of the same shape and dtype for every example.
      answer: a worked solution as token ids with the end token, to learn from; None if there is none.
      domain: which part of the task it is from.
    """

    prompt: Sequence[int]
    text: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    answer: Sequence[int] | None = None
    domain: int = 0


@dataclasses.dataclass(frozen=True)
class PureVerifier:
    """Scores token ids in JAX, inside the program.

    Attributes:
      score: (facts with leading axis N, tokens [N, T], mask [N, T]) -> (score [N], parts), where
        parts are further [N] arrays by name, for the metrics. 1 means correct.
    """

    score: Callable[[dict[str, Array], Array, Array], tuple[Float[Array, " N"], dict[str, Float[Array, " N"]]]]


@dataclasses.dataclass(frozen=True)
class HostVerifier:
    """Scores text in Python, in worker processes.

    Attributes:
      score: a picklable (fields, completion text) -> mapping with "score" and, if there are any,
        further named parts; 1 means correct. It may raise or hang: that is counted as a failure,
        and the answer is left out of the statistics.
      parts: names of the further parts, fixed in advance.
      time_limit_s: seconds for one answer.
    """

    score: Callable[[Mapping[str, Any], str], Mapping[str, float]]
    parts: tuple[str, ...] = ()
    time_limit_s: float = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Questions in splits, the tokenizer they are written in, and the verifier.

    Attributes:
      name: for logs and the fingerprint.
      splits: "train", "validation", "held_out", each a sequence of `Example`.
      tokenizer: what the ids mean.
      verifier: pure or host.
      prompt_length: S, the longest prompt in tokens.
      completion_length: T, the generation budget in tokens, the end token included.
      fingerprint: digest of what the questions were made from (name, arguments, sizes, seeds).
      report: how the splits came about, for a person to read before the run.
      final_answer: a completion's answer in a form that equal answers share, None if it has none;
        what majority voting counts.
      asked: a question -> (token ids, text) of its prompt, as the task's own are asked; None asks in plain text.
    """

    name: str
    splits: Mapping[str, Sequence[Example]]
    tokenizer: Tokenizer
    verifier: PureVerifier | HostVerifier
    prompt_length: int
    completion_length: int
    fingerprint: str
    report: str = ""
    final_answer: Callable[[str], str | None] = lambda text: text.strip() or None
    asked: Callable[[str], tuple[list[int], str]] | None = None

    def __post_init__(self):
        if "train" not in self.splits:
            raise ValueError(f"task {self.name!r} has splits {sorted(self.splits)}: 'train' is missing.")
        for name, split in self.splits.items():
            if len(split) == 0:
                raise ValueError(f"task {self.name!r}: split {name!r} is empty; give it at least one example "
                                 "(a larger size, another file) or leave the split out.")


def question(of: Task, text: str) -> Example:
    """A question of a person's own as an example, asked as the task's are.

    Raises:
      ValueError: if it is too long.
    """
    ids, shown = (encoded_prompt(of.tokenizer, text, of.prompt_length), text) if of.asked is None else of.asked(text)
    return Example(prompt=ids, text=shown)


def fingerprint(name: str, **made_from: Any) -> str:
    """16 hexadecimal digits that change when anything that the questions were made from does.

    Args:
      name: the task's.
      made_from: arguments, sizes and seeds as plain values, or digests of files.
    """
    text = json.dumps([name, made_from], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def encoded_prompt(tokenizer: Tokenizer, text: str, prompt_length: int) -> list[int]:
    """The token ids of a question, the tokenizer's begin tokens in front.

    Args:
      prompt_length: S, the most tokens it may have.

    Raises:
      ValueError: if it has more, or none.
    """
    return within([*tokenizer.begin_ids, *tokenizer.encode(text)], text, prompt_length)


def within(ids: list[int], text: str, prompt_length: int) -> list[int]:
    """The ids of a prompt, if there are neither none nor too many.

    Args:
      text: what they spell, for the error.
      prompt_length: S, the most there may be.
    """
    if not 0 < len(ids) <= prompt_length:
        raise ValueError(f"a prompt has {len(ids)} tokens and prompt_length allows 1 to {prompt_length}: "
                         f"{text[:80]!r}. Set prompt_length to at least {max(len(ids), 1)}, or make the questions "
                         "shorter.")
    return ids


def encoded_answer(tokenizer: Tokenizer, text: str, completion_length: int) -> list[int]:
    """The token ids of a worked solution, the end token included.

    Args:
      completion_length: T, the most tokens it may have with the end token.

    Raises:
      ValueError: if it has more.
    """
    ids = [*tokenizer.encode(text), tokenizer.end_id]
    if len(ids) > completion_length:
        raise ValueError(f"a worked solution has {len(ids)} tokens with its end and completion_length allows "
                         f"{completion_length}: {text[:80]!r}. Set completion_length to at least {len(ids)}.")
    return ids
