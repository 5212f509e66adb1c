"""A function of one block of a batch, run over the whole batch: at once, or block by block in a kernel."""
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as mosaic_tpu
from jaxtyping import Array

from kernels_pallas import dispatch
from kernels_pallas.policy_gate import blocks, portable

LANES = 128


class Block(NamedTuple):
    """Arrays of a batch, or of a part of it: [n, t] a number per token, [n, 1] per row, [] one for all.

    Of `weight` the entries are by name; what is not needed is empty or None.
    """

    policy: dict[str, Any]
    given: dict[str, Any]
    mask: Any
    weight: dict[str, Any]
    share: Any


class Found(NamedTuple):
    """What a function found in a block.

    Attributes:
      sums, maxima, minima: [1, 1] each, to be joined over blocks.
      tokens: [n, t] each.
      rows: [n, 1] each, sums over the block's tokens.
    """

    sums: dict[str, Any]
    maxima: dict[str, Any]
    minima: dict[str, Any]
    tokens: dict[str, Any]
    rows: dict[str, Any]


Part = Callable[[Block], Found]
Run = Callable[[Part, Block], Found]


def at_once(part: Part, block: Block) -> Found:
    """The whole batch as one block, in plain XLA."""
    return part(block)


def in_blocks(part: Part, block: Block, *, size: blocks.Size) -> Found:
    """A Pallas kernel over blocks of `size`: every block writes its numbers to a place of its own, joined afterwards.

    Arrays are padded to whole blocks with a mask that is False.
    """
    rows, tokens = block.mask.shape
    steps = -(-rows // size.rows), -(-tokens // size.tokens)
    operands, treedef = jax.tree.flatten(block)
    dtypes = [x.dtype for x in operands]
    kinds = [_kind(x, block.mask) for x in operands]
    shapes = [jax.ShapeDtypeStruct(_SHAPES[kind](size), dtype) for kind, dtype in zip(kinds, dtypes, strict=True)]
    found = jax.eval_shape(part, treedef.unflatten(shapes))
    numbers = jax.tree.leaves(found[:3])
    body = functools.partial(_body, portable.portable(part), treedef, dtypes, kinds)
    varying = jax.typeof(block.mask).manual_axis_type
    out = _outputs(found, steps, size)
    results = dispatch.pallas_call(
        body, grid=steps, warps=size.warps, name=f"policy_gate_{part.func.__name__.strip('_')}",
        in_specs=[_SPECS[kind](size) for kind in kinds],
        out_specs=[spec for spec, _ in out],
        out_shape=[jax.ShapeDtypeStruct(shape.shape, shape.dtype, manual_axis_type=varying) for _, shape in out],
    )(*(_padded(x, kind, size) for x, kind in zip(operands, kinds, strict=True)))
    return _joined(found, results, len(numbers), (rows, tokens))


def _body(part: Part, treedef: Any, dtypes: list, kinds: list[str], *refs: Any) -> None:
    values = [_read(ref, dtype, kind) for ref, dtype, kind in zip(refs, dtypes, kinds, strict=False)]
    found = part(treedef.unflatten(values))
    numbers, arrays = jax.tree.leaves(found[:3]), jax.tree.leaves(found[3:])
    outputs = refs[len(values):]
    if numbers:
        lanes = _lanes(len(numbers))
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
        line = jnp.zeros((1, lanes), jnp.result_type(*numbers))
        for k, number in enumerate(numbers):
            line = jnp.where(lane == k, number, line)
        outputs[0][...] = line
        outputs = outputs[1:]
    for ref, array in zip(outputs, arrays, strict=True):
        ref[...] = array


def _read(ref: Any, dtype: Any, kind: str) -> Array:
    value = ref[0, 0] if kind == "one" else ref[...]
    return value != 0 if dtype == jnp.bool_ else value


def _kind(x: Array, mask: Array) -> str:
    return "one" if x.ndim == 0 else "tokens" if x.shape == mask.shape else "rows"


_SHAPES = {
    "tokens": lambda size: (size.rows, size.tokens),
    "rows": lambda size: (size.rows, 1),
    "one": lambda size: (),
}
_SPECS = {
    "tokens": lambda size: pl.BlockSpec((size.rows, size.tokens), lambda i, j: (i, j)),
    "rows": lambda size: pl.BlockSpec((size.rows, 1), lambda i, j: (i, 0)),
    "one": lambda size: _scalar_spec(),
}


def _scalar_spec() -> pl.BlockSpec:
    # A TPU computes with scalars that are read from its scalar memory only.
    if dispatch.platform() == "tpu":
        return pl.BlockSpec((1, 1), lambda i, j: (0, 0), memory_space=mosaic_tpu.SMEM)
    return pl.BlockSpec((1, 1), lambda i, j: (0, 0))


def _padded(x: Array, kind: str, size: blocks.Size) -> Array:
    # No backend has one-bit memory, and a TPU tiles 8-bit numbers by 32 rows.
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.int32 if dispatch.platform() == "tpu" else jnp.int8)
    if kind == "one":
        return x.reshape(1, 1)
    more = [(0, -x.shape[0] % size.rows), (0, -x.shape[1] % size.tokens if kind == "tokens" else 0)]
    return jnp.pad(x, more) if any(high for _, high in more) else x


def _outputs(found: Found, steps: tuple[int, int], size: blocks.Size) -> list[tuple[pl.BlockSpec, Any]]:
    high, wide = steps
    out = []
    numbers = jax.tree.leaves(found[:3])
    if numbers:
        lanes = _lanes(len(numbers))
        out.append((pl.BlockSpec((None, 1, lanes), lambda i, j: (i * wide + j, 0, 0)),
                    jax.ShapeDtypeStruct((high * wide, 1, lanes), jnp.result_type(*(x.dtype for x in numbers)))))
    for x in jax.tree.leaves(found.tokens):
        out.append((_SPECS["tokens"](size), jax.ShapeDtypeStruct((high * size.rows, wide * size.tokens), x.dtype)))
    for x in jax.tree.leaves(found.rows):
        out.append((pl.BlockSpec((None, size.rows, 1), lambda i, j: (j, i, 0)),
                    jax.ShapeDtypeStruct((wide, high * size.rows, 1), x.dtype)))
    return out


def _joined(found: Found, results: Sequence[Array], numbers: int, shape: tuple[int, int]) -> Found:
    rows, tokens = shape
    if numbers:
        lines, *results = results
        results = [*(lines[:, :, k] for k in range(numbers)), *results]
    found = jax.tree.unflatten(jax.tree.structure(found), results)
    join = lambda reduce, parts: jax.tree.map(lambda x: reduce(x, axis=0, keepdims=True), parts)
    return Found(join(jnp.sum, found.sums), join(jnp.max, found.maxima), join(jnp.min, found.minima),
                 {name: x[:rows, :tokens] for name, x in found.tokens.items()},
                 {name: x.sum(axis=0)[:rows] for name, x in found.rows.items()})


def _lanes(numbers: int) -> int:
    return LANES << math.ceil(math.log2(max(numbers, LANES) / LANES))
