"""Rotary position embedding."""
import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

KINDS = ("linear", "llama3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """How a checkpoint stretches its wavelengths for texts longer than it was first trained on.

    "linear" multiplies all by `factor`. "llama3" leaves those shorter than original_length / high as they are,
    multiplies those longer than original_length / low by `factor`, and goes from one to the other in between.

    Attributes:
      kind: "linear" or "llama3".
      factor: at least 1.
      low, high: of "llama3", wavelengths per original length, low < high.
      original_length: of "llama3", tokens.
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"rotary_scaling kind={self.kind!r}: allowed are {KINDS}.")
        if self.factor < 1 or not 0 < self.low < self.high or self.original_length < 1:
            raise ValueError(f"rotary_scaling factor={self.factor}, low={self.low}, high={self.high}, original_length="
                             f"{self.original_length}: factor is at least 1, 0 < low < high, original_length positive.")


def frequencies(size: int, base: float, scaling: Scaling | None = None) -> Float32[np.ndarray, " F"]:
    """base^(-2i / E) for i < E / 2, radians per position, stretched where `scaling` says so.

    Args:
      size: E, of a head.
      base: of the geometric progression of wavelengths.

    Source: Su et al. 2021, arXiv:2104.09864; Dubey et al. 2024, arXiv:2407.21783 (llama3).
    """
    exponent = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequency = (np.float32(1) / np.float32(base) ** exponent).astype(np.float32)
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return (frequency / np.float32(scaling.factor)).astype(np.float32)
    turns = scaling.original_length * frequency / (2 * math.pi)  # in the original length
    kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return ((1 - kept) * frequency / scaling.factor + kept * frequency).astype(np.float32)


class Turn(NamedTuple):
    """Cosine and sine of the angles by which the pairs of each row are turned."""

    cosine: Float32[Array, "M F"]
    sine: Float32[Array, "M F"]


def table(length: int, frequency: Float32[np.ndarray, " F"]) -> Turn:
    """Of the angles position * frequency_i for the positions 0, 1, ..., length - 1.

    Rows look up their own: a compiler that fuses would make cosine and sine anew for every element of every head.

    Args:
      frequency: from `frequencies`, F = E / 2.
    """
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency[None, :]
    return Turn(jnp.cos(angle), jnp.sin(angle))


def rotate(x: Float[Array, "M H E"], by: Turn) -> Float[Array, "M H E"]:
    """Turns the pair (x_i, x_{i + E/2}) by the i-th angle of its row.

    Args:
      x: queries or keys, E even.
      by: rows of a `table`, F = E / 2.

    Source: Su et al. 2021, arXiv:2104.09864, in the half-split layout of published checkpoints.
    """
    half = x.shape[-1] // 2
    cosine, sine = by.cosine[:, None, :], by.sine[:, None, :]
    left, right = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([left * cosine - right * sine, right * cosine + left * sine], axis=-1)
    return turned.astype(x.dtype)
