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
]


@pytest.mark.parametrize("function, expected", CASES)
def test_against_loops(function, expected):
    weight = numeric.in_float64(function, MASK)
    assert weight.shape == MASK.shape and (weight[~MASK] == 0).all()
    np.testing.assert_allclose((LOSS * weight).sum(), expected, rtol=1e-12)


@pytest.mark.parametrize("function, expected", [
    (aggregate.token_mean, 2.5), (aggregate.sequence_mean_token_mean, 2.0), (aggregate.sequence_mean_token_sum, 5.0),
    (lambda mask: aggregate.fixed_norm(mask, 4), 1.25)])
def test_worked_example(function, expected):
    # Formula sheet, aggregators: lengths (1, 3), losses (1 | 2, 2, 5).
    weight = function(jnp.array([[1, 0, 0], [1, 1, 1]], bool))
    np.testing.assert_allclose((jnp.array([[1.0, 9.0, 9.0], [2.0, 2.0, 5.0]]) * weight).sum(), expected, rtol=1e-6)


@pytest.mark.parametrize("function, _", CASES)
def test_padding_changes_nothing_and_nothing_chosen_is_zero(function, _):
    mask = jnp.asarray(MASK)
    np.testing.assert_array_equal(function(jnp.pad(mask, ((0, 0), (0, 3))))[:, :4], function(mask))
    np.testing.assert_array_equal(function(jnp.zeros((2, 3), bool)), 0.0)
