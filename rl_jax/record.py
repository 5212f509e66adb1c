"""Records: frozen dataclasses that are pytrees."""
import dataclasses
from typing import TypeVar, dataclass_transform

import jax

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def record(cls: type[T]) -> type[T]:
    """A frozen keyword-only dataclass that is a pytree; rebuilding one never re-runs `__init__`.

    `jax.tree.map`, `scan` and `vmap` rebuild records with leaves that are not arrays of the
    annotated shape (a batch axis more, `None`, a sharding), so a shape check belongs to
    construction by a person alone.
    """
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    names = tuple(field.name for field in dataclasses.fields(cls))

    def flatten_with_keys(value):
        return tuple((jax.tree_util.GetAttrKey(n), getattr(value, n)) for n in names), None

    def flatten(value):
        return tuple(getattr(value, n) for n in names), None

    def unflatten(_, leaves):
        value = object.__new__(cls)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(value, name, leaf)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
