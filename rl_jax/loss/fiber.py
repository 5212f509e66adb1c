"""Ratios gated level by level: how far an answer has moved as a whole, and what each token adds to that.

An answer's log-ratios x_t split in two channels, a+ = mean of max(x, 0) and a- = mean of max(-x, 0). A base gate
holds each back (log w = g(a+) - g(a-)), a clip holds each token's residual, and G_t = exp(log w + residual_t) takes
the place of the ratio: no minimum, and the sign of the credit plays no part. The gradient passes through all of it,
so a token's gate moves with the other tokens of its answer, or of its whole domain. While nothing is held back G is
the ratio itself.
"""
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rl_jax import masked
from rl_jax.types import Group, Mask, PerSequence, Scalar, Tokens

Aggregate = Float[Array, " K"]
BaseGate = Callable[[Aggregate, Scalar, Aggregate], Aggregate]
Budgets = tuple[Scalar, Scalar, Scalar]


def log_ratios(logp: Tokens, old_logp: Tokens, mask: Mask) -> Tokens:
    """x = clip(logp - old_logp, -20, 20), in nats; 0 where nothing was chosen. No gradient beyond the clip.

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      old_logp: that of the policy to compare with, in nats; carries no gradient.
      mask: which tokens the policy chose.
    """
    return masked.zeroed(jnp.clip(logp - jax.lax.stop_gradient(old_logp), -20.0, 20.0), mask)


def channels(log_ratio: Tokens, mask: Mask) -> tuple[PerSequence, PerSequence]:
    """(a+, a-): means over each sequence's tokens of max(x, 0) and of max(-x, 0), both >= 0, in nats.

    Their difference is the mean of x; each is 0 where nothing was chosen. x = 0 belongs to a+.

    Args:
      log_ratio: x, in nats; differentiable.
      mask: which tokens the policy chose.

    Source: JD 2026, arXiv:2604.03044, section 3.3.1.
    """
    risen = log_ratio >= 0
    return (masked.row_mean(jnp.where(risen, log_ratio, 0.0), mask),
            masked.row_mean(jnp.where(risen, 0.0, -log_ratio), mask))


def rollback(aggregate: Aggregate, budget: Scalar, count: Aggregate) -> Aggregate:
    """g(a) = a up to |a| = C, then back to 0 with the slope -K, and 0 from |a| = (1 + 1/K) C on; odd, continuous.

    Args:
      aggregate: a, in nats; differentiable.
      budget: C, the largest |a| that passes, in nats, >= 0.
      count: K, how many members were averaged to a: tokens, answers or groups.

    Source: JD 2026, arXiv:2604.03044, section 3.3.1.
    """
    size = jnp.abs(aggregate)
    falling = jnp.sign(aggregate) * jnp.maximum((count + 1) * budget - count * size, 0.0)
    return jnp.where(size <= budget, aggregate, falling)


def clamp(aggregate: Aggregate, budget: Scalar, count: Aggregate) -> Aggregate:
    """clip(a, -C, C): a base gate without a way back, as an unofficial code has it; a choice, not the paper's.

    Args:
      aggregate: a, in nats; differentiable.
      budget: C, in nats, >= 0.
      count: not read; every base gate is given it.
    """
    return jnp.clip(aggregate, -budget, budget)


def trajectory_weight(log_ratio: Tokens, mask: Mask, *, positive: Scalar, negative: Scalar,
                      base: BaseGate = rollback) -> PerSequence:
    """log w = g(a+; C+, T) - g(a-; C-, T), in nats: how far a sequence of T tokens may move as a whole.

    Args:
      log_ratio: x, in nats; differentiable.
      mask: which tokens the policy chose.
      positive, negative: C+ and C-, budgets of the channels, in nats, >= 0; C- < C+ is advised.
      base: g, the base gate.

    Source: Li et al. 2026, arXiv:2603.08239; equations in arXiv:2604.03044, section 3.3.1.
    """
    rise, fall = channels(log_ratio, mask)
    length = mask.sum(axis=1).astype(log_ratio.dtype)
    return base(rise, positive, length) - base(fall, negative, length)


