"""Sizes of tiles from the shape and the device."""
from typing import NamedTuple

from kernels_pallas import dispatch

# Measured on 2 shared CPU cores, jax 0.10, float32, vmapped over the group in a while_loop that fills the cache, in
# processor time per step, against one softmax over caches [.., T, K, E]: P = 16, G = 8, S = T = 64, H = 4, K = 2,
# E = 32 (one tile): 0.30 ms, before 0.81. P = G = 8, S = T = 512, H = 8, K = 4, E = 64: 17 ms, before 27; one softmax
# over caches [.., K, T, E]: 33. Tiles of 32, 64 and 128 gave 18, 16 and 22 ms of wall time there.
TILE_ON_CPU = 64
# A tile is taken for all sequences at once where at least one in so many sees it. Measured there, other processes running,
# in processor time: lengths of a long tail in 32 caches of 512, K = 4, E = 32: 0.98 ms for all at once, 0.37, 0.46 and 0.68
# with 2, 4 and 8; where all lengths are 300, 0.93 and 0.87.
SHARE_ON_CPU = 2

# Not measured on a GPU. A program holds 64 query rows at most, so that the sums of a head of 128 are 64 float32 per
# thread; a tile of keys and one of values are 32 KiB together in bfloat16; there are enough programs for two on each
# of 132 multiprocessors, as long as each has four tiles to work on.
ROWS_ON_GPU = 64
TILE_BYTES_ON_GPU = 16 << 10
PROGRAMS_ON_GPU = 264
TILES_PER_PROGRAM = 4

# Not measured on a TPU, but compiled for a v5e at the shapes of Qwen3-0.6B to Gemma-3-4B. A block of keys has at most
# 1 MiB; with that of values and the copies that are under way it takes 4 of the 16 MiB of VMEM of a v5e. Queries and
# sums may take ROWS_BYTES_ON_TPU.
BLOCK_BYTES_ON_TPU = 1 << 20
ROWS_BYTES_ON_TPU = 4 << 20
LONGEST_TILE_ON_TPU = 512
SHORTEST_TILE_ON_TPU = 128

FEWEST = 16  # rows and positions of a matrix product on a GPU


class Blocks(NamedTuple):
    """How the work of one kernel call is cut.

    Attributes:
      heads: key heads per program.
      rows: query rows per program; they are padded to a multiple of it.
      tile: positions per matrix product.
      splits: programs that share the positions of a head, to be merged afterwards. 1 where `walk`.
      walk: the last grid axis goes from tile to tile, in order; otherwise a program loops over its tiles itself.
    """

    heads: int
    rows: int
    tile: int
    splits: int
    walk: bool


def best(head_size: int) -> str:
    """The kernel on an accelerator that takes the head size, else "xla"; on a CPU, measured, "ragged"."""
    if dispatch.platform() == "cpu":
        return "ragged"
    return "pallas" if refused(head_size) is None else "xla"


def refused(head_size: int) -> str | None:
    """Why the kernel cannot run, or None."""
    if dispatch.platform() == "gpu" and (head_size < FEWEST or head_size & (head_size - 1)):
        return f"head size {head_size}: Triton multiplies matrices whose sides are powers of two, {FEWEST} or more"
    return None


def tile_on_cpu(positions: int) -> int:
    """Positions per step of the plain XLA form: all of a short cache."""
    return positions if positions <= TILE_ON_CPU else TILE_ON_CPU


def choose(sequences: int, key_heads: int, rows: int, positions: int, head_size: int, item_bytes: int,
           window: int | None = None) -> Blocks:
    """Blocks for caches [sequences, key_heads, positions, head_size] and `rows` query rows per key head.

    Args:
      window: the most positions that a row sees; None: all.
    """
    rows = max(FEWEST, _power_of_two(rows))
    if dispatch.platform() == "tpu":
        return _choose_on_tpu(key_heads, rows, positions, head_size * item_bytes, head_size * 4)
    rows = min(rows, ROWS_ON_GPU)
    tile = max(FEWEST, TILE_BYTES_ON_GPU // (head_size * item_bytes))
    tile = min(_power_of_two(tile), _power_of_two(positions + 1) // 2)
    programs = sequences * key_heads
    reach = positions if window is None else min(positions, window)
    splits = max(1, min(-(-PROGRAMS_ON_GPU // programs), reach // (TILES_PER_PROGRAM * tile)))
    return Blocks(heads=1, rows=rows, tile=tile, splits=splits, walk=False)


def _choose_on_tpu(key_heads: int, rows: int, positions: int, key_bytes: int, sum_bytes: int) -> Blocks:
    heads = max(heads for heads in range(1, key_heads + 1) if key_heads % heads == 0 and (
        heads == 1 or (heads * SHORTEST_TILE_ON_TPU * key_bytes <= BLOCK_BYTES_ON_TPU
                       and heads * rows * sum_bytes <= ROWS_BYTES_ON_TPU)))
    tile = BLOCK_BYTES_ON_TPU // (heads * key_bytes) // SHORTEST_TILE_ON_TPU * SHORTEST_TILE_ON_TPU
    tile = max(SHORTEST_TILE_ON_TPU, min(tile, LONGEST_TILE_ON_TPU))
    return Blocks(heads=heads, rows=rows, tile=min(tile, positions), splits=1, walk=True)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (number - 1).bit_length()
