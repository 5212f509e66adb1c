"""Rotary embedding and reach of the layers, as config.json says them in its older and its newer form."""
from collections.abc import Mapping
from typing import Any

from rl_jax.models.rotary import Scaling
from rl_jax.models.shape import Shape

REACHES = {"full_attention": "full", "sliding_attention": "window"}


def rotary(config: Mapping[str, Any], layers: str = "full_attention") -> tuple[float, Scaling | None]:
    """(base of the wavelengths, how they are stretched) of the layers of one type.

    Args:
      layers: the type, where the config distinguishes them.

    Raises:
      ValueError: for a way to stretch them that is not there.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    given = given.get(layers, given) or {}
    base = float(given.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return base, None
    if kind == "linear":
        return base, Scaling(kind="linear", factor=float(given["factor"]))
    if kind == "llama3":
        return base, Scaling(kind="llama3", factor=float(given["factor"]), low=float(given["low_freq_factor"]),
                             high=float(given["high_freq_factor"]),
                             original_length=int(given["original_max_position_embeddings"]))
    raise ValueError(f"config.json asks for rotary scaling of type {kind!r}: allowed are default, linear and llama3.")


def parameters(base: float, scaling: Scaling | None) -> dict[str, Any]:
    """What config.json holds of base and stretch: the entries of its `rope_parameters`."""
    if scaling is None:
        return {"rope_type": "default", "rope_theta": base}
    if scaling.kind == "linear":
        return {"rope_type": "linear", "rope_theta": base, "factor": scaling.factor}
    return {"rope_type": "llama3", "rope_theta": base, "factor": scaling.factor, "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high, "original_max_position_embeddings": scaling.original_length}


def reach(config: Mapping[str, Any], otherwise: tuple[str, ...] = ("full",)) -> dict[str, Any]:
    """`reach` and `window` of a shape, from the config's `layer_types` and `sliding_window`.

    Args:
      otherwise: the reach where there are no `layer_types`.

    Raises:
      ValueError: for a type of layer that is not there, or no width of the window where one is needed.
    """
    given = config.get("layer_types")
    if given is not None and set(given) - set(REACHES):
        raise ValueError(f"config.json layer_types has {sorted(set(given) - set(REACHES))}: allowed are "
                         f"{sorted(REACHES)}.")
    found = _shortest(otherwise if given is None else tuple(REACHES[name] for name in given))
    if "window" not in found:
        return {"reach": (), "window": 0}
    if not config.get("sliding_window"):
        raise ValueError(f"config.json sliding_window={config.get('sliding_window')!r}, and layers of type "
                         "sliding_attention need its width in tokens.")
    return {"reach": found, "window": int(config["sliding_window"])}


def layer_types(shape: Shape) -> dict[str, Any]:
    """What config.json holds of a shape's reach: every layer's type, and the width of the window."""
    names = ["full_attention" if kind.window is None else "sliding_attention" for kind in shape.kinds]
    return {"sliding_window": shape.window, "layer_types": names}


def _shortest(found: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest beginning that repeats to the whole."""
    return next(found[:n] for n in range(1, len(found) + 1)
                if all(one == found[i % n] for i, one in enumerate(found)))
