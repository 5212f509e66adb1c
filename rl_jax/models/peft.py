"""Adapters in the format of the peft library: read beside a base network's weights, and written."""
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rl_jax import hub
from rl_jax.models import lora, safetensors, sharding, weights
from rl_jax.models.families.family import EXPERTS, PROJECTIONS, Path, Tensor
from rl_jax.models.lora import Adapters
from rl_jax.types import Parameters

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MATRICES = {"adapter_in": "lora_A", "adapter_out": "lora_B"}
# What other kinds of adapters say in adapter_config.json, with what it must be here.
PLAIN = {"peft_type": "LORA", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "lora_bias": False,
         "bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "target_parameters": None,
         "trainable_token_indices": None, "layer_replication": None, "use_qalora": False}


def load(folder: pathlib.Path, parameters: Parameters, places: Mapping[Path, Tensor],
         mesh: Mesh | None = None) -> tuple[Parameters, Adapters]:
    """(the weights with the folder's adapters beside their projections, the adapters' numbers).

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      parameters: the base network's.
      places: from `weights.layout`.
      mesh: that the base network's are cut over; None where they are on one device.

    Raises:
      ValueError: for another kind of adapter, and for tensors that do not fit the base network; names them.
    """
    config = hub.read_json(folder / CONFIG)
    for name, allowed in PLAIN.items():
        if config.get(name) and config[name] != allowed:  # empty is none
            raise ValueError(f"{folder / CONFIG}: {name}={config[name]!r}: allowed is {allowed!r}.")
    lacking = [name for name in ("r", "lora_alpha") if config.get(name) is None]
    if lacking:
        raise ValueError(f"{folder / CONFIG} has no field {lacking[0]!r}.")
    opened = safetensors.Folder(folder, single=FILE)
    targets = [name for name, theirs in PROJECTIONS.items()
               if any(f".{theirs}.{MATRICES['adapter_in']}." in one for one in opened.entries)]
    if not targets:
        raise ValueError(f"{folder / FILE} holds adapters of none of {sorted(PROJECTIONS.values())}: "
                         f"{sorted(opened.entries)[:3]}.")
    adapters = Adapters(rank=int(config["r"]), alpha=float(config["lora_alpha"]), targets=f"^({'|'.join(targets)})$")
    wanted, found = {}, {}
    for path, tensor in _adapted(places, adapters):
        whole = weights.at(parameters, (*path, "weight"))
        inputs, outputs = whole.shape[-2:]
        sizes = {"adapter_in": (inputs, adapters.rank), "adapter_out": (adapters.rank, outputs)}
        for leaf, size in sizes.items():
            wanted |= {name: size[::-1] for name in _names(tensor, leaf)}
            found[(*path, leaf)] = (_names(tensor, leaf), (*whole.shape[:-2], *size))
    opened.check(wanted, config=CONFIG)

    def read(path: Path, names: tuple[str, ...], shape: tuple[int, ...]) -> jax.Array:
        everything = (slice(None), slice(None))
        rows = [opened.read(name, everything, np.dtype("float32")).T for name in names]
        return jax.device_put(np.stack(rows).reshape(shape), sharding.of(path, shape, mesh))

    given = {path: read(path, *what) for path, what in found.items()}
    opened.close()
    return lora.fresh(parameters, _filled(parameters, given)), adapters


def save(folder: pathlib.Path, parameters: Parameters, adapters: Adapters, places: Mapping[Path, Tensor],
         base: str) -> None:
    """Writes the adapters that the weights hold.

    Args:
      folder: an existing one.
      base: path or id of the network that they belong to, for `base_model_name_or_path`.

    Raises:
      ValueError: for adapters that peft would take for another layer's.
    """
    adapted = {str(path[-1]) for path, _ in _adapted(places, adapters)}
    if adapted & set(EXPERTS) and any("mixture" in path for path in places):
        raise ValueError(f"adapters on {sorted(adapted & set(EXPERTS))} of the dense layers of a network that mixes "
                         "experts cannot be written: peft takes what has these names for the experts'. Merge them into "
                         "the weights, or train with lora targets \"query|key|value|out\".")

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for path, tensor in _adapted(places, adapters):
            for leaf in MATRICES:
                whole = np.asarray(weights.at(parameters, (*path, leaf)), np.float32)
                rows = whole.reshape(-1, *whole.shape[-2:])
                for name, row in zip(_names(tensor, leaf), rows, strict=True):
                    yield name, row.T

    safetensors.write(folder, tensors(), shard_bytes=1 << 62, single=FILE)
    modules = sorted(PROJECTIONS[name].rsplit(".", 1)[-1] for name in adapted)
    config: dict[str, Any] = {
        **PLAIN, "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": adapters.rank,
        "lora_alpha": adapters.alpha, "lora_dropout": 0.0, "target_modules": modules, "inference_mode": True}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _adapted(places: Mapping[Path, Tensor], adapters: Adapters) -> Iterator[tuple[Path, Tensor]]:
    """The projections that have an adapter, without the name of their matrix."""
    for path, tensor in places.items():
        if path[-1] == "weight" and path[-2] in PROJECTIONS and adapters.on(str(path[-2])):
            yield path[:-1], tensor


def _names(tensor: Tensor, leaf: str) -> tuple[str, ...]:
    """The names of one of the matrices of an adapter, one per stacked layer."""
    return tuple(f"{PREFIX}{name.removesuffix('.weight')}.{MATRICES[leaf]}.weight" for name in tensor.names)


def _filled(parameters: Parameters, given: dict[Path, Any]) -> Parameters:
    """A tree as deep as the weights, with the given leaves."""
    found = weights.nested(given)

    def deep(plain: Any, part: Any) -> Any:
        if not isinstance(plain, dict):
            return part
        part = part if isinstance(part, dict) else {}
        return {**part, **{name: deep(value, part.get(name)) for name, value in plain.items()}}

    return deep(parameters, found)
