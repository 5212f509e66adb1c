"""Rows through the experts that were chosen for them, exactly: no expert turns a row away."""
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import custom_batching
from jaxtyping import Array, Float, Int

from kernels_pallas import dispatch

# Measured on 2 shared CPU cores, jax 0.10, float32: processor time of value / gradient in ms.
#   M, X, k, D, F            dense        tiles        choices sorted by expert, jax.lax.ragged_dot
#   64, 8, 2, 128, 64        0.6 / 1.7    0.3 / 0.8    0.9 / 2.6
#   512, 16, 4, 128, 64      9 / 33       3 / 8        24 / 122
#   512, 64, 8, 128, 64      65 / 185     6 / 17       311 / 1261
#   2048, 64, 8, 256, 128    554 / 2349   77 / 294
# On a CPU ragged_dot becomes a product of all M k choices with all experts. A TPU has kernels for it, but not for the
# gradient of the experts: compiled for a v5e, with M = 4096, X = 128, k = 8, that takes 40 TFLOP where dense takes 13
# and 0.9 are needed. Tiles of 16 to 64 rows differ little. Four replicas of the second row, gradient: one by one 36,
# as one batched loop 204.
SMALLEST_TILE = 16
# Not measured on a GPU or a TPU. One product of 128 rows would not fill a GPU, so that it takes several at a time. Few
# rows, whose gradient nobody asks for (decoding), go through all experts: nearly all are read anyway.
LARGEST_TILE = {"cpu": 64, "gpu": 128, "tpu": 256}
TILES_AT_ONCE = {"cpu": 1, "gpu": 16, "tpu": 1}
FEW_ROWS = {"cpu": 0, "gpu": 256, "tpu": 256}


class Layout(NamedTuple):
    """The A = M k choices laid out by expert: every expert's in tiles of its own, the last of them padded.

    Attributes:
      place: of every choice, its row in the layout.
      choice: of every row of every tile, the choice that it holds, or A for none.
      owner: of every tile, its expert.
      steps: of `TILES_AT_ONCE` tiles each, from the first, until all that hold a choice are done.
    """

    place: Int[Array, " A"]
    choice: Int[Array, "n B"]
    owner: Int[Array, " n"]
    steps: Int[Array, ""]


def mixed(x: Float[Array, "M D"], expert: Int[Array, "M k"], weight: Float[Array, "M k"], gate: Float[Array, "X D F"],
          up: Float[Array, "X D F"], down: Float[Array, "X F D"], *,
          implementation: str | None = None) -> Float[Array, "M D"]:
    """sum_j weight_j down_j(silu(gate_j x) * up_j x) over the k experts j of each row, in x's dtype.

    A `vmap` over rows that shares the experts is one call with more rows. Where experts are mapped too, and where a
    gradient is asked of mapped rows, calls run one after the other.

    Args:
      expert: ids from 0 to X - 1.
      implementation: "dense" (every row through every expert, with weight 0 where it was not chosen), "tiles" (only
        what was chosen), or None for the best on this device.

    Raises:
      ValueError: an implementation that does not exist.
    """
    run = dispatch.implementation("mixed", implementation, "tiles", {
        "dense": dense, "tiles": functools.partial(_tiled, implementation)})
    return run(x, expert, weight, gate, up, down)


def dense(x: Float[Array, "M D"], expert: Int[Array, "M k"], weight: Float[Array, "M k"], gate: Float[Array, "X D F"],
          up: Float[Array, "X D F"], down: Float[Array, "X F D"]) -> Float[Array, "M D"]:
    """`mixed`, every row through every expert."""
    share = (jax.nn.one_hot(expert, gate.shape[0], dtype=weight.dtype) * weight[:, :, None]).sum(axis=1)
    rows = jnp.broadcast_to(x[None], (gate.shape[0], *x.shape))
    gate, up, down = (a.astype(x.dtype) for a in (gate, up, down))
    inner = _scaled(_gated(rows @ gate, rows @ up), share.T)
    return jnp.einsum("xmf,xfd->md", inner, down)


