"""How far answers are drawn ahead of learning, and by which devices."""
import dataclasses

from rl_jax.models import mesh as meshes

FIXED, EAGER = "fixed", "eager"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asynchronous:
    """The config's section for phases with scale.program="async".

    Attributes:
      staleness: the most updates between the weights that draw a batch and those that learn from it; 0 waits for every
        update.
      order: "fixed" draws every batch by weights of exactly that age (younger at the start) and repeats to the last
        bit; "eager" by the newest that there are, as the clock has it.
      sampler_devices: the first devices, which only draw; those of the mesh follow. 0 draws on those of the mesh.
      sampler_tensor: how many of them cut heads, inner width and vocabulary; the others cut the batch.
    """

    staleness: int = 1
    order: str = FIXED
    sampler_devices: int = 0
    sampler_tensor: int = 1

    def __post_init__(self):
        for name, least in (("staleness", 0), ("sampler_devices", 0), ("sampler_tensor", 1)):
            if vars(self)[name] < least:
                raise ValueError(f"config.asynchronous.{name}={vars(self)[name]}: must be at least {least}.")
        if self.order not in (FIXED, EAGER):
            raise ValueError(f"config.asynchronous.order={self.order!r}: allowed are {(FIXED, EAGER)}.")
        if self.sampler_devices % self.sampler_tensor:
            raise ValueError(f"config.asynchronous.sampler_tensor={self.sampler_tensor} does not divide sampler_devices="
                             f"{self.sampler_devices}: take a divisor.")

    @property
    def sampler(self) -> meshes.Sizes | None:
        """The sampler's own devices; None where it draws on the learner's."""
        rows = self.sampler_devices // self.sampler_tensor
        return meshes.Sizes(data=rows, tensor=self.sampler_tensor) if self.sampler_devices else None
