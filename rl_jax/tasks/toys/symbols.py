"""A vocabulary of single characters: what the toy tasks are written in."""
import dataclasses
from collections.abc import Sequence

from rl_jax.tasks import task

PAD, END, FIRST = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Symbols:
    """One token per character: ids 0 and 1 are padding and end, character i has id FIRST + i.

    Attributes:
      characters: the vocabulary in the order of its ids, each once.
    """

    characters: str

    def __post_init__(self):
        if len(set(self.characters)) != len(self.characters):
            raise ValueError(f"characters={self.characters!r}: each may stand there once.")

    @property
    def size(self) -> int:
        """V, padding and end included."""
        return FIRST + len(self.characters)

    @property
    def pad_id(self) -> int:
        """0."""
        return PAD

    @property
    def end_id(self) -> int:
        """1."""
        return END

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """(1,)."""
        return (END,)

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """None."""
        return ()

    @property
    def fingerprint(self) -> str:
        """A digest of the characters in their order."""
        return task.fingerprint("symbols", characters=self.characters)

    def encode(self, text: str) -> list[int]:
        """One id per character.

        Raises:
          ValueError: if a character is not in the vocabulary.
        """
        unknown = sorted(set(text) - set(self.characters))
        if unknown:
            raise ValueError(f"{text!r} has {unknown}, and this vocabulary only {self.characters!r}.")
        return [FIRST + self.characters.index(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        """One character per id; padding and end have none."""
        return "".join(self.characters[i - FIRST] for i in ids if i >= FIRST)
