"""Which implementation runs where, and how time is cut."""
import math

from kernels_pallas import dispatch

# Not measured on a GPU or a TPU yet. A block has about sqrt(T) steps, so that the sweeps inside blocks and the scan
# between them are equally long; 256 steps of (8, 128) float32 numbers, three arrays, two buffers each, are 6 MiB of
# VMEM. Loads of 8 steps do not wait for the recursion and hide each other's latency.
LONGEST_BLOCK = 256
ONE_BLOCK = 128
LANES = 128
TPU_GROUPS = 8
STEPS_READ_TOGETHER = 8


def best() -> str:
    """The recursion as it stands on a CPU, the kernels elsewhere, where a loop of XLA's pays a launch per step.

    Measured on 2 loaded CPU cores, jax 0.10.2, float32, 256 x 64 to 64 x 8,192, alternating: of the recursion's time
    (0.02 us a step for 8 rows) jax.lax.associative_scan takes 1.2 to 4.7 times as much, blocks of 2 to 256 steps 0.5
    to 4.0 times. They are under it only with more than 2^19 numbers, and there 0.8 to 1.5 with their gradient.
    """
    return "reference" if dispatch.platform() == "cpu" else "pallas"


def steps(time: int) -> int:
    """Steps in a block: all of a short time, else the power of 2 next to its square root, 256 at most."""
    return time if time <= ONE_BLOCK else min(LONGEST_BLOCK, 2 ** round(math.log2(time) / 2))


def groups(count: int) -> int:
    """How many groups of 128 rows a program takes: a TPU's register on a TPU, a row per thread on a GPU."""
    return 1 if dispatch.platform() == "gpu" else min(count, TPU_GROUPS)
