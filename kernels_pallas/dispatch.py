"""Which implementation of an op runs, and how a Pallas kernel is called on each kind of device."""
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as mosaic_tpu
from jax.experimental.pallas import triton

T = TypeVar("T")


def implementation(op: str, asked: str | None, best: str, allowed: Mapping[str, T]) -> T:
    """The implementation that was asked for, or the best measured one; never a silent substitute.

    Args:
      op: the op's name, for the message.
      asked: a key of `allowed`, or None for `best`.
      best: the fastest measured on this device.
      allowed: what exists, by name.

    Raises:
      ValueError: nothing of that name exists.
    """
    name = best if asked is None else asked
    if name not in allowed:
        raise ValueError(f"{op} has no implementation {name!r}; allowed are None and {sorted(allowed)}.")
    return allowed[name]


def platform() -> str:
    """"cpu", "gpu" or "tpu": the device that what is being traced will run on.

    It is that of the abstract device in scope, where there is one (so a machine without an accelerator can lower for
    one), else of jax's default device.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    chosen = jax.config.jax_default_device if described is None else described
    name = jax.default_backend() if chosen is None else chosen if isinstance(chosen, str) else chosen.platform
    return "gpu" if name in ("cuda", "rocm") else name


def pallas_call(body: Callable[..., None], *, warps: int = 4, stages: int = 2, sequential: int = 0,
                **options: Any) -> Callable[..., Any]:
    """`pl.pallas_call` for `platform()`: interpreted on a CPU, Triton on a GPU, Mosaic on a TPU.

    The backend is always named: jax's default for GPUs changes with its version.

    Args:
      body: written in the portable part of Pallas.
      warps, stages: of Triton: warps per program, depth of its software pipeline.
      sequential: how many of the last grid axes must run in order on a TPU, because they add to one output block. A
        GPU runs all in any order: there such an axis must have length 1.
      options: grid, in_specs and out_specs, or a grid_spec with all three; out_shape, name, ...
    """
    where = platform()
    if where == "cpu":
        return pl.pallas_call(body, interpret=True, **options)
    if where == "gpu":
        parameters = triton.CompilerParams(num_warps=warps, num_stages=stages)
    else:
        grid = options["grid_spec"].grid if "grid_spec" in options else options["grid"]
        grid = grid if isinstance(grid, tuple) else (grid,)
        parallel = len(grid) - sequential
        parameters = mosaic_tpu.CompilerParams(
            dimension_semantics=("parallel",) * parallel + ("arbitrary",) * sequential)
    return pl.pallas_call(body, compiler_params=parameters, **options)
