"""From the tensors of a checkpoint folder to parameters, straight into their place on the devices, and back."""
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding

from rl_jax.models import safetensors, sharding
from rl_jax.models.families import published
from rl_jax.models.families.family import Path, Tensor, tensors
from rl_jax.models.shape import Shape
from rl_jax.types import Parameters

# Tensors that a checkpoint may hold and that nothing is read from: constants of the rotary embedding in old ones.
IGNORED = ("rotary_emb.inv_freq",)


def layout(config: dict[str, Any], shape: Shape) -> dict[Path, Tensor]:
    """For every parameter, by its path, where a checkpoint of this config keeps it."""
    return dict(tensors(published.of_config(config), shape))


def shapes_of(network: Any) -> Parameters:
    """The shapes of a network's parameters, nothing allocated."""
    return jax.eval_shape(network.initialise, jax.random.key(0))


def load(folder: pathlib.Path, places: dict[Path, Tensor], like: Parameters, *, dtype: Any = None,
         mesh: Mesh | None = None) -> Parameters:
    """The parameters of a checkpoint, tensor by tensor: beside them no more is held than the open file and one tensor.

    Args:
      places: from `layout`.
      like: the parameters' shapes, a nested dict.
      dtype: of all of them; None keeps each as the file has it.
      mesh: the devices they are cut over (`sharding.shardings`); None puts them on the first.

    Raises:
      ValueError: naming file and tensor, for what is missing, superfluous, of another shape, cut off or of a type that
        cannot be read.
    """
    opened = safetensors.Folder(folder)
    wanted, parts = {}, []
    for path, tensor in places.items():
        whole = at(like, path)
        for index, name in enumerate(tensor.names):
            inner = whole.shape[len(tensor.stacked):]
            wanted[name] = inner[::-1] if tensor.transposed else inner
            parts.append((name, path, index))
    tied = ("lm_head.weight",) if ("head",) not in places else ()
    opened.check(wanted, (*IGNORED, *tied))
    found: dict[Path, jax.Array] = {}
    for name, path, index in sorted(parts, key=lambda part: opened.entries[part[0]][0::4]):
        tensor, whole = places[path], at(like, path)
        kind = jnp.dtype(dtype or safetensors.DTYPES[opened.entries[name].dtype])
        where = sharding.of(path, whole.shape, mesh)
        part = _part(opened, name, tensor, whole.shape[len(tensor.stacked):], kind, where, len(tensor.stacked))
        if not tensor.stacked:
            found[path] = part
            continue
        if path not in found:
            found[path] = jax.jit(lambda s=whole.shape, k=kind: jnp.zeros(s, k), out_shardings=where)()
        place = np.unravel_index(index, tensor.stacked)
        found[path] = _put(found[path], part, tuple(map(np.int32, place)), where)
    opened.close()
    return nested({path: found[path] for path in places})


def _part(opened: safetensors.Folder, name: str, tensor: Tensor, shape: tuple[int, ...], kind: Any, whole: Sharding,
          stacked: int) -> jax.Array:
    """One tensor of a checkpoint on the devices, cut as the parameter it is a part of."""
    where = whole
    if isinstance(whole, NamedSharding) and stacked:
        where = NamedSharding(whole.mesh, jax.sharding.PartitionSpec(*whole.spec[stacked:]))

    def block(index: tuple[slice, ...]) -> np.ndarray:
        return opened.read(name, index[::-1], kind).T if tensor.transposed else opened.read(name, index, kind)

    return jax.make_array_from_callback(shape, where, block)


@functools.partial(jax.jit, static_argnames="where", donate_argnums=0)
def _put(whole: jax.Array, part: jax.Array, place: tuple[Any, ...], where: Sharding) -> jax.Array:
    """The whole, in its own memory, with the part at this place of its leading axes."""
    lead = len(place)
    part = part.reshape((1,) * lead + part.shape)
    whole = jax.lax.dynamic_update_slice(whole, part, (*place, *[jnp.int32(0)] * (whole.ndim - lead)))
    return jax.lax.with_sharding_constraint(whole, where) if isinstance(where, NamedSharding) else whole


def to_tensors(parameters: Parameters, places: dict[Path, Tensor], dtype: Any = None) -> Iterator[
        tuple[str, np.ndarray]]:
    """The parameters as the tensors of a checkpoint, names and host arrays, one after the other.

    Args:
      dtype: of all of them; None keeps each as it is.
    """
    for path, tensor in places.items():
        whole = at(parameters, path)
        for index, name in enumerate(tensor.names):
            part = whole[np.unravel_index(index, tensor.stacked)] if tensor.stacked else whole
            part = np.asarray(jax.device_get(part))
            part = part if dtype is None else part.astype(jnp.dtype(dtype))
            yield name, part.T if tensor.transposed else part


def at(tree: Any, path: Path) -> Any:
    """The leaf at a path."""
    for name in path:
        tree = tree[name]
    return tree


def nested(leaves: dict[Path, Any]) -> Any:
    """The tree that has these leaves."""
    tree: dict[Any, Any] = {}
    for path, leaf in leaves.items():
        inner = tree
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = leaf
    return tree
