"""Aggregates against loops over Python floats and the formula sheet's numbers."""
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.weighting import aggregate
from tests import numeric

# A row with a hole, an empty one, a full one.
MASK = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
LOSS = numeric.normal(0, 3, 4)
LENGTH = 6


def rows():
    return [[float(v) for v, m in zip(*row, strict=True) if m] for row in zip(LOSS, MASK, strict=True)]


CASES = [
    (aggregate.token_mean, sum(map(sum, rows())) / 6),
    (aggregate.sequence_mean_token_mean, sum(sum(r) / max(len(r), 1) for r in rows()) / 3),
    (aggregate.sequence_mean_token_sum, sum(map(sum, rows())) / 3),
    (lambda mask: aggregate.fixed_norm(mask, LENGTH), sum(map(sum, rows())) / (3 * LENGTH)),
    (aggregate.present_sequence_mean_token_mean, sum(sum(r) / len(r) for r in rows() if r) / 2),
    (aggregate.present_sequence_mean_token_sum, sum(map(sum, rows())) / 2),
]


@pytest.mark.parametrize("function, expected", CASES)
def test_against_loops(function, expected):
    weight = numeric.in_float64(function, MASK)
    assert weight.shape == MASK.shape and (weight[~MASK] == 0).all()
    np.testing.assert_allclose((LOSS * weight).sum(), expected, rtol=1e-12)


@pytest.mark.parametrize("function, expected", [
    (aggregate.token_mean, 2.5), (aggregate.sequence_mean_token_mean, 2.0), (aggregate.sequence_mean_token_sum, 5.0),
    (lambda mask: aggregate.fixed_norm(mask, 4), 1.25), (aggregate.present_sequence_mean_token_mean, 2.0),
    (aggregate.present_sequence_mean_token_sum, 5.0)])
def test_worked_example(function, expected):
    # Formula sheet, aggregators: lengths (1, 3), losses (1 | 2, 2, 5).
    weight = function(jnp.array([[1, 0, 0], [1, 1, 1]], bool))
    np.testing.assert_allclose((jnp.array([[1.0, 9.0, 9.0], [2.0, 2.0, 5.0]]) * weight).sum(), expected, rtol=1e-6)


@pytest.mark.parametrize("function, _", CASES)
def test_padding_changes_nothing_and_nothing_chosen_is_zero(function, _):
    mask = jnp.asarray(MASK)
    np.testing.assert_array_equal(function(jnp.pad(mask, ((0, 0), (0, 3))))[:, :4], function(mask))
    np.testing.assert_array_equal(function(jnp.zeros((2, 3), bool)), 0.0)


@pytest.mark.parametrize("present, every", [
    (aggregate.present_sequence_mean_token_mean, aggregate.sequence_mean_token_mean),
    (aggregate.present_sequence_mean_token_sum, aggregate.sequence_mean_token_sum)])
def test_empty_sequences_leave_the_count_only_where_the_name_says_so(present, every):
    # Formula sheet, aggregators: verl leaves them out of the outer count, TRL keeps them in.
    full = MASK[[0, 2]]
    np.testing.assert_allclose(present(jnp.asarray(MASK))[np.array([0, 2])], present(jnp.asarray(full)), rtol=1e-6)
    np.testing.assert_allclose(present(jnp.asarray(full)), every(jnp.asarray(full)), rtol=1e-6)
    np.testing.assert_allclose(3 * every(jnp.asarray(MASK)), 2 * present(jnp.asarray(MASK)), rtol=1e-6)


def test_length_of_the_padding_and_doubled_tokens():
    # Formula sheet of Dr. GRPO: every token twice doubles the fixed norm's total and leaves the mean of means.
    short, twice = jnp.ones((2, 3), bool), jnp.ones((2, 6), bool)
    loss = jnp.array([[1.0, 2.0, 6.0], [0.5, 0.5, 0.5]])
    for weight, factor in ((lambda mask: aggregate.fixed_norm(mask, 8), 2), (aggregate.sequence_mean_token_mean, 1)):
        once = (loss * weight(short)).sum()
        np.testing.assert_allclose((jnp.repeat(loss, 2, axis=1) * weight(twice)).sum(), factor * once, rtol=1e-6)
