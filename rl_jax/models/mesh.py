"""Devices in a mesh, and how what a batch makes lies on it: rows over the batch's axes, the rest as the weights cut it."""
import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
ROWS = ("data", "fsdp", "expert")
ROLES = ("reference", "teacher", "policy", "optimiser")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many devices each axis has; their product is the number of devices.

    Attributes:
      data: cuts the batch; every device holds all weights.
      fsdp: cuts the batch and the weights, which are gathered where they are used.
      expert: cuts the batch and the experts of mixtures.
      sequence: cuts the tokens of long answers in training, once there are no more rows to cut.
      tensor: cuts heads, inner width and vocabulary.
      offload: what is kept in the host's memory between its uses: frozen weights by role ("reference", "teacher", and
        "policy", those of its weights that are not trained), and the "optimiser" state.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    offload: tuple = ()

    def __post_init__(self):
        if min(vars(self)[axis] for axis in AXES) < 1:
            raise ValueError(f"mesh {dataclasses.asdict(self)}: every axis has at least 1 device.")
        if set(self.offload) - set(ROLES):
            raise ValueError(f"mesh offload={self.offload}: allowed are {ROLES}.")

    @property
    def devices(self) -> int:
        """Of all axes."""
        return math.prod(vars(self)[axis] for axis in AXES)

    @property
    def rows(self) -> int:
        """Pieces that the batch is cut into."""
        return self.data * self.fsdp * self.expert


def make(sizes: Sizes, *, behind: int = 0) -> Mesh:
    """The first devices in a mesh; those of one process are neighbours, so that its rows of a batch are together.

    Args:
      behind: devices before them, left to others.

    Raises:
      ValueError: if there are fewer.
    """
    there = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if behind + sizes.devices > len(there):
        others = f" behind {behind} others" if behind else ""
        raise ValueError(f"mesh {dataclasses.asdict(sizes)} needs {sizes.devices} devices{others}, and there are "
                         f"{len(there)} ({there[0].device_kind}): lower an axis of config.mesh.")
    shape = tuple(vars(sizes)[axis] for axis in AXES)
    grid = np.asarray(there[behind:behind + sizes.devices]).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def current() -> AbstractMesh | None:
    """The mesh that what is being traced is compiled for (`jax.set_mesh`); None on one device."""
    found = jax.sharding.get_abstract_mesh()
    return found if set(found.axis_names) >= set(AXES) and found.size > 1 else None


def cut(x: Shaped[Array, "..."], *axes: str | None) -> Shaped[Array, "..."]:
    """x as it is, its axes cut: the first by `row_axes`, the next by these axes of the mesh.

    An axis that does not divide stays whole. Without a mesh nothing happens.

    Args:
      axes: of the mesh, for the axes of x behind the first; None leaves one whole.
    """
    mesh = current()
    if mesh is None:
        return x
    wanted = [row_axes(x.shape[0]), *axes, *[None] * (x.ndim - 1 - len(axes))]
    fits = [name if name and size % _devices(mesh, name) == 0 else None
            for name, size in zip(wanted, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fits))


def row_axes(rows: int) -> tuple[str, ...]:
    """The axes that cut so many rows: the batch's and the sequence's, in order, as far as they divide."""
    mesh, found = current(), ()
    for axis in (*ROWS, "sequence"):
        if rows % _devices(mesh, (*found, axis)):
            break
        found = (*found, axis)
    return found


def axis_of(axis: str, size: int) -> str | None:
    """The axis, if it divides the size."""
    return axis if size % current().shape[axis] == 0 else None


def _devices(mesh: AbstractMesh, axes: str | tuple[str, ...]) -> int:
    return math.prod(mesh.shape[name] for name in ((axes,) if isinstance(axes, str) else axes))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis cut over the batch's devices."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def whole(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def joined(tree: Any, sharding: NamedSharding) -> Any:
    """Host arrays on the devices; those of several processes are one array each, cut over all devices.

    Args:
      tree: the rows of this process.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), tree)
