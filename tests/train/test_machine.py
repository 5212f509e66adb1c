"""In processes of their own: what is asked of malloc and of jax holds for the whole process."""
import os
import subprocess
import sys

FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from rl_jax.train import machine
if sys.argv[1] == "kept":
    assert machine.keep_memory()
step = jax.jit(lambda x: x + 1)
x = jnp.ones(16 << 20)
for _ in range(5):
    jax.block_until_ready(step(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    jax.block_until_ready(step(x))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(program, *arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = subprocess.run([sys.executable, "-c", program, *arguments], env={**kept, **environment}, check=True,
                           capture_output=True, text=True)
    return found.stdout.strip()


def test_freed_memory_is_not_fetched_again():
    """Results of 64 MiB, 16,384 pages of 4 KiB: given back, each of forty is fetched again."""
    anew, kept = int(run(FAULTS, "given back")), int(run(FAULTS, "kept"))
    assert kept < anew / 2


def test_a_user_s_own_settings_stay():
    program = "from rl_jax.train import machine; print(machine.keep_memory())"
    assert run(program, MALLOC_ARENA_MAX="4") == "False"


PROGRAM = """
import jax, jax.numpy as jnp
from rl_jax.train import machine
print(machine.keep_programs())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: jnp.sin(x) + 1)(jnp.ones(3)).block_until_ready()
"""


def test_compiled_programs_are_kept(tmp_path):
    assert run(PROGRAM, JAX_COMPILATION_CACHE_DIR=str(tmp_path)) == str(tmp_path)
    kept = set(tmp_path.iterdir())
    assert kept
    run(PROGRAM, JAX_COMPILATION_CACHE_DIR=str(tmp_path))
    assert {path for path in tmp_path.iterdir() if path.suffix != ".atime" and "-atime" not in path.name} <= kept


def test_where_they_are_kept_and_how_not(tmp_path):
    assert run(PROGRAM, HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR="") == "None"
    assert run("import os; os.environ.pop('JAX_COMPILATION_CACHE_DIR', None)" + PROGRAM, HOME=str(tmp_path)) == str(
        tmp_path / ".cache" / "rl_jax")
