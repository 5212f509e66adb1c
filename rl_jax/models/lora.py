"""Low-rank adapters: a frozen projection W plus alpha / r A B, of which only A and B are trained."""
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from rl_jax.types import Parameters

PROJECTIONS = ("query", "key", "value", "out", "gate", "up", "down")
LEAVES = ("adapter_in", "adapter_out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters:
    """The numbers of low-rank adapters.

    Attributes:
      rank: r, columns of A.
      alpha: the product A B is multiplied by alpha / r.
      targets: a regular expression, searched in the names of the projections ("query", "key", "value", "out" of
        attention, "gate", "up", "down" of the inner layer): those that have an adapter. Mixed experts have none.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str = "query|key|value|out|gate|up|down"

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"lora rank={self.rank}, alpha={self.alpha}: rank must be at least 1, alpha positive.")
        if not any(self.on(name) for name in PROJECTIONS):
            raise ValueError(f"lora targets={self.targets!r} names no projection; there are {PROJECTIONS}.")

    def on(self, projection: str) -> bool:
        """Whether the projection of this name has an adapter."""
        return re.search(self.targets, projection) is not None

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank


def there(parameters: Parameters) -> bool:
    """Whether the weights hold adapters."""
    return any(name in LEAVES or isinstance(value, dict) and there(value) for name, value in parameters.items())


def without(parameters: Parameters) -> Parameters:
    """The weights without their adapters: those of the base network."""
    return {name: without(value) if isinstance(value, dict) else value for name, value in parameters.items()
            if name not in LEAVES}


def merged(parameters: Parameters, adapters: Adapters) -> Parameters:
    """The weights with each adapter added to its projection, in the projection's dtype; they hold no adapters.

    Args:
      adapters: those that the weights hold.
    """
    if not any(isinstance(value, dict) for value in parameters.values()) and LEAVES[0] in parameters:
        inwards, outwards = (parameters[name].astype(jnp.float32) for name in LEAVES)
        weight = parameters["weight"]
        product = jnp.matmul(inwards, outwards, precision=jax.lax.Precision.HIGHEST)
        whole = (weight.astype(jnp.float32) + adapters.scale * product).astype(weight.dtype)
        return {**without(parameters), "weight": whole}
    return {name: merged(value, adapters) if isinstance(value, dict) else value for name, value in parameters.items()}


def fresh(parameters: Parameters, adapted: Parameters) -> Parameters:
    """The weights with the adapters of another tree that has them, such as a newly initialised one.

    Args:
      parameters: without adapters.
      adapted: of the same network, with adapters; its other weights are not read.
    """
    def both(plain: Any, other: Any) -> Any:
        if not isinstance(plain, dict):
            return plain
        return {**{name: both(value, other[name]) for name, value in plain.items()},
                **{name: other[name] for name in LEAVES if name in other}}

    return both(parameters, adapted)
