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


@pytest.mark.parametrize("correct", [0.0, 0.5, 1.0])
def test_against_loops(correct):
    generator = np.random.default_rng(0)
    score, group = generator.choice([-1.0, 0.0, 0.5, 1.0], 24), generator.integers(0, 8, 24)
    expected = []
    for own in group:
        right = [bool(s >= correct) for s, g in zip(score, group, strict=True) if g == own]
        expected.append(0 < sum(right) < len(right))
    found = outcome.mixed(jnp.asarray(score, jnp.float32), jnp.asarray(group), correct)
    np.testing.assert_array_equal(found, expected)
    assert any(expected) or correct == 0.0
