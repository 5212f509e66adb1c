"""What a published family of models is here: sizes read from its config.json, and the names of its weights."""
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rl_jax.models.shape import Shape

Config = Mapping[str, Any]
Path = tuple[str | int, ...]

PROJECTIONS = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
               "out": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
NORMS = {"before_attention": "input_layernorm", "before_inner": "post_attention_layernorm",
         "query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
EXPERTS = ("gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of published models.

    Attributes:
      model_types: values of `model_type` in config.json that are this family's.
      architecture: its class in `architectures`, without the ending that says what its head is for.
      shape: config -> the fields of `Shape` that this family sets, or sets otherwise than `common_shape`.
      config: shape -> what config.json must hold beside the fields that every family shares.
      norms: names of the norms of a layer that differ from `NORMS`.
    """

    model_types: tuple[str, ...]
    architecture: str
    shape: Callable[[Config], dict[str, Any]]
    config: Callable[[Shape], dict[str, Any]]
    norms: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where the numbers of one parameter are in a checkpoint.

    Attributes:
      names: of the tensors, one per entry of the leading axes `stacked`, in order; a single one without them.
      stacked: leading axes of the parameter that the checkpoint keeps as tensors of their own.
      transposed: the checkpoint has [outputs, inputs] where the parameter has [inputs, outputs].
    """

    names: tuple[str, ...]
    stacked: tuple[int, ...] = ()
    transposed: bool = False


def common_shape(config: Config) -> dict[str, Any]:
    """The fields of `Shape` that every family reads alike."""
    heads = config["num_attention_heads"]
    return {
        "vocabulary": config["vocab_size"], "width": config["hidden_size"], "layers": config["num_hidden_layers"],
        "heads": heads, "key_heads": config.get("num_key_value_heads") or heads, "inner": config["intermediate_size"],
        "head_size": config.get("head_dim") or config["hidden_size"] // heads,
        "tied": config.get("tie_word_embeddings", False), "norm_epsilon": config.get("rms_norm_eps", 1e-6)}


def common_config(shape: Shape) -> dict[str, Any]:
    """The fields of config.json that every family writes alike."""
    return {
        "vocab_size": shape.vocabulary, "hidden_size": shape.width, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.key_heads, "intermediate_size": shape.inner,
        "head_dim": shape.head_size, "tie_word_embeddings": shape.tied, "rms_norm_eps": shape.norm_epsilon,
        "max_position_embeddings": 32768}


def tensors(family: Family, shape: Shape, head: str = "lm_head") -> Iterator[tuple[Path, Tensor]]:
    """For every parameter, by its path in the tree, the tensors that a checkpoint keeps it in.

    Args:
      head: name of the head's module: "lm_head".
    """
    yield ("embedding",), Tensor(("model.embed_tokens.weight",))
    if not shape.tied:
        yield ("head",), Tensor((f"{head}.weight",))
    yield ("final", "scale"), Tensor(("model.norm.weight",))
    scanned = shape.period * shape.repeats if shape.scan_layers else 0
    for place in range(shape.period if scanned else 0):
        layers = tuple(range(place, scanned, shape.period))
        yield from _block(family, shape, ("blocks", place), layers, (len(layers),))
    for layer in range(scanned, shape.layers):
        yield from _block(family, shape, ("tail" if scanned else "blocks", layer - scanned), (layer,), ())


def _block(family: Family, shape: Shape, at: Path, layers: tuple[int, ...],
           stacked: tuple[int, ...]) -> Iterator[tuple[Path, Tensor]]:
    def named(name: str) -> tuple[str, ...]:
        return tuple(f"model.layers.{layer}.{name}" for layer in layers)

    norms = {**NORMS, **family.norms}
    for name in ("before_attention", "before_inner", *(("after_attention", "after_inner") if shape.after_norms else ()),
                 *(("query_norm", "key_norm") if shape.query_norm else ())):
        yield (*at, name, "scale"), Tensor(named(f"{norms[name]}.weight"), stacked)
    mixture = shape.kinds[layers[0]].mixture
    for name, theirs in PROJECTIONS.items():
        if mixture and name in EXPERTS:
            names = tuple(f"{one}.{e}.{name}_proj.weight" for one in named("mlp.experts")
                          for e in range(shape.mixture.experts))
            yield (*at, "mixture", name), Tensor(names, (*stacked, shape.mixture.experts), transposed=True)
            continue
        yield (*at, name, "weight"), Tensor(named(f"{theirs}.weight"), stacked, transposed=True)
        if shape.query_bias and name in ("query", "key", "value"):
            yield (*at, name, "bias"), Tensor(named(f"{theirs}.bias"), stacked)
    if mixture:
        yield (*at, "mixture", "router"), Tensor(named("mlp.gate.weight"), stacked, transposed=True)


def refused(config: Config, name: str, allowed: Any, why: str) -> None:
    """Refuses a config whose field asks for what is not there.

    Raises:
      ValueError: what was given and what is allowed.
    """
    if name in config and config[name] is not None and config[name] != allowed:
        raise ValueError(f"config.json {name}={config[name]!r}: allowed is {allowed!r} ({why}).")
