"""What else one pass over the vocabulary says: moments of p, the most probable tokens, KL(p || q).

Beside `op.linear_logprob`, for recipes that ask for more. It runs as plain XLA on every device: there is no Pallas
kernel for these.
"""
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32, UInt32

from kernels_pallas import dispatch
from kernels_pallas.linear_logprob import backward, blocks, forward, op, reference
from kernels_pallas.linear_logprob import support as support_bits
from kernels_pallas.linear_logprob.reference import Scalar

Rows = Float32[Array, " M"]
NAMES = ("log_normaliser", "second_moment", "third_moment", "top", "divergence")


class Head(NamedTuple):
    """A distribution per row: softmax(cap tanh(hidden vocabulary^T / cap) / temperature).

    hidden [M, D] and vocabulary [V, D] are float32 or bfloat16, products are summed in float32; temperature is positive
    and carries no gradient; soft_cap is a positive Python number, in nats, or None.
    """

    hidden: Float[Array, "M D"]
    vocabulary: Float[Array, "V D"]
    temperature: Scalar = 1.0
    soft_cap: int | float | None = None


class Top(NamedTuple):
    """The k most probable tokens, falling; of equal ones the smaller id first; beyond what is kept -inf and -1."""

    logp: Float32[Array, "M k"]
    tokens: Int32[Array, "M k"]


def linear_statistics(head: Head, targets: Int[Array, " M"], wanted: tuple[str, ...], *, other: Head | None = None,
                      support: UInt32[Array, "M W"] | None = None, top: int = 0,
                      implementation: str | None = None) -> dict[str, Any]:
    """logp and entropy as `op.linear_logprob` gives them, and by name what is wanted beside them.

    | name | per row | gradient |
    |---|---|---|
    | log_normaliser | log sum exp(logits), in nats | yes |
    | second_moment, third_moment | sum p^2, sum p^3 | constant |
    | top | `Top` | constant |
    | divergence | KL(p || q) = sum p (log p - log q), in nats, q that of the other head | in p only |

    A row that keeps no token has logp -inf and otherwise 0, and no gradient.

    Args:
      head: whose distribution p is.
      targets: token ids.
      wanted: names of the table.
      other: whose distribution q is; as many rows and tokens as head, of any width.
      support: tokens that truncated sampling kept (`support.pack_support`); p and q are 0 elsewhere.
      top: k, the number of most probable tokens, 1 to V.
      implementation: "reference" (all logits in memory), "xla" (one block of each head's at a time), or None for the
        best measured on this device.

    Returns:
      "logp", "entropy" and the names in wanted, each [M] or `Top`.

    Raises:
      ValueError: a name that does not exist; a second head or k that is wanted and missing, or given and not wanted;
        what `op.linear_logprob` refuses.
    """
    _check(head, targets, wanted, other, support, top)
    run = dispatch.implementation("linear_statistics", implementation, "xla", {"reference": _whole, "xla": _blocked})
    asked = _Asked(tuple(sorted(set(wanted))), top, head.soft_cap, None if other is None else other.soft_cap)
    arrays = lambda head: (head.hidden, head.vocabulary, jnp.asarray(head.temperature, jnp.float32))
    return run(asked, arrays(head), targets.astype(jnp.int32), support, None if other is None else arrays(other))


def _check(head, targets, wanted, other, support, top) -> None:
    unknown = sorted(set(wanted) - set(NAMES))
    if unknown:
        raise ValueError(f"linear_statistics has no {unknown}; wanted may name {NAMES}.")
    if ("divergence" in wanted) != (other is not None):
        raise ValueError('"divergence" compares two heads: name it in wanted and give other=Head(hidden, vocabulary), '
                         f"or neither; wanted is {wanted} and other is {'not ' if other is None else ''}given.")
    size = head.vocabulary.shape[0]
    if not (1 <= top <= size if "top" in wanted else top == 0):
        raise ValueError(f'"top" takes k tokens: name it in wanted and give top from 1 to V = {size}, or neither; '
                         f"wanted is {wanted} and top is {top}.")
    if other is not None and other.vocabulary.shape[0] != size:
        raise ValueError(f"both heads must have the same tokens, not {size} and {other.vocabulary.shape[0]}.")
    for one in (head,) if other is None else (head, other):
        # Nothing is computed: what the op refuses is refused here.
        call = functools.partial(op.linear_logprob, temperature=one.temperature, soft_cap=one.soft_cap,
                                 implementation="reference")
        jax.eval_shape(call, one.hidden, one.vocabulary, targets, support=support)


