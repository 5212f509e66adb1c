"""What is asked, and what counts as right."""
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Array, Float


class Tokenizer(Protocol):
    """Text to token ids and back.

    `fingerprint` is a digest of the vocabulary: two tokenizers with one fingerprint give the
    same ids. `pad_id` may equal `end_id`.
    """

    size: int
    pad_id: int
    end_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without begin and end tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; the end token and padding have none."""


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
    """

    name: str
    splits: Mapping[str, Sequence[Example]]
    tokenizer: Tokenizer
    verifier: PureVerifier | HostVerifier
    prompt_length: int
    completion_length: int
    fingerprint: str

    def __post_init__(self):
        if "train" not in self.splits:
            raise ValueError(f"task {self.name!r} has splits {sorted(self.splits)}: 'train' is missing.")
        for name, split in self.splits.items():
            if len(split) == 0:
                raise ValueError(f"task {self.name!r}: split {name!r} is empty; give it at least one example "
                                 "(a larger size, another file) or leave the split out.")
