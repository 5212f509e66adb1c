"""Random prompts, answers of a fixed length, and the share of even ids as their score: work whose size never varies."""
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rl_jax.tasks import task

VERIFIERS = ("pure", "host")


class Numbers:
    """Ids written as decimal numbers. No id ends an answer, so that every answer has its whole budget."""

    def __init__(self, size: int):
        """
        Args:
          size: V, at least 2.
        """
        self.size, self.pad_id, self.end_id = size, 0, 0
        self.stop_ids: tuple[int, ...] = ()
        self.begin_ids: tuple[int, ...] = ()
        self.fingerprint = task.fingerprint("numbers", size=size)

    def encode(self, text: str) -> list[int]:
        """The ids that stand in a text, apart by blanks.

        Raises:
          ValueError: if something else stands there, or an id that is not below V.
        """
        words = text.split()
        if not all(word.isdecimal() and int(word) < self.size for word in words):
            raise ValueError(f"{text[:80]!r}: this vocabulary has the numbers from 0 to {self.size - 1}, apart by blanks.")
        return [int(word) for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        """The ids, apart by blanks."""
        return " ".join(str(int(i)) for i in ids)


def evens(vocabulary: int = 2048, *, prompt_length: int = 32, completion_length: int = 64, verifier: str = "pure",
          train_size: int = 1024, seed: int = 0) -> task.Task:
    """The score is the share of even ids among the answer's. Prompts are random ids and say nothing.

    Args:
      vocabulary: V, at least 2.
      prompt_length, completion_length: tokens of every prompt and every answer, at least 1.
      verifier: "pure", or "host" for the same score as a Python function of the text.
      train_size: prompts, at least 1.
      seed: of the prompts.
    """
    numbers = {"prompt_length": prompt_length, "completion_length": completion_length, "train_size": train_size}
    if vocabulary < 2 or min(numbers.values()) < 1 or verifier not in VERIFIERS:
        raise ValueError(f"vocabulary={vocabulary}, {numbers}, verifier={verifier!r}: allowed are a vocabulary of 2 or "
                         f"more, numbers from 1 on and a verifier of {VERIFIERS}.")
    tokenizer = Numbers(vocabulary)
    ids = np.random.default_rng(seed).integers(vocabulary, size=(train_size, prompt_length))
    examples = tuple(task.Example(prompt=row, text=tokenizer.decode(row)) for row in ids.tolist())
    return task.Task(
        name="evens", splits={"train": examples}, tokenizer=tokenizer,
        verifier=task.PureVerifier(score) if verifier == "pure" else task.HostVerifier(score_of_text),
        prompt_length=prompt_length, completion_length=completion_length,
        fingerprint=task.fingerprint("evens", vocabulary=vocabulary, verifier=verifier, seed=seed, **numbers))


def score(
    facts: dict[str, Array], tokens: Int[Array, "N T"], mask: Bool[Array, "N T"]
) -> tuple[Float[Array, " N"], dict[str, Float[Array, " N"]]]:
    """The share of even ids among the chosen tokens of each answer."""
    chosen = mask.sum(axis=1)
    return (mask & (tokens % 2 == 0)).sum(axis=1) / jnp.maximum(chosen, 1), {}


def score_of_text(fields: Mapping[str, Any], text: str) -> dict[str, float]:
    """`score` of an answer as text."""
    ids = [int(word) for word in text.split()]
    return {"score": sum(i % 2 == 0 for i in ids) / max(len(ids), 1)}
