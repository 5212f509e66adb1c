"""Copies of the weights in 8 bits, to draw answers with: less to read per token, and a policy that differs a little."""
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rl_jax.types import Parameters

TYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def check(kind: str) -> None:
    """Whether a copy of this kind can be made.

    Raises:
      ValueError: for an unknown kind.
      ImportError: if qwix is missing.
    """
    if kind not in TYPES:
        raise ValueError(f"quantised weights {kind!r}: allowed are {sorted(TYPES)}, or \"\" for none.")
    try:
        import qwix  # noqa: F401
    except ImportError as error:
        raise ImportError(f"quantised weights need qwix ({error}): pip install rl_jax[quantised].") from error


def copy(parameters: Parameters, kind: str) -> Parameters:
    """The weights with every projection's matrix in 8 bits and a float scale per output; all else as it is.

    Embedding, head, norms, biases, adapters, routers and experts keep their dtype. Rounding is to the nearest, the
    scale the largest magnitude of a column over the largest number of the type (absmax): 448, and for int8 127.5.

    Args:
      kind: "int8" or "fp8" (e4m3).
    """
    import qwix

    def one(path: tuple, leaf: Array) -> Any:
        if path[-1].key != "weight":
            return leaf
        axes = (0, leaf.ndim - 1) if leaf.ndim == 3 else (leaf.ndim - 1,)  # stacked layers have scales of their own
        return qwix.quantize(leaf, TYPES[kind], channelwise_axes=axes)

    return jax.tree_util.tree_map_with_path(one, parameters)


def product(x: Float[Array, "M A"], weight: Any) -> Float[Array, "M B"]:
    """x W in x's dtype, for a matrix or one of `copy`'s."""
    if isinstance(weight, jax.Array):
        return x @ weight.astype(x.dtype)
    import qwix  # a quantised matrix exists: so does the library

    return qwix.dot(x, weight.astype(x.dtype))