def tree_weight(log_ratio: Tokens, mask: Mask, group: Group, domain: Group, *, positive: Budgets, negative: Budgets,
                base: BaseGate = rollback) -> PerSequence:
    """log w of each sequence from the mean of its domain, its group's step from there, and its own from its group's.

    Per channel: g(a_D; C_D, K_D) + g(a_g - a_D; C_g, K_g) + g(a - a_g; C, T), and log w is that of a+ minus that of
    a-. a_g is the mean over the group's K_g sequences, a_D that over the domain's K_D groups; what has no chosen token
    is not counted. The gradient of one sequence's log w reaches every sequence of its domain, and no other.

    Without any budget (all infinite), with either base gate, this is `trajectory_weight` without any. With budgets
    it is `trajectory_weight` of C_D where all sequences of a domain have the same a+ and the same a- (one alone, in
    particular), exactly with `clamp`, and with `rollback` wherever |a| <= C_D, |a| >= 2 C_D or K_D = T. Infinite
    C_D and C_g alone do not make it so: g(a - a_g) is centred on the group, not on 0.

    Args:
      log_ratio: x, in nats; differentiable.
      mask: which tokens the policy chose.
      group: id of each sequence's group, in [0, 2N).
      domain: id of each sequence's part of the task, any integers; the same throughout a group.
      positive, negative: (C_D, C_g, C), budgets of domain, group and sequence in each channel, in nats, >= 0.
      base: g, the base gate.

    Source: Li et al. 2026, arXiv:2603.08239, abstract; that g is stacked on signed steps like this is a reconstruction,
      and that K is the number of groups, or of sequences, is a choice.
    """
    rows = group.shape[0]
    present = mask.any(axis=1)
    number = jnp.unique(domain, size=rows, return_inverse=True)[1].reshape(-1)
    home = jnp.maximum(jax.ops.segment_max(number, group, num_segments=2 * rows), 0)  # unused ids have no domain
    length = mask.sum(axis=1).astype(log_ratio.dtype)

    def channel(aggregate, budgets):
        of_group, sequences = _means(aggregate, group, present, 2 * rows)
        of_domain, groups = _means(of_group, home, sequences > 0, rows)
        at_domain = base(of_domain, budgets[0], groups)
        at_group = base(of_group - of_domain[home], budgets[1], sequences)
        return (at_domain[home] + at_group)[group] + base(aggregate - of_group[group], budgets[2], length)

    rise, fall = channels(log_ratio, mask)
    return channel(rise, positive) - channel(fall, negative)


def residual(log_ratio: Tokens, mask: Mask, bound: Scalar) -> Tokens:
    """clip(x - l a_own, -e, e) + clip(l a_other, -e, e): what a token adds to its sequence's change, in nats.

    l = +1 and (own, other) = (+, -) where x >= 0 (that 0 counts as positive is a choice), else l = -1 and (-, +). With
    an infinite bound it is x - (a+ - a-).

    Args:
      log_ratio: x, in nats; differentiable.
      mask: which tokens the policy chose.
      bound: e, in nats, >= 0; may be far smaller than the budgets of the sequence.

    Source: JD 2026, arXiv:2604.03044, section 3.3.1.
    """
    rise, fall = (aggregate[:, None] for aggregate in channels(log_ratio, mask))
    risen = log_ratio >= 0
    own, other = jnp.where(risen, rise, -fall), jnp.where(risen, fall, -rise)
    return jnp.clip(log_ratio - own, -bound, bound) + jnp.clip(other, -bound, bound)


def gated_ratio(log_ratio: Tokens, mask: Mask, log_weight: PerSequence, bound: Scalar) -> Tokens:
    """G = exp(log w + residual), in the place of the ratio; 1 where nothing was chosen.

    Args:
      log_ratio: x, in nats; differentiable.
      mask: which tokens the policy chose.
      log_weight: log w, from `trajectory_weight` or `tree_weight`, in nats; differentiable.
      bound: e, the largest size of each half of a token's residual, in nats, >= 0.

    Source: Li et al. 2026, arXiv:2603.08239; equations in arXiv:2604.03044, section 3.3.1.
    """
    return jnp.exp(masked.zeroed(log_weight[:, None] + residual(log_ratio, mask, bound), mask))


def _means(of: Aggregate, place: Int[Array, " K"], counted: Bool[Array, " K"],
           places: int) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    # mean over what is counted at each place, 0 where nothing is; and how many there are
    count = jax.ops.segment_sum(counted.astype(of.dtype), place, num_segments=places)
    total = jax.ops.segment_sum(jnp.where(counted, of, 0.0), place, num_segments=places)
    return total / jnp.maximum(count, 1), count
