"""Config sections of plain values, and what they become: typed records, or what a factory makes of its arguments."""
import dataclasses
import difflib
import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections


def plain(config: Any) -> Any:
    """The config as dicts, lists, numbers and strings, as JSON holds it."""
    if isinstance(config, (Mapping, ml_collections.ConfigDict)):
        return {key: plain(value) for key, value in config.items()}
    return [plain(value) for value in config] if isinstance(config, (tuple, list)) else config


def flat(tree: Any, name: str = "config") -> dict[str, Any]:
    """Every value of a config by its full name.

    Args:
      tree: plain values.
      name: of the tree.
    """
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in flat(value, f"{name}.{key}").items()}
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        return {k: v for i, value in enumerate(tree) for k, v in flat(value, f"{name}[{i}]").items()}
    return {name: tree}


def misnamed(config: Any, overrides: Sequence[str]) -> str | None:
    """What is wrong with the first override that names no field of the config; None if all do.

    Args:
      config: as its file makes it.
      overrides: arguments such as "--config.optimiser.learning_rate=1e-4"; others are skipped.
    """
    for override in overrides:
        name = override.lstrip("-").split("=")[0]
        if not override.startswith("-") or not name.startswith("config."):
            continue
        at, seen = config, "config"
        for part in re.findall(r"[^.\[\]]+", name)[1:]:
            if isinstance(at, (tuple, list)):
                if not part.isdigit() or int(part) >= len(at):
                    return f"{seen} has {len(at)} entries, no [{part}]."
                at, seen = at[int(part)], f"{seen}[{part}]"
            elif isinstance(at, ml_collections.ConfigDict) and part in at:
                at, seen = at[part], f"{seen}.{part}"
            else:
                allowed = ", ".join(at) if isinstance(at, ml_collections.ConfigDict) else "none: it is a plain value"
                return f"{seen} has no field {part!r}; allowed are {allowed}."
    return None


def typed(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """cls(**values) after checking names and types against its fields."""
    fields = typing.get_type_hints(cls)
    check_names(where, values, tuple(fields), optional=tuple(fields))
    return cls(**{name: _checked(value, fields[name], f"{where}.{name}") for name, value in values.items()})


def named_section(kind: str, package: str, name: str, overrides: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The section of a factory under a package, its arguments filled from its signature.

    Args:
      kind: what the factory makes, for messages.
      name: module path under the package.
      overrides: arguments that differ from the defaults.
    """
    factory = find(kind, package, name)
    parameters = inspect.signature(factory).parameters
    unknown = set(overrides) - set(parameters)
    if unknown:
        raise ValueError(f"{kind} {name!r} has no argument {sorted(unknown)}; it has {list(parameters)}.")
    args = {key: overrides.get(key, p.default) for key, p in parameters.items()}
    missing = [key for key, value in args.items() if value is inspect.Parameter.empty]
    if missing:
        raise ValueError(f"{kind} {name!r} needs {missing}: no default exists.")
    return ml_collections.ConfigDict({"name": name, "args": args, "args_of": name})


def named(kind: str, package: str, values: Mapping[str, Any], where: str) -> Any:
    """What the factory that a section names makes of the section's arguments, plain values."""
    check_names(where, values, ("name", "args", "args_of"))
    factory = find(kind, package, values["name"])
    if values["args_of"] != values["name"]:
        raise ValueError(
            f"{where}.name={values['name']!r}, but {where}.args are those of {values['args_of']!r}. Name the {kind} "
            f"where the config is made, so that its own arguments are filled in: --config=FILE.py:{values['name']}")
    parameters = inspect.signature(factory).parameters
    check_names(f"{where}.args", values["args"], tuple(parameters), optional=tuple(parameters))
    hints = typing.get_type_hints(factory)
    args = {name: _checked(value, hints.get(name, Any), f"{where}.args.{name}")
            for name, value in values["args"].items()}
    try:
        return factory(**args)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} ({values['name']}): {error}") from error


def find(kind: str, package: str, name: str) -> Callable[..., Any]:
    """The factory of a module path: "baselines.grpo" is `rl_jax.recipes.baselines.grpo.grpo`.

    Raises:
      ValueError: if there is none; says which there are.
    """
    known = names(package)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"unknown {kind} {name!r}.{hint} Allowed are: {', '.join(known)}.")
    return vars(importlib.import_module(f"{package}.{name}"))[name.rsplit(".", 1)[-1]]


def names(package: str) -> list[str]:
    """Module paths under a package whose module defines a function of its own name, read from the source files."""
    root = importlib.import_module(package)
    found = []
    for module in pkgutil.walk_packages(root.__path__, f"{package}."):
        source = module.module_finder.find_spec(module.name)
        if not module.ispkg and f"\ndef {module.name.rsplit('.', 1)[-1]}(" in source.loader.get_source(module.name):
            found.append(module.name.removeprefix(f"{package}."))
    return found


def check_names(where: str, values: Mapping[str, Any], allowed: tuple[str, ...],
                optional: tuple[str, ...] = ()) -> None:
    """Refuses a section with a field that is not allowed, or without one that is not optional."""
    unknown = sorted(set(values) - set(allowed))
    missing = sorted(set(allowed) - set(values) - set(optional))
    if unknown:
        raise ValueError(f"{where} has no field {', '.join(map(repr, unknown))}; allowed are {', '.join(allowed)}.")
    if missing:
        raise ValueError(f"{where} lacks {', '.join(map(repr, missing))}.")


def _checked(value: Any, kind: Any, where: str) -> Any:
    """The value, if it is of the annotated type; an int is a float, a list a tuple, nothing else is anything else."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is Any or (origin in (int, str, bool, type(None)) and type(value) is origin):
            return value
        if origin is float and type(value) in (int, float) and value == value:  # nan is no number to run with
            return float(value)
        if origin in (tuple, list, Sequence) and isinstance(value, (tuple, list)):
            return tuple(value)
        if origin in (dict, Mapping) and isinstance(value, Mapping):
            return value
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return typed(option, value, where)
    wanted = " or ".join(option.__name__ if isinstance(option, type) else str(option) for option in options)
    raise ValueError(f"{where}={value!r} is of type {type(value).__name__}; allowed is {wanted}.")
