"""When a change of probability stops being rewarded."""
import jax
import jax.numpy as jnp

from rl_jax import masked
from rl_jax.types import Bound, Mask, Scalar, Tokens


def unclipped(ratio: Tokens, advantage: Tokens) -> Tokens:
    """-r A: the surrogate without any gate.

    Args:
      ratio: r, current over old probability; differentiable.
      advantage: A, in reward units; carries no gradient.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 6.
    """
    return -ratio * jax.lax.stop_gradient(advantage)


def ppo_clip(ratio: Tokens, advantage: Tokens, low: Bound, high: Bound) -> Tokens:
    """-min(r A, clip(r, 1 - low, 1 + high) A): nothing is gained by leaving the band.

    Args:
      ratio: r, current over old probability of the chosen token; differentiable.
      advantage: A, in reward units; carries no gradient.
      low, high: half-widths of the band, dimensionless, >= 0.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7.
    """
    advantage = jax.lax.stop_gradient(advantage)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)


def dual_clip(ratio: Tokens, advantage: Tokens, low: Bound, high: Bound, ceiling: Bound) -> Tokens:
    """`ppo_clip`, but at most -c A where A < 0: a bad token that became probable does not dominate the batch.

    Args:
      ratio: r, current over old probability of the chosen token; differentiable.
      advantage: A, in reward units; carries no gradient.
      low, high: half-widths of the band, dimensionless, >= 0.
      ceiling: c, the largest ratio that counts where A < 0, dimensionless, > 1 + high.

    Source: Ye et al. 2019, arXiv:1912.09729, "Dual-clip PPO".
    """
    advantage = jax.lax.stop_gradient(advantage)
    clipped = ppo_clip(ratio, advantage, low, high)
    return jnp.where(advantage < 0, jnp.minimum(clipped, -ceiling * advantage), clipped)


def two_sided_clip(ratio: Tokens, advantage: Tokens, low: Bound, high: Bound, ceiling: Bound) -> Tokens:
    """-min(min(r, c) A, clip(r, 1 - low, 1 + high) A): `ppo_clip` whose ratio never exceeds c.

    Only bites where A < 0. For c > 1 + high it is `dual_clip`.

    Args:
      ratio: r, current over old probability of the chosen token; differentiable.
      advantage: A, in reward units; carries no gradient.
      low, high: half-widths of the band, dimensionless, >= 0.
      ceiling: c ("delta"), the largest ratio that counts, dimensionless; 4 is suggested.

    Source: Prime Intellect 2025, arXiv:2505.07291, "Two-sided GRPO clipping".
    """
    advantage = jax.lax.stop_gradient(advantage)
    return -jnp.minimum(jnp.minimum(ratio, ceiling) * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)


def soft(ratio: Tokens, advantage: Tokens, positive: Scalar, negative: Scalar) -> Tokens:
    """-(4 / tau) sigmoid(tau (r - 1)) A: the further r is from 1, the less a token teaches, on both sides.

    The slope in r is -sech^2(tau (r - 1) / 2) A: all of it at r = 1, whatever tau. The value at r = 1
    is -2 A / tau and means nothing.

    Args:
      ratio: r, current over old probability of the chosen token; differentiable.
      advantage: A, in reward units; carries no gradient.
      positive, negative: tau where A > 0 and elsewhere, dimensionless, > 0; larger closes the gate nearer to 1.

    Source: Gao et al. 2025, arXiv:2511.20347, "Soft Adaptive Policy Optimization".
    """
    advantage = jax.lax.stop_gradient(advantage)
    temperature = jnp.where(advantage > 0, positive, negative)
    return -4 / temperature * jax.nn.sigmoid(temperature * (ratio - 1)) * advantage


def ppo_clip_of_mixture(ratio: Tokens, sequence_ratio: Tokens, advantage: Tokens, share: Bound, *, clip: Bound,
                        sequence_low: Bound, sequence_high: Bound) -> Tokens:
    """-min(m A, m' A), with m = w r + (1 - w) s, and m' the same of r and s clipped each to its own band.

    Clipping before mixing: neither branch can use the other's band.

    Args:
      ratio: r, current over old probability of the chosen token; differentiable.
      sequence_ratio: s, of the token's sequence, as by `ratio.per_sequence_token`; differentiable.
      advantage: A, in reward units; carries no gradient.
      share: w, of the token's own ratio, in [0, 1]; carries no gradient. 1 is GRPO's loss, 0 is GSPO-token's.
      clip: half-width of the band of r, dimensionless, >= 0.
      sequence_low, sequence_high: half-widths of the band of s, dimensionless, >= 0.

    Source: Min et al. 2026, arXiv:2601.05607, abstract; that the minimum is taken of the mixtures is a choice, see
      `mixture_of_ppo_clips`.
    """
    advantage, share = jax.lax.stop_gradient((advantage, share))
    free = share * ratio + (1 - share) * sequence_ratio
    held = (share * jnp.clip(ratio, 1 - clip, 1 + clip)
            + (1 - share) * jnp.clip(sequence_ratio, 1 - sequence_low, 1 + sequence_high))
    return -jnp.minimum(free * advantage, held * advantage)


def mixture_of_ppo_clips(ratio: Tokens, sequence_ratio: Tokens, advantage: Tokens, share: Bound, *, clip: Bound,
                         sequence_low: Bound, sequence_high: Bound) -> Tokens:
    """w ppo_clip(r) + (1 - w) ppo_clip(s): the other reading of DHPO, two losses that do not see each other.

    Args:
      ratio: r, current over old probability of the chosen token; differentiable.
      sequence_ratio: s, of the token's sequence, as by `ratio.per_sequence_token`; differentiable.
      advantage: A, in reward units; carries no gradient.
      share: w, of the token's own ratio, in [0, 1]; carries no gradient. 1 is GRPO's loss, 0 is GSPO-token's.
      clip: half-width of the band of r, dimensionless, >= 0.
      sequence_low, sequence_high: half-widths of the band of s, dimensionless, >= 0.

    Source: Min et al. 2026, arXiv:2601.05607, abstract; that each branch has its own minimum is a choice, see
      `ppo_clip_of_mixture`.
    """
    share = jax.lax.stop_gradient(share)
    return (share * ppo_clip(ratio, advantage, clip, clip)
            + (1 - share) * ppo_clip(sequence_ratio, advantage, sequence_low, sequence_high))


def entropy_share(entropy: Tokens, mask: Mask) -> Tokens:
    """w = H / largest H among the batch's chosen tokens, in [0, 1]; 0 where nothing was chosen or all H are 0.

    What `ppo_clip_of_mixture` takes as share: uncertain tokens go by their own ratio, sure ones by their sequence's.

    Args:
      entropy: H of the distribution that the token was drawn from, in nats; carries no gradient.
      mask: which tokens of the whole batch the policy chose.

    Source: Min et al. 2026, arXiv:2601.05607, abstract; the form of the weight is a choice, not the paper's.
    """
    entropy = jax.lax.stop_gradient(masked.zeroed(entropy, mask))
    largest = entropy.max(initial=0.0)
    return jnp.where(largest > 0, entropy / jnp.where(largest > 0, largest, 1.0), 0.0)
