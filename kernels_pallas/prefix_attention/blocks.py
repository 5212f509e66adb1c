"""Which implementation runs, and the sizes of its blocks."""
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas import dispatch
from kernels_pallas.prefix_attention.operands import Operands
from kernels_pallas.prefix_attention.visibility import Options

# Plain XLA, measured on 2 CPU cores, jax 0.10: CPU seconds of the gradient against autodiff through all scores at once
# (the form that this one replaced), at (P, G, S, T, H, K, E). One tile that keeps its weights takes 0.57 at
# (16, 8, 16, 24, 4, 2, 16), 0.78 at (8, 8, 32, 32, 4, 2, 32), 0.91 at (8, 8, 64, 64, 4, 2, 32) and 0.80 at
# (2, 8, 512, 64, 4, 2, 32); computing the weights again takes 0.7, 0.85, 1.1 and 0.83. Tiles of 128 take 0.51 at
# (1, 4, 64, 512, 4, 2, 64) and 0.44 at (2, 8, 512, 512, 8, 4, 64); tiles of 64 are as fast. No more than 16 tiles: they
# are unrolled. Without a prompt: 0.9 to 1.1 for T = 16 to 64, 0.74 at 128, 0.43 at 512.
QUERY_TILE = 128
QUERY_TILES = 16
KEPT_WEIGHTS = 1 << 22

# Of the kernels, not measured yet on a GPU: 64 x 64 scores and their operands fit the registers and the shared memory
# of Ampere and later for heads of 128, 32 x 32 for 256. Neither cuDNN (jax.nn.dot_product_attention) nor splash
# attention is used: a completion's attention is that to the prompt (one copy, seen by G T queries) merged with its own
# by their log-sum-exps, and those of both carry no gradient (cuDNN's backward pass drops the residual's cotangent;
# splash attention raises). They remain for attention without a prompt, with all heads' shapes that they allow.
GPU_TILE, GPU_WIDE_TILE = 64, 32
# Not measured yet on a TPU. All kernels compile for a v5e (libtpu 0.0.42) at the shapes of Qwen3, Llama 3 and Gemma 3
# with S = T = 1,024 in bfloat16 and float32, and with S = T = 4,096 in bfloat16 at E = 128, which is what VMEM_BYTES
# allows: of 16 MiB, the rest is for tiles and sums.
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
    """How many of the rows that add to one block a program takes: one on a TPU, where programs follow each other."""
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
        raise ValueError(f"prefix_attention's kernels hold whole rows in {VMEM_BYTES >> 20} MiB of VMEM: T = {tokens} "
                         f"and S = {positions} with E = {head_size} do not fit; allowed are None and 'xla'.")
