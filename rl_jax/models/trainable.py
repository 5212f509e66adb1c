"""Which parameters are trained and which are kept as they are: one tree, split in two and put together again."""
import re
from collections.abc import Callable, Iterator
from typing import Any

from rl_jax.models.lora import LEAVES
from rl_jax.types import Parameters

ALL, LORA = "all", "lora"


def split(parameters: Parameters, train: str) -> tuple[Parameters, Parameters]:
    """(what is trained, what is kept), each the tree with its own leaves only.

    Args:
      train: "all", "lora" (adapters alone), or a regular expression that is searched in the parameters' names, such as
        "blocks/3/query/weight" (layers that are scanned share one name): those that it finds are trained.

    Raises:
      ValueError: if nothing is trained; shows names that there are.
    """
    if train == ALL:
        return parameters, {}
    pattern = f"/({'|'.join(LEAVES)})$" if train == LORA else train
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"scale.train={train!r} is no regular expression ({error}): give \"all\", \"lora\" or one "
                         "that is searched in the parameters' names.") from error
    trained = _kept(parameters, lambda name: found.search(name) is not None)
    if not trained:
        there = list(names(parameters))
        raise ValueError(f"scale.train={train!r} trains nothing: no parameter's name has it. Names are {there[:12]}"
                         f"{' ...' if len(there) > 12 else ''}.")
    return trained, _kept(parameters, lambda name: found.search(name) is None)


def joined(trained: Parameters, kept: Parameters) -> Parameters:
    """The tree that `split` took apart."""
    both = {name: joined(trained[name], kept[name]) for name in trained.keys() & kept.keys()}
    return {**kept, **trained, **both}


def names(tree: Any, name: str = "") -> Iterator[str]:
    """The names of the leaves, such as "blocks/0/query/weight"."""
    if not isinstance(tree, dict):
        yield name
        return
    for key, value in tree.items():
        yield from names(value, f"{name}/{key}" if name else str(key))


def _kept(tree: Any, wanted: Callable[[str], bool], name: str = "") -> Any:
    found = {}
    for key, value in tree.items():
        inner = f"{name}/{key}" if name else str(key)
        if isinstance(value, dict):
            part = _kept(value, wanted, inner)
            found |= {key: part} if part else {}
        elif wanted(inner):
            found[key] = value
    return found
