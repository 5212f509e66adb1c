"""A function with every operation that one of the backends lacks written in operations that both have."""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array

# Calls, and the parameter that holds what is called. A derivative has been taken before anything is inlined.
INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr",
           "custom_vjp_call": "call_jaxpr"}
_SMALL = 0.35  # below it 8 terms of the series leave out less than 1e-8 of it, above it e^x - 1 loses less than 2 bits


def portable(of: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of pytrees of arrays, evaluated operation by operation."""
    def evaluated(*arguments: Any) -> Any:
        closed, shapes = jax.make_jaxpr(of, return_shape=True)(*arguments)
        return jax.tree.unflatten(jax.tree.structure(shapes), _evaluated(closed, jax.tree.leaves(arguments)))

    return evaluated


def needed(jaxpr: Jaxpr, wanted: list) -> set:
    """The variables that the wanted ones depend on."""
    found = {x for x in wanted if not isinstance(x, Literal)}
    for equation in reversed(jaxpr.eqns):
        if not found.isdisjoint(equation.outvars):
            found |= {x for x in equation.invars if not isinstance(x, Literal)}
    return found


def _evaluated(closed: ClosedJaxpr, arguments: list) -> list:
    known = dict(zip((*closed.jaxpr.constvars, *closed.jaxpr.invars), (*closed.consts, *arguments), strict=True))
    read = lambda x: x.val if isinstance(x, Literal) else known[x]
    used = needed(closed.jaxpr, closed.jaxpr.outvars)  # the rest might not lower
    for equation in closed.jaxpr.eqns:
        if used.isdisjoint(equation.outvars):
            continue
        primitive, values = equation.primitive, [read(x) for x in equation.invars]
        if primitive.name in INSTEAD:
            results = [INSTEAD[primitive.name](*values, equation.params)]
        elif primitive.name in INLINED:
            results = _evaluated(equation.params[INLINED[primitive.name]], values)
        else:
            results = primitive.bind(*values, **equation.params)
            results = results if primitive.multiple_results else [results]
        known.update(zip(equation.outvars, results, strict=True))
    return [read(x) for x in closed.jaxpr.outvars]


def _expm1(x: Array, _: dict) -> Array:
    if x.dtype != jnp.float32:
        return jnp.expm1(x)
    series = jnp.ones_like(x)
    for k in range(8, 1, -1):
        series = 1.0 + x * (1.0 / k) * series
    return jnp.where(jnp.abs(x) < _SMALL, x * series, jnp.exp(x) - 1.0)


def _reduce_or(x: Array, parameters: dict) -> Array:
    return jnp.max(x.astype(jnp.int32), axis=parameters["axes"]) > 0


def _reduce_and(x: Array, parameters: dict) -> Array:
    return jnp.min(x.astype(jnp.int32), axis=parameters["axes"]) > 0


# Mosaic has no expm1, Triton does not reduce booleans.
INSTEAD = {"expm1": _expm1, "reduce_or": _reduce_or, "reduce_and": _reduce_and}
