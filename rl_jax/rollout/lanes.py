"""Which sample of which prompt every slot draws: slots stand in lanes, and those of a lane share one prompt."""
import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rl_jax.record import record


@record
class Lanes:
    """W slots in each of L lanes.

    Attributes:
      prompt: of each lane, from 0.
      given: samples of its prompt that each lane has handed to its slots.
      asked: prompts that have been handed to lanes.
      sample: that each slot draws, from 0.
      now: the position that each slot draws next, from 0; 0 where it draws nothing.
      busy: whether a slot draws.
    """

    prompt: Int[Array, " L"]
    given: Int[Array, " L"]
    asked: Int[Array, ""]
    sample: Int[Array, "W L"]
    now: Int[Array, "W L"]
    busy: Bool[Array, "W L"]


def shape(slots: int, prompts: int, group: int) -> tuple[int, int]:
    """How many slots a lane has, W, and how many lanes there are, L: W L <= slots, W <= group, L <= prompts.

    W is about the square root of the group, or what it takes to use all slots. Slots of a lane wait for its prompt's
    last sample: few wait for a short time; but a lane reads its prompt's cache once for all of its slots.

    Args:
      slots, prompts, group: at least 1.

    Raises:
      ValueError: for more slots than answers.
    """
    if slots > prompts * group:
        raise ValueError(f"{slots} slots for {prompts} prompts x {group} samples = {prompts * group} answers: take no more "
                         "slots than answers, or 0 to draw all at once.")
    width = min(max(-(-slots // prompts), math.isqrt(group)), slots)
    return width, slots // width


def first(width: int, lanes: int) -> Lanes:
    """Lane l has prompt l, slot w its sample w.

    Args:
      width, lanes: W and L, from `shape`.
    """
    every = jnp.zeros((width, lanes), jnp.int32)
    return Lanes(prompt=jnp.arange(lanes, dtype=jnp.int32), given=jnp.full((lanes,), width, jnp.int32),
                 asked=jnp.asarray(lanes, jnp.int32), sample=every + jnp.arange(width, dtype=jnp.int32)[:, None],
                 now=every, busy=jnp.ones((width, lanes), bool))


def advanced(state: Lanes, alive: Bool[Array, "W L"], group: int) -> Lanes:
    """After one position: a slot whose answer ended takes its lane's next sample, in the order of the slots.

    Args:
      alive: whether a slot's answer goes on.
      group: G, samples per prompt.
    """
    free = ~alive
    waiting = jnp.cumsum(free, axis=0, dtype=jnp.int32)
    following = state.given[None] + waiting - 1
    return dataclasses.replace(
        state, given=jnp.minimum(state.given + waiting[-1], group), sample=jnp.where(free, following, state.sample),
        now=jnp.where(free, 0, state.now + 1), busy=alive | (following < group))


def exhausted(state: Lanes) -> Bool[Array, " L"]:
    """Lanes none of whose slots draws anything."""
    return ~state.busy.any(axis=0)


def renewed(state: Lanes, prompts: int) -> Lanes:
    """Exhausted lanes take the next prompts, in the order of the lanes, as long as there are any.

    Args:
      prompts: P, how many there are.
    """
    empty = exhausted(state)
    following = state.asked + jnp.cumsum(empty, dtype=jnp.int32) - 1
    taken = empty & (following < prompts)
    width = state.sample.shape[0]
    number = jnp.arange(width, dtype=jnp.int32)[:, None]
    return dataclasses.replace(
        state, prompt=jnp.where(taken, following, state.prompt), given=jnp.where(taken, width, state.given),
        asked=state.asked + taken.sum(dtype=jnp.int32), sample=jnp.where(taken[None], number, state.sample),
        now=jnp.where(taken[None], 0, state.now), busy=state.busy | taken[None])


def wanting(state: Lanes, prompts: int) -> Bool[Array, ""]:
    """Whether a lane is exhausted and there is a prompt for it.

    Args:
      prompts: P, how many there are.
    """
    return exhausted(state).any() & (state.asked < prompts)


def row(state: Lanes, prompts: int, group: int) -> Int[Array, "W L"]:
    """Which row of all answers, prompt-major, every slot draws; one of its own behind the last where it draws none.

    Args:
      prompts, group: P and G.
    """
    behind = prompts * group + jnp.arange(state.busy.size, dtype=jnp.int32).reshape(state.busy.shape)
    return jnp.where(state.busy, state.prompt[None] * group + state.sample, behind)
