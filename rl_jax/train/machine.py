"""What a process that trains asks of its machine: memory that is kept, compiled programs that are kept."""
import ctypes
import os
import pathlib
import sys

# of glibc's malloc.h
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
CACHE = "JAX_COMPILATION_CACHE_DIR"


def prepare() -> None:
    """`keep_memory` and `keep_programs`, for a script, before anything runs."""
    keep_memory()
    keep_programs()


def keep_memory() -> bool:
    """Lets the C library keep what is freed, instead of giving it back to the system; returns whether it does.

    On a CPU every step frees and takes the same large arrays; given back, each of their pages is fetched and cleared
    again. Only glibc is asked, and only where the user has not set its variables
    (MALLOC_ARENA_MAX and the like).
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):  # another C library
        return False
    wanted = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, ARENA_MAX: 1}  # an arena of a thread's own ends at 64 MiB
    return all([mallopt(name, value) == 1 for name, value in wanted.items()])


def give_back_memory() -> None:
    """Gives the system what the C library holds and nobody uses, such as what a compiler has freed."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, TypeError):  # another C library
        return
    trim(0)


def keep_programs() -> pathlib.Path | None:
    """Has jax keep compiled programs in ~/.cache/rl_jax, or where JAX_COMPILATION_CACHE_DIR says; returns the folder.

    A run of the same shapes then starts without compiling. An empty JAX_COMPILATION_CACHE_DIR keeps none.
    """
    import jax

    given = os.environ.get(CACHE)
    if given == "":
        return None
    folder = pathlib.Path(given) if given else pathlib.Path.home() / ".cache" / "rl_jax"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
