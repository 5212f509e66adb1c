"""What a gate does, found by tracing it once: names, what it depends on, and whether it can be in a kernel."""
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from kernels_pallas.policy_gate import portable, reference
from kernels_pallas.policy_gate.reference import Gate

# What was seen to lower for both kinds of device, in values and in gradients; `portable` writes some of it anew.
ELEMENTWISE = frozenset("""abs add add_any and atan2 ceil clamp convert_element_type copy copy_p cos div eq exp exp2
expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow rem rsqrt select_n sign
sin sqrt square stop_gradient sub tanh xor
""".split())
SHAPES = frozenset(("broadcast_in_dim", "expand_dims", "reshape", "squeeze"))
REDUCTIONS = frozenset(("reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_sum"))
SIZES = (13, 17), (19, 23)  # of rows and tokens, other in each: what depends on them shows


class Traced(NamedTuple):
    """What is known of a function of (policy, given).

    Attributes:
      out: what it returns, as shapes.
      moving: the policy arrays that its terms may depend on.
      policy, given: the arrays that anything of it may depend on.
      reduction: an operation that joins tokens, or None.
      obstacle: why it cannot be in a kernel over blocks of rows, or None.
    """

    out: Any
    moving: frozenset[str]
    policy: frozenset[str]
    given: frozenset[str]
    reduction: str | None
    obstacle: str | None

    @property
    def level(self) -> str:
        """"token" where it was seen to treat each token by itself, else "row"."""
        return "token" if self.reduction is None and self.obstacle is None else "row"


def function(of: Gate, name: str, policy: dict[str, Any], given: dict[str, Any]) -> Traced:
    """Traces `of` at the shapes of policy and given.

    Args:
      of: (policy, given) -> arrays.
      name: of the argument, for messages.
      policy, given: arrays or shapes by name; given has the mask.

    Raises:
      ValueError: it reads a name that is not there, or an array that is not an argument.
    """
    try:
        closed, out = jax.make_jaxpr(of, return_shape=True)(*jax.tree.map(_shape, (policy, given)))
    except KeyError as error:
        raise ValueError(f"the {name} reads {error}, which is in neither policy {sorted(policy)} nor given "
                         f"{sorted(given)}: pass it in one of them.") from error
    _refuse_closed_over(of, name, closed)
    jaxpr = closed.jaxpr
    ends = [("policy", one) for one in sorted(policy)] + [("given", one) for one in sorted(given)]

    def read(where, wanted):
        used = portable.needed(jaxpr, wanted)
        found = (end for end, x in zip(ends, jaxpr.invars, strict=True) if x in used)
        return frozenset(one for kind, one in found if kind == where)

    terms = jaxpr.outvars[:len(jax.tree.leaves(out[0] if isinstance(out, tuple) else out))]
    reduction, obstacle = _nature(of, policy, given)
    return Traced(out, read("policy", terms), read("policy", jaxpr.outvars), read("given", jaxpr.outvars), reduction,
                  obstacle)


def _nature(of: Gate, policy: dict[str, Any], given: dict[str, Any]) -> tuple[str | None, str | None]:
    try:
        small, large = (jax.make_jaxpr(of)(*_resized((policy, given), given["mask"], size)).jaxpr for size in SIZES)
    except (TypeError, ValueError):
        return None, "it depends on the number of rows or of tokens"
    operations = list(_operations(small))
    joins = next((one.primitive.name for one in operations if _lengths(one)), None)
    literals = [[x.val for one in _operations(jaxpr) for x in one.invars if isinstance(x, Literal)]
                for jaxpr in (small, large)]
    if literals[0] != literals[1]:
        return joins, "it counts positions by the shape: count what is chosen, by given['mask']"
    return joins, next(filter(None, map(_obstacle, operations)), None)


def _resized(arrays: Any, mask: Any, size: tuple[int, int]) -> Any:
    """Shapes of the arrays in a batch of another size."""
    kinds = {mask.shape: size, (mask.shape[0], 1): (size[0], 1), (): ()}
    return jax.tree.map(lambda x: _shape(jax.ShapeDtypeStruct(kinds[x.shape], x.dtype)), arrays)


