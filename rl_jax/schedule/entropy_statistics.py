"""Which tokens are sure and which unsure, by the spread of entropies in a batch; and the temperature that follows.

h of a token with entropy H, between -1 (the surest) and 1 (the least sure): z = log H less a pivot,
over the largest such distance on its side of the pivot.
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rl_jax import masked
from rl_jax.schedule.control import Control
from rl_jax.types import Mask, Scalar, Tokens

Statistics = dict[str, Float[Array, ""]]
NONE = {"pivot": 0.0, "deviation": 0.0, "above": 0.0, "below": 0.0}


def log_entropy(entropy: Float[Array, "*shape"], floor: float = 1e-12) -> Float[Array, "*shape"]:
    """z = log max(H, floor).

    Args:
      entropy: H, in nats.
      floor: the smallest entropy told from 0, in nats; a choice and not the paper's.
    """
    return jnp.log(jnp.maximum(jax.lax.stop_gradient(entropy), floor))


def of_tokens(entropy: Tokens, mask: Mask, quantile: float = 0.8) -> Statistics:
    """{pivot, deviation, above, below} of z = log H over the chosen tokens; all 0 if there is none.

    `pivot` is the quantile of z (the nearest token's own value), `deviation` = sqrt(mean of (z - pivot)^2),
    `above` and `below` the largest distances from the pivot, in deviations, on either side; 0 on a side where
    no token lies.

    Args:
      entropy: H of the distribution that each token was drawn from, in nats.
      mask: which tokens of the whole batch the policy chose.
      quantile: share of the tokens below the pivot, in [0, 1].

    Source: Liu et al. 2025, arXiv:2509.16591, and its published code.
    """
    count = mask.sum()
    z = log_entropy(jnp.where(mask, entropy, 1.0))
    ordered = jnp.sort(jnp.where(mask, z, jnp.inf).reshape(-1))
    nearest = jnp.round(quantile * jnp.maximum(count - 1, 0)).astype(jnp.int32)
    pivot = jnp.where(count > 0, ordered[nearest], 0.0)
    distance = jnp.where(mask, z - pivot, 0.0)
    deviation = jnp.sqrt((distance**2).sum() / jnp.maximum(count, 1))
    h = distance / jnp.where(deviation > 0, deviation, 1.0)
    return {"pivot": pivot, "deviation": deviation, "above": h.max(initial=0.0), "below": (-h).max(initial=0.0)}


def scaled(entropy: Float[Array, "*shape"], pivot: Scalar, deviation: Scalar, above: Scalar,
           below: Scalar) -> Float[Array, "*shape"]:
    """h = clip((z - pivot) / deviation / (above or below), -1, 1), z = log H; 0 where that divisor is 0.

    Args:
      entropy: H, in nats.
      pivot, deviation, above, below: from `of_tokens`, of this batch or another.

    Source: Liu et al. 2025, arXiv:2509.16591. The paper's sign, see `scaled_repo_sign`.
    """
    distance = log_entropy(entropy) - pivot
    divisor = deviation * jnp.where(distance > 0, above, below)
    h = jnp.clip(jnp.where(divisor > 0, distance / jnp.where(divisor > 0, divisor, 1.0), 0.0), -1.0, 1.0)
    return jax.lax.stop_gradient(h)


def scaled_repo_sign(entropy: Float[Array, "*shape"], pivot: Scalar, deviation: Scalar, above: Scalar,
                     below: Scalar) -> Float[Array, "*shape"]:
    """|h| of `scaled`, for comparison with published code: it divides what lies below the pivot by a negative number.

    No token is then sure: what the paper does to tokens of h < 0 is never done.

    Args:
      entropy: H, in nats.
      pivot, deviation, above, below: from `of_tokens`, of this batch or another.

    Source: github.com/starriver030515/HAPO, core_algos.compute_entropy_h.
    """
    return jnp.abs(scaled(entropy, pivot, deviation, above, below))


def scaled_in_batch(entropy: Tokens, mask: Mask, quantile: float = 0.8) -> Tokens:
    """h of every chosen token against its own batch; 0 elsewhere.

    A slot passes the entropies of the policy that sampled, which is the current one until the batch's
    first update.

    Args:
      entropy: H of the distribution that each token was drawn from, before any factor of its temperature, in nats.
      mask: which tokens of the whole batch the policy chose.
      quantile: share of the tokens below the pivot, in [0, 1].

    Source: Liu et al. 2025, arXiv:2509.16591.
    """
    entropy = jnp.where(mask, entropy, 1.0)
    return masked.zeroed(scaled(entropy, **of_tokens(entropy, mask, quantile)), mask)


def temperature_factor(entropy: Float[Array, " B"], statistics: Statistics, strength: Scalar) -> Float[Array, " B"]:
    """1 + tau h: unsure tokens are drawn a little hotter, sure ones a little colder.

    Args:
      entropy: H of each row's next token at the rollout's own temperature, in nats.
      statistics: from `of_tokens`, of the previous step; h is 0 where they are.
      strength: tau, dimensionless, in [0, 1); 0 leaves every temperature as it is.

    Raises:
      ValueError: if tau is a number outside of [0, 1): a temperature would not be positive.

    Source: Liu et al. 2025, arXiv:2509.16591, "Adaptive Temperature Sampling".
    """
    if isinstance(strength, (int, float)) and not 0 <= strength < 1:
        raise ValueError(f"strength={strength}: temperatures are multiplied by 1 + strength h, h in [-1, 1], and must "
                         "stay positive; allowed is 0 <= strength < 1.")
    return 1 + strength * scaled(entropy, **statistics)


def of_previous_step(quantile: float = 0.8) -> Control:
    """`of_tokens` of the entropies met in the previous step, for `scaled`; before the first one every h is 0.

    A step without any chosen token leaves them as they were.

    Args:
      quantile: share of the tokens below the pivot, in [0, 1].

    Source: Liu et al. 2025, arXiv:2509.16591, and its published code.
    """
    def update(state, x, policy, metrics):
        found = of_tokens(x.rollout_entropy, x.mask, quantile)
        return {name: jnp.where(x.mask.any(), found[name], state[name]) for name in state}

    return Control(init=lambda examples: {name: jnp.asarray(value, jnp.float32) for name, value in NONE.items()},
                   update=update, read=lambda state: state)
