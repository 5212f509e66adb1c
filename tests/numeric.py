"""Numbers for oracles: float64 random arrays and central differences."""
import jax
import jax.numpy as jnp
import numpy as np

STEP = 1e-6
RELATIVE = 1e-6


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normal float64 numbers."""
    return np.random.default_rng(seed).normal(size=shape)


def gradient(function, x: np.ndarray) -> np.ndarray:
    """jax's gradient of the sum of `function`, in float64."""
    with jax.enable_x64(True):
        return np.asarray(jax.grad(lambda x: function(x).sum())(jnp.asarray(x)))


def central_difference(function, x: np.ndarray) -> np.ndarray:
    """(f(x + h) - f(x - h)) / 2h of the sum of `function`, one element at a time, in float64."""
    slopes = np.zeros_like(x)
    with jax.enable_x64(True):
        for index in np.ndindex(x.shape):
            above, below = x.copy(), x.copy()
            above[index] += STEP
            below[index] -= STEP
            slopes[index] = (function(jnp.asarray(above)).sum() - function(jnp.asarray(below)).sum()) / (2 * STEP)
    return slopes


def in_float64(function, *arguments):
    """`function` of arrays given as NumPy, in float64."""
    with jax.enable_x64(True):
        return np.asarray(function(*[jnp.asarray(a) if isinstance(a, np.ndarray) else a for a in arguments]))
