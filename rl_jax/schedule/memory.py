"""What is remembered of each training example from step to step: a table with a row per example."""
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rl_jax.schedule.control import Control
from rl_jax.types import Experience, PerSequence

Table = dict[str, Float[Array, " E"]]


def rows(table: Table, example: Int[Array, " N"]) -> dict[str, PerSequence]:
    """What the table holds of each sequence's example; NaN for an id outside of it.

    NaN and not a default: it reaches the loss, and the learner counts a skipped step instead of
    learning from a memory that nothing is ever written to.

    Args:
      table: a number per training example, by name.
      example: id of each sequence's example, in [0, E).
    """
    known = (example >= 0) & (example < _size(table))
    place = jnp.where(known, example, 0)
    return {name: jnp.where(known, jax.lax.stop_gradient(column)[place], jnp.nan) for name, column in table.items()}


def written(table: Table, example: Int[Array, " N"], values: dict[str, PerSequence],
            valid: Bool[Array, " N"]) -> Table:
    """The table with the values of one batch at their examples' rows, and all other rows as they were.

    An example has one row, whatever the number of its sequences and groups in the batch: that of the
    batch's last valid sequence is written. So where an example was asked twice in a batch the group
    that stands last wins; the sequences of one group should agree. An id outside of [0, E) and an
    example without any valid sequence write nothing.

    Args:
      table: a number per training example, by name.
      example: id of each sequence's example.
      values: what is to be remembered, by the names of the table.
      valid: which sequences have something to say.
    """
    size, row = _size(table), jnp.arange(example.shape[0])
    speaks = valid & (example >= 0) & (example < size)
    place = jnp.where(speaks, example, size)
    last = jax.ops.segment_max(row, place, num_segments=size + 1)[place]
    target = jnp.where(speaks & (row == last), example, size)
    values = jax.lax.stop_gradient(values)
    return {name: column.at[target].set(values[name].astype(column.dtype), mode="drop")
            for name, column in table.items()}


def with_tokens(x: Experience) -> Bool[Array, " N"]:
    """Sequences that have chosen tokens: scored, not empty, and kept by selection."""
    return x.mask.any(axis=1)


def per_example(first: dict[str, float], values: Callable[[Experience], dict[str, PerSequence]],
                valid: Callable[[Experience], Bool[Array, " N"]] = with_tokens) -> Control:
    """A memory of every training example, read in the slots as `rows(x.coefficient.<name>, x.example)`.

    It is keyed by `x.example`: the order of the prompts does not matter, unless one is asked twice in a batch
    (`written`). Checkpoints keep it with the state of all controls.

    Args:
      first: what each row holds before its example was ever asked, by name.
      values: x -> what is to be remembered of the batch, [N] by the same names; `x` still reads the
        memory as it was before the batch.
      valid: x -> which sequences have something to say.

    Raises:
      ValueError: by `init`, if it is not told how many training examples there are.
    """
    def init(examples):
        if examples < 1:
            raise ValueError(f"examples={examples}: this recipe remembers something of each training example; give "
                             "initial_state examples=len(task.splits['train']).")
        return {name: jnp.full((examples,), value, jnp.float32) for name, value in first.items()}

    def update(state, x, policy, metrics):
        return written(state, x.example, values(x), valid(x))

    return Control(init=init, update=update, read=lambda state: state)


def _size(table: Table) -> int:
    return next(iter(table.values())).shape[0]
