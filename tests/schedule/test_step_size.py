"""The step's factor by the gradient's noise."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.schedule import step_size


@pytest.mark.parametrize("square, variance, gain, ceiling", [(5.0, 1.0, 1.0, 1.0), (5.0, 1.0, 3.0, 10.0),
                                                             (5.0, 1.0, 3.0, 1.5), (2.0, 1.9, 1.0, 1.0)])
def test_against_the_formula(square, variance, gain, ceiling):
    snr = (square - variance) / variance
    np.testing.assert_allclose(step_size.signal_share(square, variance, gain=gain, ceiling=ceiling),
                               min(gain * snr / (1 + snr), ceiling), rtol=1e-6)


def test_degenerate():
    # Formula sheet of OBLR-PO: the whole step without noise, none where the square is not above the noise.
    assert step_size.signal_share(4.0, 0.0) == 1
    assert step_size.signal_share(4.0, 0.0, gain=0.25) == 0.25
    assert step_size.signal_share(1.0, 1.0) == step_size.signal_share(0.5, 1.0) == step_size.signal_share(0.0, 0.0) == 0


def test_more_samples_allow_a_larger_step():
    # Formula sheet: doubling N at fixed gradient and spread. The square's expectation is |g|^2 + sigma^2 / N.
    gradient, spread = 2.0, 12.0
    factors = [float(step_size.signal_share(gradient + spread / n, spread / n)) for n in (1, 2, 4, 8)]
    np.testing.assert_allclose(factors, [gradient / (gradient + spread / n) for n in (1, 2, 4, 8)], rtol=1e-6)
    assert factors == sorted(set(factors))


def test_may_be_traced():
    np.testing.assert_allclose(jax.jit(step_size.signal_share)(jnp.float32(4.0), jnp.float32(1.0)), 0.75)
