"""Masked reductions against loops over Python floats; what the mask leaves out is NaN."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax import masked
from tests import numeric

MASK = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], bool)
X = np.where(MASK, numeric.normal(0, 3, 5), np.nan)


def chosen(row):
    return [float(x) for x, m in zip(X[row], MASK[row], strict=True) if m]


ALL = chosen(0) + chosen(1) + chosen(2)


@pytest.mark.parametrize("value", [0.1, 7.7, 100.1])
def test_whitening_equal_numbers_gives_exactly_0(value):
    mask = jnp.arange(37)[None] < jnp.arange(48)[:, None]
    np.testing.assert_array_equal(masked.whiten(jnp.full((48, 37), value), mask), 0.0)
    np.testing.assert_array_equal(masked.whiten(jnp.full((48, 37), value), jnp.zeros((48, 37), bool)), 0.0)


def test_totals_and_means_run_over_chosen_tokens_only():
    np.testing.assert_allclose(numeric.in_float64(masked.total, X, MASK), sum(ALL))
    np.testing.assert_allclose(numeric.in_float64(masked.mean, X, MASK), sum(ALL) / 4)
    rows = [sum(chosen(i)) for i in range(3)]
    np.testing.assert_allclose(numeric.in_float64(masked.row_total, X, MASK), rows)
    np.testing.assert_allclose(numeric.in_float64(masked.row_mean, X, MASK), [rows[0] / 3, 0.0, rows[2]])


def test_whiten_has_bessels_correction_on_tokens():
    mean = sum(ALL) / 4
    scale = (sum((x - mean) ** 2 for x in ALL) / 3 + 1e-8) ** 0.5
    expected = np.where(MASK, (np.nan_to_num(X) - mean) / scale, 0.0)
    np.testing.assert_allclose(numeric.in_float64(masked.whiten, X, MASK), expected, rtol=1e-12)


def test_whiten_worked_example():
    # Formula sheet of REINFORCE++, baseline variant: x = (.5, -.5, 0, 0) has variance 1/6.
    x = jnp.array([[0.5], [-0.5], [0.0], [0.0]])
    whitened = masked.whiten(x, jnp.ones((4, 1), bool))[:, 0]
    np.testing.assert_allclose(whitened, [1.2247, -1.2247, 0, 0], atol=1e-4)


@pytest.mark.parametrize("count", [0, 1])
def test_whiten_of_fewer_than_two_tokens_is_zero(count):
    mask = jnp.arange(3)[None] < count
    np.testing.assert_array_equal(masked.whiten(jnp.full((1, 3), 7.0), mask), 0.0)


def test_last_is_the_last_chosen_token():
    expected = [[0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
    np.testing.assert_array_equal(masked.last(jnp.asarray(MASK)), np.array(expected, bool))


@pytest.mark.parametrize("reduction", [masked.zeroed, masked.total, masked.mean, masked.row_total, masked.row_mean,
                                       masked.whiten])
def test_left_out_numbers_get_a_gradient_of_exactly_zero(reduction):
    gradient = jax.grad(lambda x: (reduction(x, jnp.asarray(MASK)) ** 2).sum())(jnp.asarray(X, jnp.float32))
    assert np.isfinite(gradient).all() and (np.asarray(gradient)[~MASK] == 0).all()
