"""What a completion's token sees: two intervals of positions, one of its prompt and one of its own row."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32


class Options(NamedTuple):
    """Plain numbers that are part of the definition.

    Attributes:
      scale: of the products; None: E ** -0.5.
      soft_cap: scores become cap tanh(score / cap); positive, in nats. None: no bound.
      window: a token sees itself and the window - 1 positions before it, across the border between completion and
        prompt; positive, in tokens. None: all.
    """

    scale: float | None = None
    soft_cap: float | None = None
    window: int | None = None


class Seen(NamedTuple):
    """What may be seen, and what is padding.

    Attributes:
      prompt: [P] a completion sees the positions of its prompt below this, 0 to S tokens.
      lengths: [N] tokens of a row from here on are padding; None: none are.
      segment: [N, T] which completion of the group a token belongs to, where several share a row; -1 is padding. The
        tokens of a segment are neighbours. None: a row is one completion.
      options: plain numbers.
    """

    prompt: Array
    lengths: Array | None = None
    segment: Array | None = None
    options: Options = Options()


class Intervals(NamedTuple):
    """Token t sees its own row's positions near_from .. t and its prompt's far_from .. far_to - 1.

    Each is int32 and broadcasts to [P, G, T]; None stands for 0 everywhere. Padding has empty intervals.
    """

    near_from: Array | None
    far_from: Array | None
    far_to: Array


def real(seen: Seen, rows: int, tokens: int) -> Bool[Array, "N T"] | None:
    """Which tokens are not padding; None: all."""
    if seen.lengths is None and seen.segment is None:
        return None
    inside = jnp.ones((rows, tokens), bool) if seen.segment is None else seen.segment >= 0
    return inside if seen.lengths is None else inside & (jnp.arange(tokens)[None, :] < seen.lengths[:, None])


def intervals(seen: Seen, positions: int, group: int, tokens: int) -> Intervals:
    """The intervals of every token.

    Args:
      seen: what may be seen.
      positions: S, of the prompts.
      group: G, rows per prompt.
      tokens: T, of a row.
    """
    def grouped(x):
        return x.reshape(-1, group, x.shape[1])

    now = jnp.arange(tokens, dtype=jnp.int32)[None, None, :]
    near_from, far_from, position = None, None, now
    far_to = jnp.minimum(seen.prompt, positions).astype(jnp.int32)[:, None, None]
    if seen.segment is not None:
        near_from = segment_start(grouped(seen.segment))
        position = now - near_from
    if seen.options.window is not None:
        reach = seen.options.window - 1
        near_from = jnp.maximum(0 if near_from is None else near_from, now - reach)
        far_from = jnp.maximum(far_to + position - reach, 0)
    kept = real(seen, seen.prompt.shape[0] * group, tokens)
    if kept is not None:
        near_from = jnp.where(grouped(kept), 0 if near_from is None else near_from, tokens)
        far_to = jnp.where(grouped(kept), far_to, 0)
    return Intervals(near_from, far_from, far_to)


def segment_start(segment: Int[Array, "P G T"]) -> Int32[Array, "P G T"]:
    """The first position of each token's segment, whose tokens are neighbours."""
    now = jnp.arange(segment.shape[2], dtype=jnp.int32)[None, None, :]
    new = segment[:, :, 1:] != segment[:, :, :-1]
    return jax.lax.cummax(jnp.where(jnp.pad(new, [(0, 0), (0, 0), (1, 0)]), now, 0), axis=2)
