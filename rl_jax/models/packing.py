"""Several answers of a group in one row, end to end behind their shared prompt: where each token goes and comes from."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from kernels_pallas.prefix_attention import visibility


class Layout(NamedTuple):
    """Where the answers of every group lie.

    Attributes:
      row: of its group, from 0.
      start: the position of its first token in that row.
      fits: whether all answers of all groups have found room; where not, row and start mean nothing.
    """

    row: Int[Array, "P G"]
    start: Int[Array, "P G"]
    fits: Bool[Array, ""]


def layout(lengths: Int[Array, "P G"], rows: int, room: int) -> Layout:
    """Each group's answers, the longest first, each in the first row that still has room for it.

    Args:
      lengths: in tokens; an answer of none takes no room.
      rows: of every group.
      room: positions of a row.
    """
    order = jnp.argsort(-lengths, axis=1)

    def place(used, length):
        has_room = used + length[:, None] <= room
        row = has_room.argmax(axis=1)
        here = jnp.arange(rows)[None, :] == row[:, None]
        start = jnp.where(here, used, 0).sum(axis=1)
        return used + jnp.where(here, length[:, None], 0), (row, start, has_room.any(axis=1))

    nothing = jnp.zeros((lengths.shape[0], rows), lengths.dtype)
    _, (row, start, fits) = jax.lax.scan(place, nothing, jnp.take_along_axis(lengths, order, axis=1).T)
    back = jnp.argsort(order, axis=1)
    return Layout(*(jnp.take_along_axis(a.T, back, axis=1) for a in (row, start)), fits.all())


def places(found: Layout, lengths: Int[Array, "P G"], rows: int, room: int, tokens: int) -> Int[Array, "N T"]:
    """The index of every token among the P * rows * room packed positions; that count for tokens behind their answer.

    Args:
      found, lengths, rows, room: of `layout`.
      tokens: T, positions of an answer.
    """
    groups = lengths.shape[0]
    first = (jnp.arange(groups)[:, None] * rows + found.row) * room + found.start
    now = jnp.arange(tokens)[None, None, :]
    inside = now < lengths[:, :, None]
    return jnp.where(inside, first[:, :, None] + now, groups * rows * room).reshape(-1, tokens)


def sources(place: Int[Array, "N T"], rows: int, room: int) -> Int[Array, "B U"]:
    """The index among the N * T tokens of what lies at every packed position; -1 where nothing does.

    Args:
      place: from `places`.
      rows: B, of all groups.
      room: U, positions of a row.
    """
    empty = jnp.full(rows * room, -1, jnp.int32)
    return empty.at[place.reshape(-1)].set(jnp.arange(place.size, dtype=jnp.int32), mode="drop").reshape(rows, room)


def packed(values: Shaped[Array, "N T ..."], source: Int[Array, "B U"]) -> Shaped[Array, "B U ..."]:
    """What lies at every packed position; what lies at none holds the first of all values."""
    return values.reshape(-1, *values.shape[2:])[jnp.maximum(source, 0)]


def unpacked(values: Shaped[Array, "B U ..."], place: Int[Array, "N T"]) -> Shaped[Array, "N T ..."]:
    """The values of every token, zero behind its answer; differentiable."""
    return values.reshape(-1, *values.shape[2:]).at[place].get(mode="fill", fill_value=0)


def fed(first: Int[Array, " N"], completions: Int[Array, "N T"],
        segment: Int[Array, "N T"] | None = None) -> tuple[Int[Array, "N T"], Int[Array, "#N T"]]:
    """The token that every completion position is fed, and its position in its own answer.

    Args:
      first: the last token of each row's prompt, which every answer begins with.
      segment: which answer each token belongs to, neighbours alike; None: a row is one answer.
    """
    now = jnp.arange(completions.shape[1])[None, :]
    before = jnp.concatenate([first[:, None], completions[:, :-1]], axis=1)
    if segment is None:
        return before, now
    position = now - visibility.segment_start(segment[None])[0]
    return jnp.where(position == 0, first[:, None], before), position
