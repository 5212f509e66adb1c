"""Tests run on the CPU unless JAX_PLATFORMS says otherwise, and refuse silent broadcasting."""
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # the suite compiles more than it computes

import jax  # noqa: E402  (after the choice of platform)
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


# What takes longest and repeats what a shorter test shows for one case: CI runs it with -m slow, beside the suite.
SLOW = (
    "tests/ends/test_notebooks.py::test_it_runs",
    "tests/ends/test_configs.py::test_at_toy_size_it_runs_saves_and_resumes_bit_equal[configs/quickstart.py]",
    "tests/ends/test_configs.py::test_at_toy_size_two_recipes_are_compared_once[configs/compare/chain.py]",
    "tests/kernels_pallas/test_decode_attention.py::test_contract_in_bfloat16",
    "tests/kernels_pallas/test_linear_logprob_sharded.py",
    "tests/kernels_pallas/test_linear_policy_loss.py::test_under_vmap_and_scan",
    "tests/kernels_pallas/test_linear_statistics.py::test_contract",
    "tests/kernels_pallas/test_policy_gate_stages.py::test_stages_have_the_loss_and_metrics_of_the_whole",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks what is in SLOW."""
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_dropped():
    """Thousands of programs would hold gigabytes by the end of the suite."""
    yield
    jax.clear_caches()
