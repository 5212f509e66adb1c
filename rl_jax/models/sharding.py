"""Where parameters lie on a mesh: one table from what an axis means to the mesh axis that cuts it."""
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from rl_jax.models.lora import LEAVES

# What the axes of a parameter mean, by its own name, or that of its projection; axes in front of them (stacked layers)
# are never cut.
ALONE = {"embedding": ("vocabulary", "width"), "head": ("vocabulary", "width"), "score": (None, "width"),
         "value": ("width",)}
MEANING = {
    **{name: ("width", "heads") for name in ("query", "key", "value")}, "out": ("heads", "width"),
    **{name: ("width", "inner") for name in ("gate", "up")}, "down": ("inner", "width"),
    **{f"mixture/{name}": ("expert", "width", "inner") for name in ("gate", "up")},
    "mixture/down": ("expert", "inner", "width"), "mixture/router": ("width", None),
}
CUT_BY = {"vocabulary": "tensor", "heads": "tensor", "inner": "tensor", "width": "fsdp", "expert": "expert"}


def spec(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How the mesh cuts a parameter; an axis that does not divide, or whose mesh axis there is not, stays whole.

    Args:
      path: its names, outermost first.
    """
    *_, parent, last = ("", "", *map(str, path))
    meaning = MEANING.get(f"{parent}/{last}") or ALONE.get(last) or MEANING.get(parent, ())
    if last == "bias":
        meaning = meaning[-1:]
    elif last == "scale":
        meaning = (None,)
    elif last in LEAVES:
        meaning = (meaning[0], None) if last == LEAVES[0] else (None, meaning[1])
    free = len(shape) - len(meaning)
    axes = [CUT_BY.get(name) for name in meaning]
    cut = [axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None
           for axis, size in zip(axes, shape[free:], strict=True)]
    return PartitionSpec(*[None] * free, *cut)


def of(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh | None) -> Sharding:
    """Where a parameter lies: on the first device, or cut as `spec` says.

    Args:
      path: its names, outermost first.
    """
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, spec(path, shape, mesh))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for every parameter.

    Args:
      tree: parameters, arrays or shapes.
    """
    def one(path: tuple, leaf: Any) -> Sharding:
        return of(tuple(key.key for key in path), leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(one, tree)
