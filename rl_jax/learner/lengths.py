"""The shapes that learning is compiled for: a batch takes the smallest that holds its answers, in the compiled program.

What lies behind a batch's last chosen token is in no loss, so leaving it out changes sums by rounding alone. Every shape
is a branch of `lax.switch` with a forward and backward pass of its own: compile time grows with their number, and under
`vmap` all of them run.
"""
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from rl_jax.batching import Batching
from rl_jax.learner import assemble
from rl_jax.models import packing
from rl_jax.types import Experience, Mask, Parameters

Function = Callable[[Parameters, Experience], Any]


class Form(NamedTuple):
    """One shape.

    Attributes:
      length: completion positions of a row.
      packed: rows of each group, which its answers share; 0: each answer has its own.
    """

    length: int
    packed: int = 0

    def positions(self, group_size: int) -> int:
        """Completion positions of a group."""
        return self.length * (self.packed or group_size)


def forms(batching: Batching, group_size: int, tokens: int) -> tuple[Form, ...]:
    """All shapes, the one with the fewest positions first; the last is whole rows and holds anything.

    Groups of no more answers than `packed_rows` are not packed.

    Args:
      tokens: T, completion positions of a whole row.
    """
    cut = {Form(-(-tokens // 2**halvings)) for halvings in range(batching.length_buckets)}
    packed = {Form(tokens, batching.packed_rows)} if 0 < batching.packed_rows < group_size else set()
    return tuple(sorted(cut | packed, key=lambda form: (form.positions(group_size), form.packed)))


def answer_lengths(mask: Mask) -> Int[Array, " N"]:
    """Tokens of each answer up to the last chosen one, holes included."""
    return jnp.where(mask, jnp.arange(1, mask.shape[1] + 1)[None, :], 0).max(axis=1)


def smallest(found: tuple[Form, ...], x: Experience) -> Int[Array, ""]:
    """The number of the first form that holds the answers of x."""
    lengths = _by_group(x)
    holds = [packing.layout(lengths, form.packed, form.length).fits if form.packed else lengths.max() <= form.length
             for form in found]
    return jnp.stack(holds).argmax()


def said(function: Function, batching: Batching) -> Function:
    """function(parameters, x), found in the smallest form; zero behind what that form holds.

    Args:
      function: its results are arrays with axes N, T.
    """
    if _in_whole_rows(batching):
        return function

    def run(parameters: Parameters, x: Experience) -> Any:
        found = forms(batching, _group_size(x), x.mask.shape[1])
        in_form = [functools.partial(_said, function, form, parameters, x) for form in found]
        return jax.lax.switch(smallest(found, x), in_form)

    return run


def graded(objective: Callable[..., Any], of_packed: Callable[[Function], Callable[..., Any]],
           evaluate: Function, batching: Batching) -> Callable[..., Any]:
    """(parameters, x, weight, share) -> ((loss, metrics), gradient in the parameters), found in the smallest form.

    Of the cut batch the loss slot sees as many positions as the form has: that padding changes nothing holds for every
    recipe. Of packed answers it sees whole rows. With buckets or packed rows the metric "batch/positions" is the share of
    all completion positions that were computed, and "batch/packed" is 1 where answers were packed and 0 where not.

    Args:
      objective: (parameters, x, weight, share) -> (loss, metrics); see `update.make_objective`.
      of_packed: evaluate -> objective, for what packed rows say.
      evaluate: what the weights say.
    """
    if _in_whole_rows(batching):
        return jax.value_and_grad(objective, has_aux=True)

    def run(parameters: Parameters, x: Experience, weight: Any, share: Array) -> Any:
        group_size, tokens = _group_size(x), x.mask.shape[1]
        found = forms(batching, group_size, tokens)

        def in_form(form):
            if form.packed:
                here, batch = of_packed(functools.partial(_said, evaluate, form)), (x, weight, share)
            else:
                here, batch = objective, (cut(x, form.length), *_cut((weight, share), x.mask.shape, form.length))
            (loss, metrics), gradient = jax.value_and_grad(here, has_aux=True)(parameters, *batch)
            packed = {"batch/packed": jnp.float32(form.packed > 0)} if any(one.packed for one in found) else {}
            computed = jnp.float32(form.positions(group_size) / (group_size * tokens))
            return (loss, {**metrics, "batch/positions": computed, **packed}), gradient

        return jax.lax.switch(smallest(found, x), [functools.partial(in_form, form) for form in found])

    return run


def cut(x: Experience, length: int) -> Experience:
    """x with the first so many completion positions."""
    kept = {name: vars(x)[name] for name in ("prompts", "parts", "coefficients")}
    rest = dataclasses.replace(x, prompts=None, parts={}, coefficients=None)
    return dataclasses.replace(_cut(rest, x.mask.shape, length), **kept)


def pack(x: Experience, place: Int[Array, "N T"], rows: int, room: int) -> Experience:
    """What a network reads of x, its answers in packed rows.

    Args:
      place: from `packing.places`.
      rows: of all groups.
      room: positions of a row.
    """
    source = packing.sources(place, rows, room)
    nothing = jnp.zeros(rows, jnp.int32)
    read = {name: packing.packed(vars(x)[name], source) for name in ("tokens", "support", "routes")
            if vars(x)[name] is not None}
    segment = jnp.where(source < 0, -1, source // place.shape[1])
    return assemble.of_arrays(jnp.zeros((rows, room)), source >= 0, nothing.astype(jnp.float32), nothing,
                              prompts=x.prompts, segment=segment, **read)


def _said(function: Function, form: Form, parameters: Parameters, x: Experience) -> Any:
    """What a function says of x in one form, with axes N, T."""
    tokens = x.mask.shape[1]
    if not form.packed:
        values = function(parameters, cut(x, form.length))
        return jax.tree.map(lambda a: jnp.pad(a, [(0, 0), (0, tokens - form.length)] + [(0, 0)] * (a.ndim - 2)), values)
    lengths = _by_group(x)
    found = packing.layout(lengths, form.packed, form.length)
    place = packing.places(found, lengths, form.packed, form.length, tokens)
    values = function(parameters, pack(x, place, lengths.shape[0] * form.packed, form.length))
    return jax.tree.map(lambda a: packing.unpacked(a, place), values)


def _cut(tree: Any, whole: tuple[int, int], length: int) -> Any:
    return jax.tree.map(lambda a: a[:, :length] if a.shape[:2] == whole else a, tree)


def _in_whole_rows(batching: Batching) -> bool:
    return batching.length_buckets == 1 and batching.packed_rows == 0


def _by_group(x: Experience) -> Int[Array, "P G"]:
    return answer_lengths(x.mask).reshape(-1, _group_size(x))


def _group_size(x: Experience) -> int:
    return x.mask.shape[0] // x.prompts.lengths.shape[0]
