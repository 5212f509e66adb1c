"""The overlong penalty counts tokens."""
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.reward import length


def test_worked_example():
    # Formula sheet of DAPO, in units of 1024 tokens: 16, 18, 20 of a limit of 20 with a buffer of 4.
    mask = jnp.arange(24)[None] < jnp.array([16, 18, 20, 24, 0])[:, None]
    np.testing.assert_allclose(length.soft_overlong(mask, 20, 4), [0, -0.5, -1, -1, 0])


def test_the_papers_own_lengths():
    mask = jnp.arange(20480)[None] < jnp.array([16384, 18432, 20480])[:, None]
    np.testing.assert_allclose(length.soft_overlong(mask, 20480, 4096), [0, -0.5, -1])


def test_padding_and_tool_output_are_not_counted():
    mask = jnp.array([[1, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]], bool)
    np.testing.assert_allclose(length.soft_overlong(mask, 4, 2), [-0.5, -0.5])


@pytest.mark.parametrize("limit, buffer", [(4, 0), (4, 5), (0, 0)])
def test_an_impossible_buffer_is_refused(limit, buffer):
    with pytest.raises(ValueError, match="buffer must be in"):
        length.soft_overlong(jnp.ones((1, 2), bool), limit, buffer)
