"""The memory of training examples against a loop over a list of rows."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.learner import assemble
from rl_jax.schedule import memory
from tests import numeric

E = 5
# Example 3 is asked twice, in two groups; 0 has one valid sequence, 4 none; 5 and -1 lie outside of the table.
EXAMPLE = np.array([3, 3, 0, 0, 3, 3, 4, 4, 5, -1])
VALID = np.array([1, 1, 1, 0, 1, 0, 0, 0, 1, 1], bool)
MEAN, COUNT = numeric.normal(0, len(EXAMPLE)), np.arange(10.0, 20.0)
BEFORE = {"mean": numeric.normal(1, E), "count": np.arange(5.0)}


def arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def oracle(example, valid, values):
    table = [float(v) for v in BEFORE["mean"]]
    for i, one in enumerate(example):  # later sequences overwrite earlier ones
        if valid[i] and 0 <= one < E:
            table[one] = float(values[i])
    return table


def found(example, valid, mean):
    values = arrays({"mean": mean, "count": COUNT[:len(mean)]})
    table = memory.written(arrays(BEFORE), jnp.asarray(example), values, jnp.asarray(valid))
    assert jax.tree.map(jnp.shape, table) == jax.tree.map(np.shape, BEFORE)
    return np.asarray(table["mean"])


def test_the_last_valid_sequence_of_an_example_is_remembered_and_nothing_else_changes():
    np.testing.assert_allclose(found(EXAMPLE, VALID, MEAN), oracle(EXAMPLE, VALID, MEAN), rtol=1e-6)
    assert oracle(EXAMPLE, VALID, MEAN)[3] == MEAN[4]  # of the group that stands last, not of its invalid sequence


def test_every_name_of_the_table_is_written_together():
    values = arrays({"mean": MEAN, "count": COUNT})
    table = memory.written(arrays(BEFORE), jnp.asarray(EXAMPLE), values, jnp.asarray(VALID))
    np.testing.assert_array_equal(table["count"], [12, 1, 2, 14, 4])


def test_nothing_valid_writes_nothing():
    np.testing.assert_array_equal(found(EXAMPLE, np.zeros(10, bool), MEAN), np.float32(BEFORE["mean"]))


def test_reading_takes_each_sequences_row_and_nan_outside_of_the_table():
    read = memory.rows(arrays(BEFORE), jnp.asarray(EXAMPLE))
    for name, column in BEFORE.items():
        expected = [column[e] if 0 <= e < E else np.nan for e in EXAMPLE]
        np.testing.assert_allclose(read[name], expected, rtol=1e-6)


def test_an_id_outside_of_the_table_writes_nothing():
    outside = np.array([-1, E, 10 * E, -E])
    np.testing.assert_array_equal(found(outside, np.ones(4, bool), MEAN[:4]), np.float32(BEFORE["mean"]))


def test_the_order_of_the_prompts_changes_nothing():
    """Where no example is asked twice; the memory is keyed by its id."""
    example = np.array([2, 2, 4, 4, 0, 0])
    order = np.array([4, 5, 0, 1, 2, 3])
    values = np.repeat(numeric.normal(2, 3), 2)
    straight = found(example, np.ones(6, bool), values)
    np.testing.assert_array_equal(found(example[order], np.ones(6, bool), values[order]), straight)
    read = memory.rows({"mean": jnp.asarray(straight)}, jnp.asarray(example[order]))
    np.testing.assert_array_equal(read["mean"], np.float32(values[order]))


def test_what_is_remembered_carries_no_gradient():
    def total(values, table):
        new = memory.written({"mean": table}, jnp.asarray(EXAMPLE), {"mean": values}, jnp.asarray(VALID))
        read = memory.rows({"mean": table}, jnp.asarray(EXAMPLE[:8]))
        return (new["mean"][3] + new["mean"][0]) + read["mean"].sum()

    gradient = jax.grad(total)(jnp.asarray(MEAN), jnp.asarray(BEFORE["mean"]))
    np.testing.assert_array_equal(gradient, 0.0)


def counted():
    """Remembers the newest reward of each example, and how often it was asked."""
    return memory.per_example({"reward": 0.5, "count": 0.0}, lambda x: {
        "reward": x.reward, "count": memory.rows(x.coefficient.seen, x.example)["count"] + 1})


def experience(state, example, mask=None):
    n = len(example)
    mask = jnp.ones((n, 2), bool) if mask is None else jnp.asarray(mask)
    x = assemble.of_arrays(jnp.zeros((n, 2)), mask, jnp.arange(1.0, n + 1), jnp.arange(n) // 2,
                           example=jnp.asarray(example))
    return dataclasses.replace(x, coefficients={"seen": state})


def test_as_a_control():
    made = counted()
    state = made.init(3)
    np.testing.assert_array_equal(made.read(state)["reward"], [0.5, 0.5, 0.5])
    update = jax.jit(made.update)
    nothing_in_the_last = np.array([[1, 1], [1, 0], [0, 0], [0, 0]], bool)
    new = update(state, experience(state, [2, 2, 0, 0], nothing_in_the_last), None, {})
    np.testing.assert_array_equal(new["reward"], [0.5, 0.5, 2.0])
    new = update(new, experience(new, [2, 2, 0, 0]), None, {})
    np.testing.assert_array_equal(new["count"], [1, 0, 2])
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):  # so that checkpoints keep it
        assert isinstance(b, jax.Array) and (a.shape, a.dtype) == (b.shape, b.dtype)


def test_who_is_valid_can_be_said():
    picky = memory.per_example({"reward": 0.0}, lambda x: {"reward": x.reward}, valid=lambda x: x.finished)
    state = picky.init(3)
    x = dataclasses.replace(experience(state, [1, 1]), finished=jnp.array([True, False]))
    np.testing.assert_array_equal(picky.update(state, x, None, {})["reward"], [0.0, 1.0, 0.0])


@pytest.mark.parametrize("examples", [0, -1])
def test_a_memory_of_no_examples_says_what_to_give(examples):
    with pytest.raises(ValueError, match=r"examples=.*give initial_state examples=len\(task.splits\['train'\]\)"):
        counted().init(examples)
