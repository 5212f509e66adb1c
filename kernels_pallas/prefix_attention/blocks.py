"""Which implementation runs, and the sizes of its blocks."""
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas import dispatch
from kernels_pallas.prefix_attention.operands import Operands
from kernels_pallas.prefix_attention.visibility import Options

QUERY_TILE = 128
QUERY_TILES = 16
KEPT_WEIGHTS = 1 << 22

GPU_TILE, GPU_WIDE_TILE = 64, 32
TPU_TILE, TPU_WIDE_TILE = 256, 128
WIDE_HEAD = 128
LANES = 128
VMEM_BYTES = 12 << 20


class Tiles(NamedTuple):
    """Positions per tile: of a row (queries and keys alike), and of a prompt."""

    own: int
    prompt: int


def best(tokens: int, positions: int, head_size: int, dtype: DTypeLike) -> str:
    """The implementation that runs where nobody asks for one."""
    if dispatch.platform() == "cpu":
        return "xla"
    return "pallas" if fits(tokens, positions, head_size, dtype) else "xla"


def query_tile(tokens: int) -> int:
    """Queries per tile of the plain XLA form: 128, but never more than 16 tiles."""
    return min(tokens, max(QUERY_TILE, -(-tokens // QUERY_TILES)))


def keeps_weights(operands: Operands, options: Options) -> bool:
    """Whether the backward pass of one tile of queries reads the weights instead of computing them again."""
    p, k, g, r, t, _ = operands.query.shape
    return options.soft_cap is None and p * k * g * r * t * (t + operands.prompt_key.shape[2]) <= KEPT_WEIGHTS


def tiles(tokens: int, positions: int, head_size: int) -> Tiles:
    """Tiles of the kernels, for the platform."""
    wide = head_size > WIDE_HEAD
    if dispatch.platform() == "tpu":
        most = TPU_WIDE_TILE if wide else TPU_TILE
        return Tiles(*(min(most, up_to(max(size, 1), LANES)) for size in (tokens, positions)))
    most = GPU_WIDE_TILE if wide else GPU_TILE
    return Tiles(*(min(most, power_of_two(size)) for size in (tokens, positions)))


def up_to(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def power_of_two(size: int) -> int:
    """The next power of two, at least 16: the least side of a Triton product."""
    return max(16, 1 << max(size - 1, 0).bit_length())


def at_once(rows: int) -> int:
    """How many of the rows that add to one block a program takes: one on a TPU, where the programs follow each other."""
    return 1 if dispatch.platform() == "tpu" else rows


def warps(head_size: int) -> int:
    """Triton's warps per program."""
    return 4 if head_size <= WIDE_HEAD else 8


def fits(tokens: int, positions: int, head_size: int, dtype: DTypeLike) -> bool:
    """Whether the whole rows and prompts that a program reads fit into a TPU's VMEM; on other devices they need not."""
    if dispatch.platform() != "tpu":
        return True
    tile = tiles(tokens, positions, head_size)
    length = up_to(tokens, tile.own) + up_to(max(positions, 1), tile.prompt)
    return 2 * 3 * length * up_to(head_size, LANES) * jnp.dtype(dtype).itemsize <= VMEM_BYTES


def check_fits(tokens: int, positions: int, head_size: int, dtype: DTypeLike) -> None:
    """The kernels can run.

    Raises:
      ValueError: they cannot.
    """
    if not fits(tokens, positions, head_size, dtype):
        raise ValueError(f"prefix_attention's kernels hold whole rows in {VMEM_BYTES >> 20} MiB of VMEM: T = {tokens} and "
                         f"S = {positions} with E = {head_size} do not fit; allowed are None and 'xla'.")
