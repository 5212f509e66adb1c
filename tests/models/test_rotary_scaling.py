"""Stretched wavelengths against the formulas, one frequency at a time in Python floats, and on the known model."""
import math

import numpy as np
import pytest

from rl_jax.models import rotary
from rl_jax.models.rotary import Scaling

LLAMA = {factor: Scaling(kind="llama3", factor=factor, low=1.0, high=4.0, original_length=8192)
         for factor in (8.0, 32.0)}  # Llama 3.1 and 3.2, base 500,000


def plain(size, base):
    return [base ** (-2 * i / size) for i in range(size // 2)]


def llama3(frequency, factor, low, high, length):
    """By the wavelength, as the released code has it."""
    wavelength = 2 * math.pi / frequency
    if wavelength < length / high:
        return frequency
    if wavelength > length / low:
        return frequency / factor
    smooth = (length / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


@pytest.mark.parametrize("size, base", [(8, 10_000.0), (128, 500_000.0), (2, 7.0)])
def test_without_scaling(size, base):
    found = rotary.frequencies(size, base)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, plain(size, base), rtol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_linear_divides_all(factor):
    found = rotary.frequencies(16, 1_000_000.0, Scaling(kind="linear", factor=factor))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [f / factor for f in plain(16, 1_000_000.0)], rtol=1e-6)


@pytest.mark.parametrize("scaling, size, base", [
    (LLAMA[8.0], 128, 500_000.0), (LLAMA[32.0], 64, 500_000.0),
    (Scaling(kind="llama3", factor=4.0, low=0.5, high=1.5, original_length=16), 16, 1_000.0)])
def test_llama3_keeps_the_short_and_divides_the_long(scaling, size, base):
    found = rotary.frequencies(size, base, scaling)
    numbers = scaling.factor, scaling.low, scaling.high, scaling.original_length
    expected = [llama3(f, *numbers) for f in plain(size, base)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # close to a bound, a rounding of the frequency tells more
    shares = np.array(expected) / plain(size, base)
    assert found.dtype == np.float32
    kept, divided = shares == 1, np.isclose(shares, 1 / scaling.factor)
    assert kept.any() and divided.any() and (~kept & ~divided).any()  # all three cases occur


@pytest.mark.parametrize("fields, message", [
    ({"kind": "yarn", "factor": 2.0}, r"kind='yarn': allowed are \('linear', 'llama3'\)"),
    ({"kind": "linear", "factor": 0.5}, "factor=0.5.*factor is at least 1"),
    ({"kind": "llama3", "factor": 2.0, "low": 4.0}, "low=4.0, high=4.0.*0 < low < high"),
    ({"kind": "llama3", "factor": 2.0, "original_length": 0}, "original_length positive")])
def test_impossible_numbers_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Scaling(**fields)
