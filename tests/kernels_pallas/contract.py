"""What every implementation of every kernel owes its reference.

A test module describes its op as `Case`s and calls `check` for each; the op's own laws (its
reference against loops, its memory) stay in that module.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    """One call of an op.

    `op(*floats, *others)` and `reference(*floats, *others)` return a tuple of arrays whose
    leading axis is the rows; `floats` are differentiated, `others` are not. `silent` marks rows
    that a mask leaves out: they hold garbage, their results are not compared and their cotangent
    is 0. `row_inputs` says which floats have the rows in front.
    """

    op: Callable[..., tuple]
    reference: Callable[..., tuple]
    floats: tuple
    others: tuple
    silent: np.ndarray
    row_inputs: tuple[bool, ...]


DEVICES = {
    "tpu": jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
    "cuda": jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"),
}
KERNEL_CALL = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}


def check_lowering(platform: str, function: Callable, *shapes: Any) -> None:
    """The function lowers for a device that is not there ("tpu" or "cuda"), and its program calls a kernel.

    Args:
      shapes: `jax.ShapeDtypeStruct`s, or pytrees of them.
    """
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=DEVICES[platform])
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,))
    assert KERNEL_CALL[platform] in lowered.as_text()


def check_runs_kernel(function: Callable, *arguments: Any) -> None:
    """The function's jaxpr holds a `pallas_call`."""
    assert "pallas_call" in str(jax.make_jaxpr(function)(*arguments))


def tolerance(case: Case) -> float:
    """Relative to the largest entry: 1e-5 in float32, two roundings of an 8-bit mantissa in bfloat16."""
    return 2.0**-7 if any(x.dtype == jnp.bfloat16 for x in case.floats) else 1e-5


def check(case: Case) -> None:
    """Value and vjp equal the reference's, under jit, vmap and scan; silent rows get exactly 0."""
    expected = _jitted(case, case.reference)
    for name, transformed in {"jit": _jitted, "vmap": _mapped, "scan": _scanned}.items():
        found = transformed(case, case.op)
        _compare(case, name, found, expected)
        _check_silent(case, found)


def _cotangents(case: Case, results: tuple) -> tuple:
    random = np.random.default_rng(0)

    def one(result):
        cotangent = random.normal(size=result.shape).astype(np.float32)
        cotangent[case.silent] = 0
        return jnp.asarray(cotangent, result.dtype)

    return tuple(one(result) for result in results)


def _value_and_vjp(case: Case, function: Callable, floats: tuple) -> tuple:
    """Results, cotangents of the floats, and those when every row is silent."""
    results, pull = jax.vjp(lambda *floats: function(*floats, *case.others), *floats)
    return results, pull(_cotangents(case, results)), pull(jax.tree.map(jnp.zeros_like, results))


def _jitted(case: Case, function: Callable) -> tuple:
    return jax.jit(lambda floats: _value_and_vjp(case, function, floats))(case.floats)


def _mapped(case: Case, function: Callable) -> tuple:
    mapped = jax.jit(jax.vmap(lambda floats: _value_and_vjp(case, function, floats)))
    return _second(mapped(_two(case)))


def _scanned(case: Case, function: Callable) -> tuple:
    step = lambda _, floats: (None, _value_and_vjp(case, function, floats))
    return _second(jax.jit(lambda xs: jax.lax.scan(step, None, xs)[1])(_two(case)))


def _two(case: Case) -> tuple:
    return tuple(jnp.stack([x * 0.5, x]) for x in case.floats)


def _second(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[1], tree)


def _compare(case: Case, name: str, found: Any, expected: Any) -> None:
    heard = ~case.silent
    for i, (x, y) in enumerate(zip(found[0], expected[0], strict=True)):
        assert x.dtype == y.dtype and x.shape == y.shape, (name, i)
        _close(np.asarray(x)[heard], np.asarray(y)[heard], tolerance(case), f"{name}, result {i}")
    for i, (x, y) in enumerate(zip(found[1], expected[1], strict=True)):
        assert x.dtype == y.dtype and x.shape == y.shape, (name, i)
        _close(np.asarray(x, np.float32), np.asarray(y, np.float32), tolerance(case), f"{name}, cotangent {i}")


def _close(x: np.ndarray, y: np.ndarray, relative: float, message: str) -> None:
    scale = np.max(np.abs(y), initial=0)
    np.testing.assert_allclose(x, y, rtol=relative, atol=relative * scale, err_msg=message)


def _check_silent(case: Case, found: tuple) -> None:
    """A silent row's own inputs get exactly 0; with every row silent, so does everything else."""
    _, cotangents, nothing = found
    for rows, cotangent, zero in zip(case.row_inputs, cotangents, nothing, strict=True):
        assert np.isfinite(np.asarray(cotangent, np.float32)).all()
        assert (np.asarray(zero, np.float32) == 0).all()
        if rows:
            assert (np.asarray(cotangent, np.float32)[case.silent] == 0).all()
