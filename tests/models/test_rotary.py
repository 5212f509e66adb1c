"""Rotary embedding against complex multiplication, and what it is for: scores depend on distance alone."""
import cmath

import jax.numpy as jnp
import numpy as np

from rl_jax.models import rotary
from tests import numeric

BASE = 100.0
X = numeric.normal(0, 3, 2, 6)
POSITION = np.array([0, 5, 1])


def rotated(x, position):
    by = rotary.turn(jnp.asarray(position), rotary.frequencies(x.shape[-1], BASE))
    return np.asarray(rotary.rotate(jnp.asarray(x, jnp.float32), by))


def test_each_pair_is_turned_by_its_angle():
    found = rotated(X, POSITION)
    for row, head, i in np.ndindex(3, 2, 3):
        turn = cmath.exp(1j * int(POSITION[row]) * BASE ** (-2 * i / 6))
        pair = complex(X[row, head, i], X[row, head, i + 3]) * turn
        np.testing.assert_allclose(found[row, head, [i, i + 3]], [pair.real, pair.imag], atol=1e-6)


def test_products_depend_on_the_distance_alone():
    x = np.repeat(X[:1], 4, axis=0)
    first, later = (rotated(x, np.array(at)) for at in ([0, 3, 7, 7], [10, 13, 17, 17]))
    for i, j in ((0, 1), (1, 2), (2, 3)):
        np.testing.assert_allclose((first[i] * first[j]).sum(), (later[i] * later[j]).sum(), rtol=1e-4)


def test_keeps_the_dtype():
    by = rotary.turn(jnp.ones(1, int), rotary.frequencies(2, BASE))
    assert rotary.rotate(jnp.ones((1, 1, 2), jnp.bfloat16), by).dtype == jnp.bfloat16


def test_angles_from_a_table_are_those_of_each_row():
    position, frequency = jnp.array([2, 0, 3, 3, 1, 2]), rotary.frequencies(8, BASE)
    for below in (4, 5, 6, 100):  # the first two are fewer than there are rows
        np.testing.assert_allclose(rotary.turn(position, frequency, below), rotary.turn(position, frequency), rtol=1e-6)
