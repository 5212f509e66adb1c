"""When one sweep over the logits is worth it, and how it cuts the rows."""
from kernels_pallas import dispatch
from kernels_pallas.linear_logprob import blocks as linear_blocks


def best(size: int, level: str) -> str:
    """"xla" (one sweep) where that was measured faster than "two_step", and the gate looks at one token at a time.

    Args:
      size: V.
      level: of the gate, "token" or "row".
    """
    whole = size <= linear_blocks.ONE_TILE
    return "xla" if level == "token" and whole and dispatch.platform() == "cpu" else "two_step"


def row_blocks(rows: int, size: int) -> int:
    """Equal shares of the rows, each with all its logits in memory: about 2^20 of them."""
    wish = max(1, rows * size // linear_blocks.LOGITS)
    return next((count for count in range(wish, 2 * wish) if rows % count == 0), 1)
