"""Tests run on the CPU unless JAX_PLATFORMS says otherwise, and refuse silent broadcasting."""
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # the suite compiles more than it computes

import jax  # noqa: E402  (after the choice of platform)
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_dropped():
    """Thousands of programs would hold gigabytes by the end of the suite."""
    yield
    jax.clear_caches()
