"""Tests run on the CPU unless JAX_PLATFORMS says otherwise, and refuse silent broadcasting."""
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402  (after the choice of platform)

jax.config.update("jax_numpy_rank_promotion", "raise")
