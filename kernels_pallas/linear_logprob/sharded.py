"""The op on a mesh: rows cut over some axes, the vocabulary over another, logits and weights never gathered."""
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int, Int32, UInt32

from kernels_pallas import dispatch
from kernels_pallas.linear_logprob import blocks, forward, op, reference, support as support_bits
from kernels_pallas.linear_logprob.reference import Scalar


Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


class Layout(NamedTuple):
    """Where the arrays lie.

    mesh has axes of type Auto; rows names those that cut the rows of hidden, targets and results, vocabulary the one
    that cuts the tokens, or None; implementation is a key of `op.PASSES`, or None for the best on this device.
    """

    mesh: Mesh
    rows: tuple[str, ...]
    vocabulary: str | None
    implementation: str | None = None


def linear_logprob(hidden: Float[Array, "M D"], vocabulary: Float[Array, "V D"], targets: Int[Array, " M"],
                   layout: Layout, *, temperature: Scalar = 1.0, soft_cap: int | float | None = None,
                   support: UInt32[Array, "M W"] | None = None) -> tuple[Float32[Array, " M"], Float32[Array, " M"]]:
    """`op.linear_logprob` of arrays that lie on a mesh: every device passes over its own rows and tokens.

    What devices exchange, once a call, whatever the blocks: forward one maximum [M] and one sum [4, M] over the
    vocabulary's axis; backward one sum of hidden's gradient over that axis, and one of the vocabulary's over the rows'
    axes, both in float32. Over axes of one device nothing.

    Args:
      hidden, vocabulary, targets, temperature, soft_cap: as there, of the whole arrays.
      layout: M is a multiple of the rows' devices, V of the vocabulary's.
      support: as there. Where a device's tokens are no multiple of 32, each holds all words of its rows, V / 8 bytes
        a row, and cuts its own out of them.

    Raises:
      ValueError: axes that the mesh does not have or that are named twice, rows or tokens that do not divide, and what
        `op.linear_logprob` refuses.
    """
    # Nothing is computed: what the op refuses is refused here.
    jax.eval_shape(functools.partial(op.linear_logprob, temperature=temperature, soft_cap=soft_cap,
                                     implementation="reference"), hidden, vocabulary, targets, support=support)
    cut = _cut(layout, hidden, vocabulary)
    temperature = jnp.asarray(temperature, jnp.float32)
    return _on_mesh(cut, hidden, vocabulary, targets.astype(jnp.int32), temperature, support, soft_cap)


class _Cut(NamedTuple):
    """A layout that fits: axes of more than one device, and a name of `op.PASSES`."""

    mesh: Mesh
    rows: tuple[str, ...]
    tokens: tuple[str, ...]
    implementation: str


