"""Tests run on the CPU unless JAX_PLATFORMS says otherwise, and refuse silent broadcasting."""
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # the suite compiles more than it computes

import jax  # noqa: E402  (after the choice of platform)

jax.config.update("jax_numpy_rank_promotion", "raise")
