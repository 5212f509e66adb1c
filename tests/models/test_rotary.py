"""Rotary embedding against complex multiplication, and what it is for: scores depend on distance alone."""
import cmath

import jax.numpy as jnp
import numpy as np

from rl_jax.models import rotary
from tests import numeric

BASE = 100.0
X = numeric.normal(0, 3, 2, 6)
POSITION = np.array([0, 5, 1])


def at(position, frequency):
    return rotary.Turn(*(a[position] for a in rotary.table(20, frequency)))


def rotated(x, position):
    by = at(jnp.asarray(position), rotary.frequencies(x.shape[-1], BASE))
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
    by = at(jnp.ones(1, int), rotary.frequencies(2, BASE))
    assert rotary.rotate(jnp.ones((1, 1, 2), jnp.bfloat16), by).dtype == jnp.bfloat16

