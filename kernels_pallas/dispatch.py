"""Which implementation of an op runs."""
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def implementation(op: str, asked: str | None, best: str, allowed: Mapping[str, T]) -> T:
    """The implementation that was asked for, or the best measured one; never a silent substitute.

    Args:
      op: the op's name, for the message.
      asked: a key of `allowed`, or None for `best`.
      best: the fastest measured on this device.
      allowed: what exists, by name.

    Raises:
      ValueError: nothing of that name exists.
    """
    name = best if asked is None else asked
    if name not in allowed:
        raise ValueError(f"{op} has no implementation {name!r}; allowed are None and {sorted(allowed)}.")
    return allowed[name]
