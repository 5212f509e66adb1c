"""Block sizes from the shape and the device.

Not measured on a GPU or a TPU yet. GPU: about 1,024 numbers per array and program of 4 warps, 8 per thread, so that the
dozen arrays of a gate stay in registers. TPU: 32,768 numbers, 128 KiB per array: with ten operands double-buffered and
some twenty temporaries 5 of 16 MiB of VMEM; whole rows as long as 12 MiB allow for eight of them.
"""
from typing import NamedTuple

# Sizes for the CPU only serve the interpreter, for which few large blocks are best.
NUMBERS = {"gpu": 1024, "tpu": 32768, "cpu": 32768}
TOKENS = {"gpu": 1024, "tpu": 512, "cpu": 512}
ROWS_AT_LEAST = {"gpu": 1, "tpu": 8, "cpu": 1}
LONGEST_ROW = {"gpu": 16384, "tpu": 8192, "cpu": 16384}
LANES = 128


class Size(NamedTuple):
    """A block: rows, tokens (powers of two), and warps per program on a GPU."""

    rows: int
    tokens: int
    warps: int


def best(where: str, obstacle: str | None) -> str:
    """The implementation for "cpu", "gpu" or "tpu".

    On a CPU the interpreted kernel serves tests only. Elsewhere it is the kernel, and plain XLA for what cannot be in
    one: a gate with an operation that does not lower, or rows longer than `LONGEST_ROW` for a gate that reduces them.
    Measured on 2 CPU cores (jax 0.10, 512 x 1,024 tokens, gates of GRPO and GSPO with all diagnostics and gradient),
    "xla" and "reference" take the same time, about 9 and 7 ms, and move the same bytes: there XLA merges the passes.
    """
    return "xla" if where == "cpu" or obstacle is not None else "pallas"


def of_tokens(where: str, rows: int, tokens: int) -> Size:
    """Blocks for a gate that treats every token by itself."""
    wide = min(_power_of_two(max(tokens, LANES)), TOKENS[where])
    high = min(max(NUMBERS[where] // wide, 1), _power_of_two(rows))
    return Size(max(high, ROWS_AT_LEAST[where]), wide, warps=4)


def of_rows(where: str, rows: int, tokens: int) -> Size:
    """Blocks of whole rows; `too_long` says whether there are any."""
    wide = _power_of_two(max(tokens, LANES))
    high = min(max(NUMBERS[where] // wide, 1), _power_of_two(rows))
    return Size(max(high, ROWS_AT_LEAST[where]), wide, warps=min(max(wide // 512, 4), 16))


def too_long(where: str, tokens: int) -> str | None:
    """Why rows of so many tokens are no block, or None."""
    limit = LONGEST_ROW[where]
    if _power_of_two(tokens) <= limit:
        return None
    return (f"a gate at level='row' needs whole rows in one block, at most {limit} tokens here, and T = {tokens}: give "
            "its sums over the row to staged_gate")


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