def _cut(layout: Layout, hidden: Float[Array, "M D"], vocabulary: Float[Array, "V D"]) -> _Cut:
    mesh, rows, tokens = layout.mesh, layout.rows, () if layout.vocabulary is None else (layout.vocabulary,)
    if not isinstance(rows, tuple):
        raise ValueError(f"Layout.rows must be a tuple of axes' names, not {rows!r}.")
    if not set(rows + tokens) <= set(mesh.shape) or len(set(rows + tokens)) < len(rows + tokens):
        raise ValueError(f"Layout's rows {rows} and vocabulary {layout.vocabulary!r} must name different axes of the "
                         f"mesh, which has {tuple(mesh.shape)}.")
    for count, axes, remedy in [
            (hidden.shape[0], rows, "rows do not divide; pad them, what a mask leaves out may hold anything finite"),
            (vocabulary.shape[0], tokens, "tokens do not divide; cut them over fewer devices")]:
        if count % _devices(mesh, axes):
            raise ValueError(f"Over the {_devices(mesh, axes)} devices of {axes} {count} {remedy}.")
    itemsize = jnp.dtype(reference.operand_dtype(hidden, vocabulary)).itemsize
    best = blocks.best(vocabulary.shape[0] // _devices(mesh, tokens), vocabulary.shape[1], itemsize)
    dispatch.implementation("sharded.linear_logprob", layout.implementation, best, op.PASSES)
    several = lambda axes: tuple(name for name in axes if mesh.shape[name] > 1)
    return _Cut(mesh, several(rows), several(tokens), layout.implementation or best)


def _devices(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[name] for name in axes)


# custom_vjp is outermost, shard_map inside its forward and inside its backward: shard_map's own transpose, without its
# check of what varies over which axis, would divide the gradient of the vocabulary by the number of devices.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def _on_mesh(cut, hidden, vocabulary, targets, temperature, support, soft_cap):
    return _forward(cut, hidden, vocabulary, targets, temperature, support, soft_cap)[0]


def _forward(cut, hidden, vocabulary, targets, temperature, support, soft_cap):
    passes = op.PASSES[cut.implementation]

    def on_device(hidden, vocabulary, targets, temperature, support):
        column, support = _own(cut, vocabulary.shape[0], targets, support)
        seen = passes.moments(hidden, vocabulary, column, temperature, support, soft_cap)
        return forward.results(_over_devices(seen, cut.tokens))

    rows = PartitionSpec(cut.rows)
    logp, entropy, *normaliser = _shard(cut, on_device, vocabulary.shape[0], (rows, rows, rows, rows))(
        hidden, vocabulary, targets, temperature, support)
    return (logp, entropy), (hidden, vocabulary, targets, temperature, support, logp, entropy, *normaliser)


def _over_devices(seen: forward.Moments, axes: tuple[str, ...]) -> forward.Moments:
    """The sums over the tokens of every device of the axes: one maximum and one sum."""
    if not axes:
        return seen
    maximum = jax.lax.pmax(seen.maximum, axes)
    zero = jnp.zeros_like(maximum)
    seen = forward.merged(seen, forward.Moments(maximum, zero, zero, jnp.full_like(maximum, -jnp.inf)))
    # At most one device holds the target; -inf from the others would be no sum.
    found = seen.chosen > -jnp.inf
    parts = jnp.stack([seen.total, seen.weighted, jnp.where(found, seen.chosen, 0.0), found.astype(jnp.float32)])
    total, weighted, chosen, found = jax.lax.psum(parts, axes)
    return forward.Moments(maximum, total, weighted, jnp.where(found > 0, chosen, -jnp.inf))


def _backward(cut, soft_cap, residuals, cotangents):
    # A residual that was a constant comes back as a NumPy array.
    residuals = jax.tree.map(jnp.asarray, residuals)
    hidden, vocabulary, targets, temperature, support, logp, *entropy_and_normaliser = residuals
    d_logp, d_entropy = cotangents
    d_logp = jnp.where(jnp.isneginf(logp), 0.0, d_logp)
    passes = op.PASSES[cut.implementation]

    def on_device(hidden, vocabulary, targets, temperature, support, *per_row):
        column, support = _own(cut, vocabulary.shape[0], targets, support)
        rows = hidden, column, support, *per_row
        d_hidden, d_vocabulary = passes.cotangents(rows, vocabulary, temperature, soft_cap)
        return _summed(d_hidden, cut.tokens), _summed(d_vocabulary, cut.rows)

    results = PartitionSpec(cut.rows), PartitionSpec(cut.tokens)
    d_hidden, d_vocabulary = _shard(cut, on_device, vocabulary.shape[0], results, per_row=5)(
        hidden, vocabulary, targets, temperature, support, *entropy_and_normaliser, d_logp, d_entropy)
    return d_hidden, d_vocabulary, None, jnp.zeros_like(temperature), None


_on_mesh.defvjp(_forward, _backward)


def _summed(x: Float[Array, "..."], axes: tuple[str, ...]) -> Float[Array, "..."]:
    """In float32, so that bfloat16 rounds once a device and once at the end, not at every addition."""
    return jax.lax.psum(x.astype(jnp.float32), axes).astype(x.dtype) if axes else x


def _shard(cut: _Cut, on_device, size: int, results: tuple, per_row: int = 0):
    """shard_map of on_device(hidden, vocabulary, targets, temperature, support, *per_row)."""
    rows = PartitionSpec(cut.rows)
    whole_words = size // _devices(cut.mesh, cut.tokens) % support_bits.WORD == 0
    support = PartitionSpec(cut.rows, cut.tokens if whole_words else ())
    arguments = rows, PartitionSpec(cut.tokens), rows, PartitionSpec(), support, *[rows] * per_row
    # Unchecked, because kernels do not say over which axes their results vary; every sum is written out above.
    return jax.shard_map(on_device, mesh=cut.mesh, in_specs=arguments, out_specs=results, check_vma=False)


def _own(cut: _Cut, size: int, targets: Int32[Array, " M"],
         support: UInt32[Array, "M W"] | None) -> tuple[Int32[Array, " M"], UInt32[Array, "M w"] | None]:
    """Targets counted from this device's first token, and the support of its tokens alone."""
    start = jax.lax.axis_index(cut.tokens) * size if cut.tokens else 0
    if support is None or not cut.tokens or size % support_bits.WORD == 0:
        return targets - start, support
    return targets - start, cut_support(support, start, size)


def cut_support(support: UInt32[Array, "M W"], start: int | Int[Array, ""], size: int) -> UInt32[Array, "M w"]:
    """What `pack_support` gives for tokens start .. start + size - 1 alone.

    Args:
      support: of the whole vocabulary.
      start, size: in tokens; within the vocabulary.
    """
    first, shift = start // support_bits.WORD, jnp.asarray(start % support_bits.WORD, jnp.uint32)
    words, rest = support_bits.words_for(size), size % support_bits.WORD
    # One word more, for the bits that the first one lacks; beyond the last word there are none.
    padded = jnp.pad(support, ((0, 0), (0, words + 1)))
    part = jax.lax.dynamic_slice_in_dim(padded, first, words + 1, axis=1)
    # A shift by 32 has no defined result.
    carried = jnp.where(shift == 0, jnp.uint32(0), part[:, 1:] << ((support_bits.WORD - shift) % support_bits.WORD))
    own = (part[:, :-1] >> shift) | carried
    return own.at[:, -1].set(own[:, -1] & jnp.uint32((1 << rest) - 1)) if rest else own
