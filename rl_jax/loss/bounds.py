"""How wide the ratio's band is for each token: half-widths (low, high) of [1 - low, 1 + high], as gates take them."""
import jax
import jax.numpy as jnp

from rl_jax.types import Scalar, Tokens


def by_probability(old_logp: Tokens, low: Scalar, high: Scalar, cap: Scalar = 10.0) -> tuple[Tokens, Tokens]:
    """The band in which |r - 1| p <= epsilon, p = q r: the rarer a token was, the more its ratio may change.

    1 - low_t = 1/2 + sqrt(max(1 - 4 low / q, 0)) / 2, and 1 + high_t = min(1/2 + sqrt(1 + 4 high / q) / 2, cap).
    From q = 4 low downwards the lower end stays at 1/2. Constant in the weights.

    Args:
      old_logp: log q of the chosen token under the policy that drew it, in nats.
      low, high: epsilon below and above 1, in units of probability, >= 0.
      cap: the largest upper end, as a ratio.

    Source: Yang et al. 2025, arXiv:2509.02333, "Dynamic-adaptive clipping".
    """
    inverse = jnp.exp(jnp.minimum(-jax.lax.stop_gradient(old_logp), 60.0))  # float32 ends at e^88
    bottom = 0.5 + 0.5 * jnp.sqrt(jnp.maximum(1 - 4 * low * inverse, 0.0))
    top = 0.5 + 0.5 * jnp.sqrt(1 + 4 * high * inverse)
    return 1 - bottom, jnp.minimum(top, cap) - 1


def by_entropy(scaled_entropy: Tokens, low: Scalar, high: Scalar, strength: Scalar) -> tuple[Tokens, Tokens]:
    """Sure tokens may fall further, low (1 - alpha h); unsure ones may rise further, high (1 + alpha h).

    The other side of each keeps its width. Constant in the weights.

    Args:
      scaled_entropy: h, where the token's entropy stands, in [-1, 1]; 0 and below is sure.
      low, high: half-widths of the band at h = 0, dimensionless, >= 0.
      strength: alpha, dimensionless, >= 0; 0 gives every token the same band.

    Source: Liu et al. 2025, arXiv:2509.16591, "Asymmetric Adaptive Clipping".
    """
    h = jax.lax.stop_gradient(scaled_entropy)
    return low * (1 + strength * jnp.maximum(-h, 0.0)), high * (1 + strength * jnp.maximum(h, 0.0))
