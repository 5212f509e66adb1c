"""From the loss's gradient in a row of logits to the logits' own cotangents, while the row is still there."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from kernels_pallas.linear_logprob.forward import Moments

Rows = Float32[Array, " M"]


def d_logits(u: Float32[Array, "M V"], seen: Moments, targets: Int[Array, " M"], d_policy: dict[str, Rows],
             entropy: Rows, log_total: Rows) -> Float32[Array, "M V"]:
    """d_logp (1[v = target] - p_v) - d_entropy p_v (log p_v + H), from the exponentials that the forward pass made.

    Args:
      u: logits of the whole vocabulary, in nats.
      seen: their sums.
      targets: token ids; where one is not in the vocabulary or not kept, its log-probability is constant.
      d_policy: cotangents of "logp" and "entropy"; one that is not there is 0, which saves a pass over the logits.
      entropy, log_total: H and log of seen.total, in nats.
    """
    shifted = u - seen.maximum[:, None]
    probability = jnp.exp(shifted) / jnp.where(seen.total == 0, 1.0, seen.total)[:, None]
    d_logp = jnp.where(jnp.isneginf(seen.chosen), 0.0, d_policy.get("logp", jnp.zeros_like(entropy)))
    if "entropy" in d_policy:
        d_entropy = d_policy["entropy"]
        d_u = -probability * ((d_logp + d_entropy * (entropy - log_total))[:, None] + d_entropy[:, None] * shifted)
    else:
        d_u = -probability * d_logp[:, None]
    here = jnp.clip(targets, 0, u.shape[1] - 1)
    # Row by row, not by an index pair: a row axis that is sharded over devices stays so.
    return jax.vmap(lambda row, v, x: row.at[v].add(x))(d_u, here, d_logp)