class _Asked(NamedTuple):
    """What is fixed when the program is traced."""

    wanted: tuple[str, ...]
    top: int
    soft_cap: int | float | None
    other_soft_cap: int | float | None


def _whole(asked: _Asked, head, targets, support, other):
    """The definition, with every logit in memory."""
    hidden, vocabulary, temperature = head
    temperature = jax.lax.stop_gradient(temperature)
    size = vocabulary.shape[0]
    kept = jnp.ones((hidden.shape[0], size), bool) if support is None else support_bits.unpack_support(support, size)
    some = kept.any(axis=1)
    u = jnp.where(kept, reference.logits(hidden, vocabulary, temperature, asked.soft_cap), reference.EXCLUDED)
    every = jax.nn.log_softmax(u, axis=1)
    p = jnp.where(kept, jnp.exp(every), 0.0)
    logp, entropy = reference.linear_logprob(hidden, vocabulary, targets, temperature, support, asked.soft_cap)
    found = {"logp": logp, "entropy": entropy,
             "log_normaliser": jnp.where(some, jax.nn.logsumexp(u, axis=1), 0.0),
             "second_moment": jax.lax.stop_gradient((p**2).sum(axis=1)),
             "third_moment": jax.lax.stop_gradient((p**3).sum(axis=1))}
    if "top" in asked.wanted:
        best, tokens = jax.lax.top_k(jax.lax.stop_gradient(jnp.where(kept, every, -jnp.inf)), asked.top)
        found["top"] = Top(best, jnp.where(jnp.isneginf(best), -1, tokens))
    if other is not None:
        w = reference.logits(*jax.lax.stop_gradient(other), asked.other_soft_cap)
        other_logp = jax.nn.log_softmax(jnp.where(kept, w, reference.EXCLUDED), axis=1)
        found["divergence"] = (p * (every - other_logp)).sum(axis=1)
    return {name: found[name] for name in ("logp", "entropy", *asked.wanted)}


class _Sums(NamedTuple):
    """Sums over the tokens seen so far, per row; None where nobody asked.

    With u, w the logits of the two heads and e = exp(u - max u): `forward.Moments` of u; sum e^2 and sum e^3; the k
    largest u and their tokens; max w and sum exp(w - max w); sum e ((u - max u) - (w - max w)).
    """

    own: forward.Moments
    square: Rows | None
    cube: Rows | None
    best: tuple[Float32[Array, "M k"], Int32[Array, "M k"]] | None
    other: tuple[Rows, Rows] | None
    gap: Rows | None


def _sums(asked: _Asked, head, targets, support, other) -> _Sums:
    size = head[1].shape[0]
    row_blocks, tile = blocks.choose(targets.shape[0], size)

    def one_block(_, rows):
        hidden, targets, support, other_hidden = rows

        def add(start, seen, width):
            u, w = _tile(asked, (hidden, *head[1:]), support, other and (other_hidden, *other[1:]), start, width)
            return _merged(seen, _of_tile(asked, u, w, targets, start))

        return None, blocks.over_tiles(add, _nothing_seen(asked, hidden), size, tile)

    rows = head[0], targets, support, other and other[0]
    return blocks.over_rows(one_block, None, rows, row_blocks)[1]


