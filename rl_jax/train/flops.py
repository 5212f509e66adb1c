"""Floating-point operations of a traced program: every round of a scan, the share of every device.

XLA's own count (`cost_analysis`) takes the body of a loop once, however often it runs.
"""
import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

ARITHMETIC = {"add", "add_any", "sub", "mul", "div", "max", "min", "neg", "abs", "sign", "exp", "exp2", "log", "log1p",
              "expm1", "tanh", "logistic", "sqrt", "rsqrt", "pow", "integer_pow", "square", "sin", "cos", "erf"}
REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "cumsum", "cumlogsumexp", "cummax", "argmax"}


def count(program: ClosedJaxpr) -> float:
    """A product of matrices counts 2 M N K, other arithmetic one operation per number that it makes.

    A `while` loop, whose rounds nobody knows, counts one; of branches the dearest counts; a Pallas kernel counts its
    body once per cell of its grid.

    Args:
      program: traced (`jax.jit(function).trace(...).jaxpr`).
    """
    return _of(program.jaxpr)


def _of(jaxpr: Jaxpr) -> float:
    return sum((_one(equation) for equation in jaxpr.eqns), 0.0)


def _one(equation: JaxprEqn) -> float:
    name, parameters = equation.primitive.name, equation.params
    out = [variable.aval for variable in equation.outvars]
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left = equation.invars[0].aval
        return 2.0 * out[0].size * math.prod(left.shape[axis] for axis in contracted)
    if name == "cond":
        return max(map(_of, _inner(parameters["branches"])))
    if name == "while":
        return _of(parameters["body_jaxpr"].jaxpr)
    if name in REDUCTIONS:
        return float(equation.invars[0].aval.size)
    times = 1
    if name == "scan":
        times = parameters["length"]
    elif name == "shard_map":
        times = parameters["mesh"].size
    elif name == "pallas_call":
        times = math.prod(size for size in parameters["grid_mapping"].grid if isinstance(size, int))
    inner = sum(map(_of, _inner(parameters)), 0.0)
    return times * inner + (float(out[0].size) if name in ARITHMETIC else 0.0)


def _inner(parameters: Any) -> Iterator[Jaxpr]:
    """The programs among an equation's parameters."""
    if isinstance(parameters, ClosedJaxpr):
        yield parameters.jaxpr
    elif isinstance(parameters, Jaxpr):
        yield parameters
    elif isinstance(parameters, dict | tuple | list):
        for value in parameters.values() if isinstance(parameters, dict) else parameters:
            yield from _inner(value)
