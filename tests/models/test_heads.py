"""Values and rewards against loops over Python floats."""
import jax
import jax.numpy as jnp
import numpy as np

from rl_jax.models import heads
from rl_jax.models.network import Network
from tests import numeric
from tests.models import published_shapes

HIDDEN = numeric.normal(0, 4, 5, 3)
WEIGHT = numeric.normal(1, 3)
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], bool)


def dot(row):
    return sum(float(a) * float(b) for a, b in zip(row, WEIGHT, strict=True))


def test_a_value_per_state():
    found = numeric.in_float64(lambda h, w: heads.value(h, w), HIDDEN, WEIGHT)
    assert found.shape == (4, 5)
    for n, t in np.ndindex(4, 5):
        np.testing.assert_allclose(found[n, t], dot(HIDDEN[n, t]), rtol=1e-5)


def test_a_reward_is_of_the_last_token_that_is_shown():
    """Padding on the right, tokens that do not count in between, and a text of none."""
    found = heads.reward(jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(WEIGHT, jnp.float32), jnp.asarray(MASK))
    expected = []
    for n in range(4):
        last = [t for t in range(5) if MASK[n, t]][-1:]
        expected.append(dot(HIDDEN[n, last[0]]) if last else 0.0)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    garbage = np.where(np.arange(5)[None, :, None] > 1, 1e9, HIDDEN)[1:2]
    same = heads.reward(jnp.asarray(garbage, jnp.float32), jnp.asarray(WEIGHT, jnp.float32), jnp.asarray(MASK[1:2]))
    np.testing.assert_array_equal(same, found[1:2])


def test_bfloat16_states_are_summed_in_float32():
    hidden, weight = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(WEIGHT, jnp.bfloat16)
    wide = [a.astype(jnp.float32) for a in (hidden, weight)]
    for found, expected in ((heads.value(hidden, weight), heads.value(*wide)),
                            (heads.reward(hidden, weight, jnp.asarray(MASK)), heads.reward(*wide, jnp.asarray(MASK)))):
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, expected)


def test_a_critic_starts_as_a_copy_that_values_nothing():
    network = Network(published_shapes.PLAIN)
    policy = published_shapes.drawn(network)
    critic = heads.critic_from(network, policy)
    assert critic["value"].shape == (8,) and not np.asarray(critic["value"]).any()
    jax.tree.map(np.testing.assert_array_equal, critic["body"], policy)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a is not b, critic["body"], policy)))
