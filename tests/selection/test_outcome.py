"""Which groups disagree, against loops."""
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.selection import outcome


def test_worked_example():
    # All right, all wrong, mixed, alone and right, alone and wrong; interleaved.
    score = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    group = jnp.array([0, 1, 2, 0, 1, 2, 9, 15])
    np.testing.assert_array_equal(outcome.mixed(score, group), [False, False, True, False, False, True, False, False])


def test_groups_that_are_all_right_worked_example():
    score = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    group = jnp.array([0, 1, 2, 0, 1, 2, 9, 15])
    expected = [False, True, True, False, True, True, False, True]
    np.testing.assert_array_equal(outcome.not_all_correct(score, group), expected)


def test_credit_of_a_least_size():
    # Formula sheet of LOOP: |A| < .01 is discarded.
    credit = jnp.array([0.0, 0.009, -0.009, 0.01, -0.5, 1.0])
    np.testing.assert_array_equal(outcome.at_least(credit, 0.01), [False, False, False, True, True, True])


@pytest.mark.parametrize("function, few", [(outcome.mixed, 1), (outcome.not_all_correct, 0)])
@pytest.mark.parametrize("correct", [0.0, 0.5, 1.0])
def test_against_loops(correct, function, few):
    generator = np.random.default_rng(0)
    score, group = generator.choice([-1.0, 0.0, 0.5, 1.0], 24), generator.integers(0, 8, 24)
    expected = []
    for own in group:
        right = [bool(s >= correct) for s, g in zip(score, group, strict=True) if g == own]
        expected.append(few <= sum(right) < len(right))
    found = function(jnp.asarray(score, jnp.float32), jnp.asarray(group), correct)
    np.testing.assert_array_equal(found, expected)
    assert any(expected) or correct == 0.0
