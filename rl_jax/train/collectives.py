"""What devices exchange in a compiled program, read from its text."""
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s8": 8, "u8": 8, "f8e4m3fn": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
        "f32": 32, "s64": 64, "u64": 64, "f64": 64}
CALL = re.compile(rf" = (?P<results>\(.*?\)|\S+) (?P<kind>{'|'.join(KINDS)})(-start)?\(")
ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<shape>[\d,]*)\]")


class Collective(NamedTuple):
    """One exchange.

    Attributes:
      kind: of `KINDS`.
      shapes: of its results on one device.
      bytes: of those results.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int


def of(text: str) -> list[Collective]:
    """The collectives of a compiled program, once each, whether in a loop or not.

    Args:
      text: of the compiled program (`compiled.as_text()`).
    """
    found = []
    for line in text.splitlines():
        call = CALL.search(line)
        if call is None:
            continue
        arrays = [(one["dtype"], tuple(int(n) for n in one["shape"].split(",") if n))
                  for one in ARRAY.finditer(call["results"])]
        if call[3]:  # the start of an asynchronous one lists its operands before its results
            arrays = arrays[len(arrays) // 2:]
        size = sum(math.prod(shape) * BITS[dtype] // 8 for dtype, shape in arrays)
        found.append(Collective(call["kind"], tuple(shape for _, shape in arrays), size))
    return found


def table(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """By kind, how many there are and their bytes; kinds that do not occur are left out."""
    rows: dict[str, tuple[int, int]] = {}
    for one in found:
        count, size = rows.get(one.kind, (0, 0))
        rows[one.kind] = count + 1, size + one.bytes
    return rows
