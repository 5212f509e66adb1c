"""Which family a checkpoint's config.json, or a shape, belongs to."""
import dataclasses
from typing import Any

from rl_jax.models.families import gemma, llama, qwen
from rl_jax.models.families.family import Config, Family, common_config, common_shape
from rl_jax.models.families.rope import parameters
from rl_jax.models.shape import Shape

FAMILIES = (*llama.FAMILIES, *qwen.FAMILIES, *gemma.FAMILIES)
SEQUENCE, CAUSAL = "ForSequenceClassification", "ForCausalLM"


def of_config(config: Config) -> Family:
    """The family of a config.json.

    Raises:
      ValueError: if it is none of those that are here.
    """
    given = config.get("model_type")
    for family in FAMILIES:
        if given in family.model_types:
            return family
    allowed = sorted(name for family in FAMILIES for name in family.model_types)
    raise ValueError(f"config.json model_type={given!r}: allowed are {allowed}. Another family that is the same "
                     "network with other numbers is added to rl_jax/models/families.")


def shape_of(config: Config, **options: Any) -> Shape:
    """The network's shape that a config.json describes.

    Args:
      options: further fields of `Shape`: scan_layers, remat, compute.

    Raises:
      ValueError: for a family, or a feature of one, that is not here, or a field that is missing.
    """
    family = of_config(config)
    try:
        return Shape(**common_shape(config) | family.shape(config) | options)
    except KeyError as error:
        raise ValueError(f"config.json (model_type {config['model_type']!r}) has no field {error}.") from error


def config_of(shape: Shape) -> dict[str, Any]:
    """A config.json for a shape that one of the families has.

    Raises:
      ValueError: if none has it.
    """
    plain = {"scan_layers": shape.scan_layers, "remat": shape.remat, "compute": shape.compute}
    for family in FAMILIES:
        config = {"architectures": [f"{family.architecture}{CAUSAL}"], "model_type": family.model_types[0],
                  "rope_parameters": parameters(shape.rotary_base, shape.rotary_scaling), "torch_dtype": "float32",
                  **common_config(shape), **family.config(shape)}
        try:
            if _same(shape_of(config, **plain), shape):
                return config
        except ValueError:
            continue
    raise ValueError(f"no published family has this combination of features, so no other library can load it: {shape}. "
                     f"The families are {sorted(name for family in FAMILIES for name in family.model_types)}.")


def _same(a: Shape, b: Shape) -> bool:
    """Whether two shapes describe one network; a scale of attention may be told or left to the head's size."""
    def plain(shape: Shape) -> Shape:
        scale = shape.attention_scale or shape.head_size ** -0.5
        return dataclasses.replace(shape, reach=(), window=0, attention_scale=round(scale, 9), rotary_base_window=0.0)

    return plain(a) == plain(b) and a.kinds == b.kinds