def _tile(asked, head, support, other, start, width):
    """Logits of a tile for both heads; None for a head that is not there."""
    logits = lambda head, cap: forward.tile_logits(*head, support, cap, start, width)
    return logits(head, asked.soft_cap), None if other is None else logits(other, asked.other_soft_cap)


def _nothing_seen(asked: _Asked, hidden: Float[Array, "M D"]) -> _Sums:
    full = lambda value, *more: jax.lax.full_like(hidden, value, jnp.float32, (hidden.shape[0], *more))
    least, zero = full(reference.EXCLUDED / 2), full(0)
    none = jax.lax.full_like(hidden, -1, jnp.int32, (hidden.shape[0], asked.top))
    divergence = "divergence" in asked.wanted
    return _Sums(forward.Moments(least, zero, zero, full(-jnp.inf)),
                 square=zero if "second_moment" in asked.wanted else None,
                 cube=zero if "third_moment" in asked.wanted else None,
                 best=(full(-jnp.inf, asked.top), none) if asked.top else None,
                 other=(least, zero) if divergence else None, gap=zero if divergence else None)


def _of_tile(asked: _Asked, u: Float32[Array, "M v"], w: Float32[Array, "M v"] | None, targets: Int[Array, " M"],
             start: int | Int[Array, ""]) -> _Sums:
    own = forward.tile_moments(u, targets - start)
    x, e = _shifted(u, own.maximum)
    sums = _Sums(own, square=(e**2).sum(axis=1) if "second_moment" in asked.wanted else None,
                 cube=(e**3).sum(axis=1) if "third_moment" in asked.wanted else None, best=None, other=None, gap=None)
    if asked.top:
        values, tokens = jax.lax.top_k(u, min(asked.top, u.shape[1]))
        sums = sums._replace(best=(values, tokens + start))
    if w is None:
        return sums
    maximum = jnp.maximum(w.max(axis=1), reference.EXCLUDED / 2)
    y, f = _shifted(w, maximum)
    return sums._replace(other=(maximum, f.sum(axis=1)), gap=(e * (x - y)).sum(axis=1))


def _shifted(u: Float32[Array, "M v"], maximum: Rows) -> tuple[Float32[Array, "M v"], Float32[Array, "M v"]]:
    """u - max u and its exp, which is 0 for tokens that are not kept."""
    x = u - maximum[:, None]
    return x, jnp.exp(x)


def _merged(a: _Sums, b: _Sums) -> _Sums:
    """The sums over what either has seen."""
    own = forward.merged(a.own, b.own)
    shift_a, shift_b = a.own.maximum - own.maximum, b.own.maximum - own.maximum
    power = lambda x, y, n: None if x is None else x * jnp.exp(n * shift_a) + y * jnp.exp(n * shift_b)
    sums = _Sums(own, power(a.square, b.square, 2), power(a.cube, b.cube, 3), best=None, other=None, gap=None)
    if a.best is not None:
        values, tokens = (jnp.concatenate(pair, axis=1) for pair in zip(a.best, b.best, strict=True))
        values, where = jax.lax.top_k(values, a.best[0].shape[1])
        sums = sums._replace(best=(values, jnp.take_along_axis(tokens, where, axis=1)))
    if a.gap is None:
        return sums
    maximum = jnp.maximum(a.other[0], b.other[0])
    other_a, other_b = a.other[0] - maximum, b.other[0] - maximum
    return sums._replace(
        other=(maximum, a.other[1] * jnp.exp(other_a) + b.other[1] * jnp.exp(other_b)),
        gap=(a.gap + a.own.total * (shift_a - other_a)) * jnp.exp(shift_a)
        + (b.gap + b.own.total * (shift_b - other_b)) * jnp.exp(shift_b))


