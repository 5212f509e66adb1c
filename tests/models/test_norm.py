"""RMSNorm against a loop over Python floats."""
import math

import jax
import jax.numpy as jnp
import numpy as np

from rl_jax.models import norm
from tests import numeric


def test_is_the_formula():
    x, scale = numeric.normal(0, 2, 3, 5), numeric.normal(1, 5)
    found = np.asarray(norm.rms(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32), 0.1))
    for i in np.ndindex(2, 3):
        size = math.sqrt(sum(float(v) ** 2 for v in x[i]) / 5 + 0.1)
        np.testing.assert_allclose(found[i], [v / size * s for v, s in zip(x[i], scale, strict=True)], rtol=1e-5)


def test_works_in_float32_and_returns_the_input_dtype():
    x = jnp.full((1, 4), 300.0, jnp.bfloat16)  # its square is beyond float16, the mean of squares exact in float32
    found = norm.rms(x, jnp.ones(4), 1e-6)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found, np.float32), 1.0)


def test_the_module_starts_as_plain_normalisation():
    x = jnp.asarray(numeric.normal(2, 3, 4), jnp.float32)
    np.testing.assert_array_equal(norm.Norm(4, 1e-6)(x), norm.rms(x, jnp.ones(4), 1e-6))


def test_the_gradient_at_zero_is_finite():
    slope = jax.grad(lambda x: norm.rms(x, jnp.ones(4), 1e-6).sum())(jnp.zeros((1, 4)))
    np.testing.assert_allclose(slope, 1e3, rtol=1e-5)
