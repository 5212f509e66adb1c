"""A mixture of experts in place of the inner projections: its router's choices are recorded and can be replayed."""
import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Integer

from rl_jax.models import experts, mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """The sizes of a mixture.

    Attributes:
      experts: X, how many there are.
      chosen: k, how many of them a token goes through.
      inner: F, the width of one expert.
      normalised: the weights of the chosen ones are divided by their sum.
    """

    experts: int
    chosen: int
    inner: int
    normalised: bool = True

    def __post_init__(self):
        for name in ("experts", "chosen", "inner"):
            if vars(self)[name] < 1:
                raise ValueError(f"model mixture {name}={vars(self)[name]}: must be at least 1.")
        if self.chosen > self.experts:
            raise ValueError(f"model mixture chosen={self.chosen}, experts={self.experts}: no more can be chosen than "
                             "there are.")


class Mixture(nnx.Module):
    """sum_j p_j down_j(silu(gate_j x) * up_j x) over the experts j that the router finds most probable.

    Source: Qwen3MoeSparseMoeBlock; Shazeer et al. 2017, arXiv:1701.06538, without noise.
    """

    def __init__(self, sizes: Experts, width: int, layers: int, *, rngs: nnx.Rngs):
        """Fresh weights.

        Args:
          width: D of the residual stream.
          layers: of the network: the deeper, the smaller what every one of them adds.
        """

        def normal(*shape: int, scale: float = 1.0) -> nnx.Param:
            each = tuple(range(len(shape) - 2))  # every expert is a matrix of its own
            make = jax.nn.initializers.variance_scaling(scale, "fan_in", "normal", batch_axis=each)
            return nnx.Param(make(rngs.params(), shape, jnp.float32))

        self.sizes = sizes
        self.router = normal(width, sizes.experts)
        self.gate = normal(sizes.experts, width, sizes.inner)
        self.up = normal(sizes.experts, width, sizes.inner)
        self.down = normal(sizes.experts, sizes.inner, width, scale=1 / (2 * layers))

    def __call__(self, x: Float[Array, "M D"],
                 chosen: Integer[Array, "M k"] | None = None) -> tuple[Float[Array, "M D"], Int[Array, "M k"]]:
        """What the experts make of each row, in x's dtype, and their ids.

        Args:
          chosen: ids to replay; their weights are the router's of today. None: the most probable.
        """
        # In full float32 whatever rows and router are kept in: near ties must not be decided by rounding.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        logits = jnp.matmul(x.astype(wide), self.router[...].astype(wide), precision=jax.lax.Precision.HIGHEST)
        if chosen is None:
            chosen, weight = route(logits, self.sizes.chosen, self.sizes.normalised)
        else:
            chosen = chosen.astype(jnp.int32)
            weight = weights_of(logits, chosen, self.sizes.normalised)
        # XLA cuts the experts of one product over a mesh, but not those of a loop
        implementation = None if mesh.current() is None else "dense"
        matrices = self.gate[...], self.up[...], self.down[...]
        return experts.mixed(x, chosen, weight, *matrices, implementation=implementation), chosen


def route(logits: Float[Array, "M X"], chosen: int,
          normalised: bool) -> tuple[Int[Array, "M k"], Float[Array, "M k"]]:
    """(ids of the most probable experts, best first; their weights). Of equals the lowest id comes first.

    Args:
      logits: in nats.
      chosen: k, at most X.
      normalised: as in `weights_of`.
    """
    expert = jax.lax.top_k(logits, chosen)[1]
    return expert, weights_of(logits, expert, normalised)


def weights_of(logits: Float[Array, "M X"], expert: Int[Array, "M k"], normalised: bool) -> Float[Array, "M k"]:
    """softmax(logits) at the given experts, over those alone if `normalised`. The gradient flows through the logits.

    Source: R2 and R3 of routing replay, Zheng et al. 2025, arXiv:2512.01374, for experts that others have chosen.

    Args:
      logits: in nats.
      expert: ids from 0 to X - 1, different ones in each row.
    """
    own = jnp.take_along_axis(logits, expert, axis=1)
    everything = own if normalised else logits
    return jnp.exp(own - jax.nn.logsumexp(everything, axis=1, keepdims=True))


def load(expert: Integer[Array, "N T L k"], mask: Bool[Array, "N T"], count: int) -> dict[str, Float[Array, ""]]:
    """How evenly the chosen tokens went over the experts, of each of L layers, as means over the layers.

    `routing/load`: the largest share of an expert times X, from 1 (even) to X / k; `routing/load_max`: the same in the
    most uneven layer; `routing/idle`: share of the experts that nobody chose; `routing/load_entropy`: entropy of the
    shares over log X, from 0 to 1 (even). All are 0, idle 1, without any token.

    Args:
      expert: ids from 0 to X - 1; those of tokens that the mask leaves out are not read.
      mask: which tokens count.
      count: X, how many experts there are.
    """
    def layer(expert):
        index = jnp.where(mask[:, :, None], expert, count)
        return jnp.zeros(count, jnp.int32).at[index].add(1, mode="drop")

    chosen = jax.lax.map(layer, jnp.moveaxis(expert.astype(jnp.int32), 2, 0))
    share = chosen / jnp.maximum(chosen.sum(axis=1, keepdims=True), 1)
    largest = count * share.max(axis=1)
    entropy = jax.scipy.special.entr(share).sum(axis=1) / math.log(max(count, 2))
    return {"routing/load": largest.mean(), "routing/load_max": largest.max(),
            "routing/idle": (chosen == 0).mean(), "routing/load_entropy": entropy.mean()}
