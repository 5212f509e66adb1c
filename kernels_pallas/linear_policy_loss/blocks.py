"""When one sweep over the logits is worth it, and how it cuts the rows."""
from kernels_pallas import dispatch
from kernels_pallas.linear_logprob import blocks as linear_blocks


# Measured on 2 CPU cores, jax 0.10 (BENCHMARKS.md), loss and gradients in one sweep against two steps, (M, V, D): 1.12
# of the time at (16,384, 64, 128), 0.83 to 0.91 at (8,192, 1,024, 128), 0.89 at (4,096, 4,096, 256). Every block of
# rows adds to the whole [V, D] gradient, which is cheap while that stays in a cache; a short row is cheap to make
# twice.
SMALLEST_VOCABULARY = 256
MOST_WEIGHTS = 1 << 20


def best(size: int, width: int, level: str) -> str:
    """"xla" (one sweep) where that was measured faster than "two_step", and the gate looks at one token at a time.

    Args:
      size, width: of the vocabulary, V and D.
      level: of the gate, "token" or "row".
    """
    worth_it = size >= SMALLEST_VOCABULARY and size * width <= MOST_WEIGHTS
    return "xla" if level == "token" and worth_it and dispatch.platform() == "cpu" else "two_step"


def row_blocks(rows: int, size: int) -> int:
    """Shares of the rows, each with all its logits in memory: at most 2^20 of them, or one row's."""
    return min(rows, -(-rows * size // linear_blocks.LOGITS))
