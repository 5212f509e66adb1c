"""Is the number that a solution ends in the right one? Imports no jax, as workers need it."""
import decimal
import logging
import re
from collections.abc import Mapping
from typing import Any

MARKER = "####"
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def stated(text: str) -> tuple[str, bool]:
    """(the answer that a solution states, whether it is marked).

    It is the first line after the last "####"; without one, the whole text, from which
    math-verify takes the last number.
    """
    _, marker, rest = text.rpartition(MARKER)
    return (rest.strip().split("\n")[0].strip(), True) if marker else (text, False)


def final(text: str) -> str | None:
    """The last number of the stated answer in plain decimals, None without one; equal numbers are equal text."""
    numbers = NUMBER.findall(stated(text)[0])
    return f"{decimal.Decimal(numbers[-1].replace(',', '')).normalize():f}" if numbers else None


class Number:
    """Equality of the stated answer with fields["answer"], by math-verify.

    math-verify's own time limits are off: they would turn an answer that cannot be checked into
    a wrong one, and the workers have theirs.
    """

    parts = ("marked",)

    def __init__(self):
        """Imports math-verify, so that importing it is no answer's time."""
        try:
            import math_verify
        except ImportError as error:
            raise ImportError("math-verify is not installed; this needs the extra 'tasks': "
                              "pip install rl_jax[tasks]") from error
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # It warns that its limits are off.
        self._parse, self._verify = math_verify.parse, math_verify.verify

    def __reduce__(self):
        return Number, ()

    def __call__(self, fields: Mapping[str, Any], text: str) -> dict[str, float]:
        """Score 1 for an equal number, and whether the answer was marked.

        Args:
          fields: "answer", the right number as text.
          text: the completion.
        """
        answer, marked = stated(text)
        right, given = (self._parse(t, parsing_timeout=None, raise_on_error=True) for t in (fields["answer"], answer))
        equal = self._verify(right, given, timeout_seconds=None, raise_on_error=True)
        return {"score": float(equal), "marked": float(marked)}
