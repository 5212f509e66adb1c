"""The sizes and features of a network, as plain numbers."""
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from rl_jax.models.mixture import Experts
from rl_jax.models.rotary import Scaling

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ACTIVATIONS = ("silu", "gelu_tanh")
REACHES = ("full", "window")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What distinguishes one layer from another.

    Attributes:
      window: a token sees itself and the window - 1 before it; None: all before it.
      rotary_base, rotary_scaling: of its rotary embedding.
      mixture: it mixes experts; otherwise it has one dense inner layer.
    """

    window: int | None
    rotary_base: float
    rotary_scaling: Scaling | None
    mixture: bool

    @property
    def rotation(self) -> tuple[float, Scaling | None]:
        """What its rotary embedding's frequencies depend on."""
        return self.rotary_base, self.rotary_scaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a network.

    Attributes:
      vocabulary: V, rows of the embedding.
      width: D of the residual stream.
      layers, heads, key_heads, head_size: of the attention; key_heads divides heads.
      inner: width of the gated inner layer.
      query_bias: bias on the query, key and value projections (Qwen2).
      query_norm: RMSNorm on queries and keys, per head (Qwen3, Gemma 3).
      tied: the head is the embedding.
      scale_embedding: multiply embeddings by sqrt(D) (Gemma).
      after_norms: a norm also behind attention and behind the inner layer (Gemma).
      norm_offset: what is added to the learnt scale of every norm: 0, or 1 (Gemma).
      norm_epsilon: inside RMSNorm's square root.
      activation: of the gate: "silu", or "gelu_tanh" (Gemma).
      attention_scale: of the products of queries and keys; 0 takes head_size ** -0.5.
      attention_cap, logit_cap: scores and logits become cap tanh(. / cap) (Gemma 2); 0 is no bound.
      window: tokens that a layer of reach "window" sees, itself included.
      reach: "full" or "window" for each layer; repeated to the number of layers. () is "full".
      rotary_base: of the rotary wavelengths; rotary_base_window: in layers of reach "window", 0 takes the same.
      rotary_scaling: how the wavelengths of layers of reach "full" are stretched (`rotary.Scaling`, or its fields).
      mixture: experts in place of the dense inner layer (`mixture.Experts`, or its fields); None: dense.
      dense_layers: numbers of the layers that stay dense all the same.
      scan_layers: one compiled layer, scanned (short compile times for deep networks); otherwise unrolled.
      remat: recompute each layer in the backward pass instead of keeping its activations.
      compute: "float32" or "bfloat16".
    """

    vocabulary: int
    width: int = 128
    layers: int = 3
    heads: int = 4
    key_heads: int = 2
    head_size: int = 32
    inner: int = 512
    query_bias: bool = False
    query_norm: bool = False
    tied: bool = True
    scale_embedding: bool = False
    after_norms: bool = False
    norm_offset: float = 0.0
    norm_epsilon: float = 1e-6
    activation: str = "silu"
    attention_scale: float = 0.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    window: int = 0
    reach: tuple = ()
    rotary_base: float = 10_000.0
    rotary_base_window: float = 0.0
    rotary_scaling: Scaling | Mapping[str, Any] | None = None
    mixture: Experts | Mapping[str, Any] | None = None
    dense_layers: tuple = ()
    scan_layers: bool = False
    remat: bool = False
    compute: str = "float32"

    def __post_init__(self):
        for name, kind in ("rotary_scaling", Scaling), ("mixture", Experts):
            if isinstance(vars(self)[name], Mapping):
                object.__setattr__(self, name, _made(kind, vars(self)[name], name))
        for name in ("vocabulary", "width", "layers", "heads", "key_heads", "head_size", "inner"):
            if vars(self)[name] < 1:
                raise ValueError(f"model {name}={vars(self)[name]}: must be at least 1.")
        for name in ("attention_scale", "attention_cap", "logit_cap", "window", "rotary_base_window"):
            if vars(self)[name] < 0:
                raise ValueError(f"model {name}={vars(self)[name]}: must be positive, or 0 for none.")
        if self.heads % self.key_heads:
            raise ValueError(f"model heads={self.heads}, key_heads={self.key_heads}: key_heads must divide heads.")
        if self.head_size % 2:
            raise ValueError(f"model head_size={self.head_size}: rotary embedding needs an even number.")
        for name, value, allowed in (("compute", self.compute, sorted(DTYPES)),
                                     ("activation", self.activation, ACTIVATIONS)):
            if value not in allowed:
                raise ValueError(f"model {name}={value!r}: allowed are {allowed}.")
        if set(self.reach) - set(REACHES) or ("window" in self.reach) != (self.window > 0):
            raise ValueError(f"model reach={self.reach}, window={self.window}: reach lists {REACHES}, and window is "
                             'positive exactly where it lists "window".')
        if any(not 0 <= layer < self.layers for layer in self.dense_layers):
            raise ValueError(f"model dense_layers={self.dense_layers}: there are layers 0 to {self.layers - 1}.")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of each layer."""
        reach = self.reach or ("full",)
        return tuple(self._kind(reach[i % len(reach)], i) for i in range(self.layers))

    def _kind(self, reach: str, layer: int) -> Kind:
        windowed = reach == "window"
        return Kind(
            window=self.window if windowed else None,
            rotary_base=(self.rotary_base_window if windowed else 0.0) or self.rotary_base,
            rotary_scaling=None if windowed and self.rotary_base_window else self.rotary_scaling,
            mixture=self.mixture is not None and layer not in self.dense_layers)

    @property
    def period(self) -> int:
        """After how many layers their kinds repeat; scanned layers are stacked by their place in it."""
        kinds = self.kinds
        return next(p for p in range(1, self.layers + 1) if all(a == b for a, b in zip(kinds, kinds[p:], strict=False)))

    @property
    def repeats(self) -> int:
        """How often the whole period occurs; the layers behind it are not scanned."""
        return self.layers // self.period

    @property
    def mixtures(self) -> int:
        """Layers that mix experts."""
        return sum(kind.mixture for kind in self.kinds)


def depth_scale(layers: int) -> float:
    """Variance factor of a layer's last projection that keeps the residual stream's variance near 1 at any depth."""
    return 1 / (2 * layers)


def parameter_count(tree: Any) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(math.prod(a.shape) for a in _leaves(tree))


def _leaves(tree: Any) -> list[Any]:
    return [leaf for value in tree.values() for leaf in _leaves(value)] if isinstance(tree, Mapping) else [tree]


def _made(kind: type, values: Mapping[str, Any], name: str) -> Any:
    fields = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - fields)
    if unknown:
        raise ValueError(f"model {name} has no {unknown}; allowed are {sorted(fields)}.")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"model {name}={dict(values)}: {error}; its fields are {sorted(fields)}.") from error