def _results(asked: _Asked, sums: _Sums) -> tuple[dict[str, Any], tuple]:
    """What was asked for, and (a, b) of each head: its log-normaliser is a + b."""
    logp, entropy, maximum, log_total = forward.results(sums.own)
    total = jnp.exp(log_total)  # 1 where nothing was kept
    normaliser = [(maximum, log_total)]
    found = {"logp": logp, "entropy": entropy,
             "log_normaliser": jnp.where(sums.own.total == 0, 0.0, maximum + log_total),
             "second_moment": None if sums.square is None else sums.square / total**2,
             "third_moment": None if sums.cube is None else sums.cube / total**3}
    if sums.best is not None:
        values, tokens = sums.best
        kept = values > reference.EXCLUDED / 2
        best = (values - maximum[:, None]) - log_total[:, None]
        found["top"] = Top(jnp.where(kept, best, -jnp.inf), jnp.where(kept, tokens, -1))
    if sums.gap is not None:
        other_log_total = jnp.log(jnp.where(sums.other[1] == 0, 1.0, sums.other[1]))
        found["divergence"] = sums.gap / total - log_total + other_log_total
        normaliser.append((sums.other[0], other_log_total))
    return {name: found[name] for name in ("logp", "entropy", *asked.wanted)}, tuple(normaliser)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(asked, head, targets, support, other):
    return _forward(asked, head, targets, support, other)[0]


def _forward(asked, head, targets, support, other):
    found, normaliser = _results(asked, _sums(asked, head, targets, support, other))
    known = found["entropy"], found.get("divergence"), normaliser
    return found, (head, targets, support, other, jnp.isneginf(found["logp"]), known)


def _backward(asked, residuals, cotangents):
    # A residual that was a constant comes back as a NumPy array.
    head, targets, support, other, absent, known = jax.tree.map(jnp.asarray, residuals)
    hidden, vocabulary, temperature = head
    given = {name: cotangents.get(name) for name in ("logp", "entropy", "log_normaliser", "divergence")}
    given["logp"] = jnp.where(absent, 0.0, given["logp"])

    def d_logits(rows, vocabulary, temperature, soft_cap, start, width):
        hidden, targets, support, other_hidden, known, given = rows
        second = other and (other_hidden, *other[1:])
        u, w = _tile(asked, (hidden, vocabulary, temperature), support, second, start, width)
        d_z = _logit_cotangent(u, w, targets - start, known, given) * backward.slope(u, temperature, soft_cap)
        return d_z.astype(reference.operand_dtype(hidden, vocabulary))

    chosen = blocks.choose(targets.shape[0], vocabulary.shape[0])
    rows = hidden, targets, support, other and other[0], known, given
    d_hidden, d_vocabulary = backward.over_blocks(d_logits, chosen, rows, vocabulary, temperature, asked.soft_cap)
    return (d_hidden, d_vocabulary, jnp.zeros_like(temperature)), None, None, None


def _logit_cotangent(u: Float32[Array, "M v"], w: Float32[Array, "M v"] | None, column: Int[Array, " M"], known: tuple,
                     given: dict[str, Rows | None]) -> Float32[Array, "M v"]:
    """d_logp (1[v = target] - p) - d_H p (log p + H) + d_Z p + d_KL p (log p - log q - KL)."""
    entropy, divergence, normaliser = known
    d_logp, d_normaliser = given["logp"], given["log_normaliser"]
    d_p = d_logp if d_normaliser is None else d_logp - d_normaliser
    per_row = entropy, *normaliser[0], d_p, given["entropy"]
    d_u = backward.without_target(u, *(x[:, None] for x in per_row))
    is_target = jax.lax.broadcasted_iota(jnp.int32, u.shape, 1) == column[:, None]
    d_u += jnp.where(is_target, d_logp[:, None], 0.0)
    if w is None:
        return d_u
    logp, other_logp = ((v - a[:, None]) - b[:, None] for v, (a, b) in zip((u, w), normaliser, strict=True))
    return d_u + given["divergence"][:, None] * jnp.exp(logp) * (logp - other_logp - divergence[:, None])


_blocked.defvjp(_forward, _backward)
