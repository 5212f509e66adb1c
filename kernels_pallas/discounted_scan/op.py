"""Discounted sums from the end of time: returns, advantages, and what is carried through tokens nobody chose."""
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas import dispatch
from kernels_pallas.discounted_scan import backward, blocks, forward, kernel, reference

Factor = int | float | Float[Array, ""] | Float[Array, "N T"]
PASSES = {"xla": forward.PASSES, "pallas": kernel.PASSES}


def discounted_scan(x: Float[Array, "N T"], factor: Factor, *, last: Float[Array, " N"] | None = None,
                    mask: Bool[Array, "N T"] | None = None, implementation: str | None = None) -> Float[Array, "N T"]:
    """y_t = x_t + factor_t y_{t+1}; where the mask is False y_t = y_{t+1}.

    So with a factor of 0 it is the next chosen x from t on, with 1 the sum of all of them. Differentiable in x, factor
    and last. What the mask leaves out may hold anything, NaN too: it is not read and its cotangents are exactly 0.

    Args:
      x: what each step adds, in any unit.
      factor: discount of what comes after each step, dimensionless. The product over the steps of a block (256 at
        most) must be finite.
      last: y after the last step, in the unit of x; None: 0.
      mask: which steps take time; None: all.
      implementation: "reference" (step by step), "xla" (blocks of steps side by side), "pallas" (the same as
        kernels; interpreted on a CPU), or None for the best measured on this device.

    Returns:
      y in the unit of x, float32, or float64 if an argument is.

    Raises:
      ValueError: shapes that do not fit, an implementation that does not exist.
    """
    _check(x, factor, last, mask)
    run = dispatch.implementation("discounted_scan", implementation, blocks.best(), {
        "reference": reference.discounted_scan,
        **{name: functools.partial(_in_passes, name) for name in PASSES}})
    given = [one for one in (x, factor, last) if isinstance(one, jax.Array)]
    dtype = jnp.promote_types(jnp.result_type(*given), jnp.float32)
    x = x.astype(dtype)
    last = jnp.zeros_like(x[:, 0]) if last is None else last.astype(dtype)
    factor = jnp.asarray(factor, dtype) * jnp.ones_like(x)
    if mask is not None:
        x, factor = jnp.where(mask, x, 0), jnp.where(mask, factor, 1)
    return run(x, factor, last)


def _check(x, factor, last, mask) -> None:
    if 0 in x.shape:
        raise ValueError(f"x [N, T] must have a row and a step, not {x.shape}.")
    for name, array, shapes in (("factor", factor, ((), x.shape)), ("last", last, (x.shape[:1],)),
                                ("mask", mask, (x.shape,))):
        if array is not None and jnp.shape(array) not in shapes:
            raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))} for x {x.shape}, "
                             f"not {jnp.shape(array)}.")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_passes(name, x, factor, last):
    return forward.scan(PASSES[name], x, factor, last)


def _forward(name, x, factor, last):
    y = _in_passes(name, x, factor, last)
    return y, (factor, last, y)


def _backward(name, residuals, d_y):
    return backward.cotangents(PASSES[name], *residuals, d_y)


_in_passes.defvjp(_forward, _backward)
