"""One compilation cache for all runs of these tests, in this process and in others."""
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.ends import tiny


@pytest.fixture(scope="session")
def cache_directory(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", autouse=True)
def compiled_once(cache_directory):
    """What one run has compiled the next one finds; most of a tiny run's time is compilation."""
    options = {"jax_compilation_cache_dir": str(cache_directory), **tiny.CACHE_OPTIONS}
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
