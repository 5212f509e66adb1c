"""One token from a row of logits, with the log-probability under the distribution that drew it."""
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rl_jax.recipe import Rollout


def kept(logits: Float[Array, "B V"], rollout: Rollout) -> Bool[Array, "B V"]:
    """Which tokens top-k, top-p and min-p leave in; each reads the tempered distribution, all must agree.

    Tokens that tie with the last one kept are kept as well.

    Args:
      logits: already divided by the temperature.

    Source: top-p, Holtzman et al. 2020, arXiv:1904.09751; min-p, arXiv:2407.01082.
    """
    keep = jnp.ones(logits.shape, bool)
    if rollout.top_k:
        k = min(rollout.top_k, logits.shape[1])
        keep &= logits >= jax.lax.top_k(logits, k)[0][:, -1:]
    if rollout.top_p < 1:
        ordered = jnp.sort(logits, axis=1, descending=True)
        probability = jax.nn.softmax(ordered, axis=1)
        before = jnp.cumsum(probability, axis=1) - probability
        last = jnp.maximum((before < rollout.top_p).sum(axis=1) - 1, 0)
        keep &= logits >= jnp.take_along_axis(ordered, last[:, None], axis=1)
    if rollout.min_p > 0:
        keep &= logits >= logits.max(axis=1, keepdims=True) + jnp.log(rollout.min_p)
    return keep


def draw(uniform: Float[Array, " B"], logits: Float[Array, "B V"], rollout: Rollout, coefficient: Any = None) -> tuple[
        Int[Array, " B"], Float[Array, " B"], Float[Array, " B"], Bool[Array, "B V"] | None]:
    """A token per row, its log-probability, the entropy (nats), and which tokens could be drawn.

    Log-probability and entropy are those of the distribution that really sampled: after
    temperature, top-k, top-p and min-p. At temperature 0 the most probable token is certain:
    both are 0. Where the rollout has a `temperature_factor`, it reads the entropy at the rollout's
    own temperature, which is also the one returned; the log-probability is after the factor.

    Args:
      uniform: one number in [0, 1) per row; the token is the first whose cumulative probability exceeds it.
      coefficient: the recipe's adapting coefficients by name, for the factor.

    Returns:
      token, logp, entropy, and the mask of kept tokens (None when nothing was cut).
    """
    if rollout.temperature == 0:
        token = logits.argmax(axis=1)
        zero = jnp.zeros(token.shape, jnp.float32)
        return token, zero, zero, None
    logits = logits.astype(jnp.float32) / rollout.temperature
    own_entropy = None
    if rollout.temperature_factor is not None:
        own_entropy = _entropy(jax.nn.log_softmax(logits, axis=1))
        logits = logits / rollout.temperature_factor(own_entropy, coefficient)[:, None]
    keep = kept(logits, rollout) if rollout.truncated else None
    if keep is not None:
        logits = jnp.where(keep, logits, -jnp.inf)
    logp = jax.nn.log_softmax(logits, axis=1)
    probability = jnp.exp(logp)
    # A parallel sum is not monotone to the last bit: only a token that has probability may be where it passes.
    cumulative = jnp.where(probability > 0, jnp.cumsum(probability, axis=1), 0.0)
    token = (cumulative > uniform[:, None] * cumulative.max(axis=1, keepdims=True)).argmax(axis=1)
    entropy = _entropy(logp) if own_entropy is None else own_entropy
    return token, jnp.take_along_axis(logp, token[:, None], axis=1)[:, 0], entropy, keep


def _entropy(logp: Float[Array, "B V"]) -> Float[Array, " B"]:
    probability = jnp.exp(logp)
    return -jnp.where(probability > 0, probability * logp, 0.0).sum(axis=1)