def lean(of: Gate, traced: Traced, policy: dict[str, Any], given: dict[str, Any]) -> Gate:
    """`of`, with zeros in the place of arrays that it mentions and does not use: they need not be loaded."""
    mask = given["mask"]
    unused = ({name: _shape(x) for name, x in policy.items() if name not in traced.policy},
              {name: _shape(x) for name, x in given.items() if name not in traced.given and name != "mask"})

    def leaned(policy: dict[str, Any], given: dict[str, Any]) -> Any:
        shapes = _resized(unused, mask, given["mask"].shape)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return of({**zeros[0], **policy}, {**zeros[1], **given})

    return leaned


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(x.shape, reference.accumulator(x) if floating else x.dtype)


def _operations(jaxpr: Jaxpr) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name in portable.INLINED:
            yield from _operations(equation.params[portable.INLINED[equation.primitive.name]].jaxpr)
        else:
            yield equation


def _lengths(equation: Any) -> dict[int, int]:
    """The axes that are reduced, and how long they are."""
    if equation.primitive.name not in REDUCTIONS:
        return {}
    shape = equation.invars[0].aval.shape
    return {axis: shape[axis] for axis in equation.params["axes"] if shape[axis] > 1}


def _obstacle(equation: Any) -> str | None:
    name, out = equation.primitive.name, equation.outvars[0].aval.shape
    long = lambda shape: [size for size in shape if size > 1]
    turned = name in ("reshape", "squeeze", "expand_dims") and long(equation.invars[0].aval.shape) != long(out)
    if name not in ELEMENTWISE | SHAPES | REDUCTIONS or turned or len(out) > 2:
        return f"it uses {name!r} ({list(out)}), which cannot be in a kernel"
    if 0 in _lengths(equation):
        return "it reduces over rows, which are in different blocks: give its sums over a row to staged_gate"
    if len(out) == 2 and not (out[0] in (1, SIZES[0][0]) and out[1] in (1, SIZES[0][1])) or out == SIZES[0][1:]:
        return "it compares rows or positions with each other, which may be in different blocks"
    return None


def consts(closed: ClosedJaxpr) -> list:
    """The arrays that a traced function closes over."""
    found = list(closed.consts)
    for equation in closed.jaxpr.eqns:
        for x in equation.params.values():
            found += consts(x) if isinstance(x, ClosedJaxpr) else []
        found += [x.val for x in equation.invars if isinstance(x, Literal) and np.ndim(x.val) > 0]
    return found


def _refuse_closed_over(of: Callable, name: str, closed: ClosedJaxpr) -> None:
    arrays = consts(closed)
    if not arrays:
        return
    known = list(_reachable(of, "", set()))
    same = lambda a, b: a is b or (a.shape == b.shape and a.dtype == b.dtype)
    names = [next((where for where, x in known if x is one), None)
             or next((where for where, x in known if same(x, one)), None) or "an array made inside" for one in arrays]
    shapes = ", ".join(f"{where} ({one.dtype}{list(one.shape)})" for where, one in zip(names, arrays, strict=True))
    raise ValueError(f"the {name} closes over {shapes}: a kernel reads nothing but its arguments; pass it in given (a "
                     "number for all, [], per row, [N, 1], or per token, [N, T]), or as a Python number.")


def _reachable(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """(name, array) of everything that a function can read without being given it."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, functools.partial):
        given = {f"argument {i} of a partial": x for i, x in enumerate(value.args)}
        inside = {**value.keywords, **given, "": value.func}
    elif inspect.ismethod(value):
        inside = {"self": value.__self__, "": value.__func__}
    elif inspect.isfunction(value):
        variables = inspect.getclosurevars(value)
        defaults = {one: x.default for one, x in inspect.signature(value).parameters.items()}
        inside = {**variables.globals, **defaults, **variables.nonlocals}
    elif isinstance(value, (jax.Array, np.ndarray)):
        yield repr(name), value
        return
    elif isinstance(value, (dict, list, tuple)):
        inside = {f"{name}{jax.tree_util.keystr(path)}": x for path, x in jax.tree_util.tree_leaves_with_path(value)}
    else:
        return
    for one, x in inside.items():
        yield from _reachable(x, one or name, seen)