def layout(expert: Int[Array, "M k"], experts: int) -> Layout:
    """Where every choice goes.

    Args:
      experts: X, how many there are.
    """
    flat, choices, at_once = expert.reshape(-1), expert.size, TILES_AT_ONCE[dispatch.platform()]
    size = tile(choices, experts)
    tiles = choices // size + min(experts, choices)  # the whole ones, and at most one more for each expert
    tiles = -(-tiles // at_once) * at_once
    number = jnp.arange(choices, dtype=jnp.int32)
    by_expert, order = jax.lax.sort_key_val(flat, number)
    count = jnp.zeros(experts, jnp.int32).at[flat].add(1)
    need = (count + size - 1) // size
    end = jnp.cumsum(need)
    before = (end - need) * size - (jnp.cumsum(count) - count)
    place = number + before[by_expert]
    owner = jnp.searchsorted(end, jnp.arange(tiles, dtype=jnp.int32), side="right", method="compare_all")
    choice = jnp.full(tiles * size, choices, jnp.int32).at[place].set(order, unique_indices=True)
    return Layout(
        place=jnp.zeros(choices, jnp.int32).at[order].set(place, unique_indices=True),
        choice=choice.reshape(tiles, size), owner=jnp.minimum(owner, experts - 1),
        steps=(end[-1] + at_once - 1) // at_once)


def tile(choices: int, experts: int) -> int:
    """Rows of a tile: the power of two from half of an expert's mean share on, within bounds."""
    half = choices // (2 * experts)
    return min(max(SMALLEST_TILE, 1 << max(half - 1, 0).bit_length()), LARGEST_TILE[dispatch.platform()])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(asked, x, expert, weight, gate, up, down):
    def run(x, *others):
        few = asked is None and len(x) <= FEW_ROWS[dispatch.platform()]
        return dense(x, *others) if few else _passed(1, x, *others)[0][0]

    return _rows_together(run)(x, expert, weight, gate, up, down)


def _forward(asked, x, expert, weight, gate, up, down):
    one_by_one = custom_batching.sequential_vmap(functools.partial(_passed, 3))
    (y, *products), where = one_by_one(x, expert, weight, gate, up, down)
    return y, (where, products, (x, weight), (gate, up, down))


def _backward(asked, residuals, cotangent):
    # A residual that was a constant comes back as a NumPy array.
    residuals = jax.tree.map(jnp.asarray, residuals)
    (d_x, d_weight), d_matrices = custom_batching.sequential_vmap(_cotangents)(*residuals, cotangent)
    return d_x, None, d_weight, *d_matrices


_tiled.defvjp(_forward, _backward)


def _rows_together(run: Callable[..., Array]) -> Callable[..., Array]:
    """`run(x, expert, weight, *matrices)`, whose `vmap` over the first three is one call with more rows."""
    together = custom_batching.custom_vmap(run)

    @together.def_vmap
    def mapped(size: int, batched: list, *arrays: Array) -> tuple[Array, bool]:
        if any(batched[3:]):
            axes = tuple(0 if has else None for has in batched)
            return jax.vmap(custom_batching.sequential_vmap(run), axes)(*arrays), True
        rows = [a if has else jnp.broadcast_to(a[None], (size, *a.shape))
                for a, has in zip(arrays[:3], batched, strict=False)]
        y = together(*(a.reshape(-1, a.shape[-1]) for a in rows), *arrays[3:])
        return y.reshape(size, -1, y.shape[-1]), True

    return together


def _passed(results, x, expert, weight, gate, up, down):
    """The first `results` of output [M, D] and products with gate and up [n, B, F]; and the layout."""
    where = layout(expert, len(gate))
    share, k = weight.reshape(-1), expert.shape[1]
    gate, up, down = (a.astype(x.dtype) for a in (gate, up, down))

    def step(i, made):
        choice, own = _part(where.choice, i), _part(where.owner, i)
        rows = _taken(x, choice // k)
        g, u = rows @ gate[own], rows @ up[own]
        y = _scaled(_gated(g, u), _taken(share, choice)) @ down[own]
        return [_put(to, new, i) for to, new in zip(made, (y, g, u), strict=False)]

    widths = x.shape[1], gate.shape[2], gate.shape[2]
    empty = [jnp.zeros((*where.choice.shape, width), x.dtype) for width in widths[:results]]
    y, *products = jax.lax.fori_loop(0, where.steps, step, empty)
    return (_by_row(y, where, k).sum(axis=1), *products), where


def _cotangents(where, products, rows, matrices, cotangent):
    """Of the rows and their weights, and of the matrices."""
    x, weight = rows
    in_dtype = [a.astype(x.dtype) for a in matrices]
    share, k, wide = weight.reshape(-1), weight.shape[1], jnp.promote_types(x.dtype, jnp.float32)

    def step(i, made):
        d_rows, d_share, *d_matrices = made
        choice, own, *products_here = (_part(a, i) for a in (where.choice, where.owner, *products))
        rows, d_y = (_taken(a, choice // k) for a in (x, cotangent))
        gate, up, down = (jnp.swapaxes(a[own], 1, 2) for a in in_dtype)
        inner, pull = jax.vjp(_gated, *products_here)
        scale, d_scaled = _taken(share, choice), d_y @ down
        d_g, d_u = pull(_scaled(d_scaled, scale))
        pairs = (rows, d_g), (rows, d_u), (_scaled(inner, scale), d_y)
        slopes = [jnp.einsum("tbi,tbj->tij", *pair, preferred_element_type=wide) for pair in pairs]
        d_scale = (inner.astype(wide) * d_scaled.astype(wide)).sum(axis=2)
        return [_put(d_rows, d_g @ gate + d_u @ up, i), _put(d_share, d_scale, i),
                *(to.at[own].add(new) for to, new in zip(d_matrices, slopes, strict=True))]

    empty = [jnp.zeros((*where.choice.shape, x.shape[1]), x.dtype), jnp.zeros(where.choice.shape, wide),
             *(jnp.zeros(a.shape, wide) for a in matrices)]
    d_rows, d_share, *d_matrices = jax.lax.fori_loop(0, where.steps, step, empty)
    d_weight = _by_row(d_share[:, :, None], where, k)[:, :, 0].astype(weight.dtype)
    return (_by_row(d_rows, where, k).sum(axis=1), d_weight), [
        new.astype(a.dtype) for new, a in zip(d_matrices, matrices, strict=True)]


def _gated(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    return jax.nn.silu(gate) * up


def _scaled(rows: Float[Array, "... F"], by: Float[Array, "..."]) -> Float[Array, "... F"]:
    return (rows * by[..., None]).astype(rows.dtype)


def _part(a: Array, i: Int[Array, ""]) -> Array:
    size = TILES_AT_ONCE[dispatch.platform()]
    return jax.lax.dynamic_slice_in_dim(a, i * size, size)


def _put(to: Array, new: Array, i: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(to, new, i * len(new), 0)


def _taken(a: Array, index: Int[Array, "t B"]) -> Array:
    """Rows of a, and zeros beyond its end."""
    return a.at[index].get(mode="fill", fill_value=0)


def _by_row(laid_out: Float[Array, "n B W"], where: Layout, k: int) -> Float[Array, "M k W"]:
    width = laid_out.shape[2]
    return laid_out.reshape(-1, width)[where.place].reshape(-1, k, width)
