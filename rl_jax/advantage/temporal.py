"""Credit along a sequence: what a token earned later.

Time runs over the tokens that the policy chose. Tokens between them (tool output) earn nothing and take
no time: what comes later is carried through them unchanged, and they get 0 themselves. Rewards
and values are constants: no gradient passes.
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from kernels_pallas.discounted_scan.op import discounted_scan
from rl_jax import masked
from rl_jax.types import Mask, PerSequence, Scalar, Tokens


def at_last_token(reward: PerSequence, mask: Mask) -> Tokens:
    """R at the last chosen token, 0 elsewhere: an outcome reward as a reward per token.

    Args:
      reward: R, in reward units.
      mask: which tokens the policy chose.
    """
    return jnp.where(masked.last(mask), reward[:, None], 0.0)


def gae(reward_per_token: Tokens, values: Tokens, mask: Mask, discount: Scalar, decay: Scalar) -> Tokens:
    """A_t = delta_t + discount decay A_{t+1}, with delta_t = r_t + discount V_{t+1} - V_t.

    V and A after the last chosen token are 0.

    Args:
      reward_per_token: r, in reward units.
      values: V before the token is chosen, in reward units.
      mask: which tokens the policy chose.
      discount: gamma per chosen token, in [0, 1].
      decay: lambda, in [0, 1]; 1 trusts the rewards, 0 the values.

    Source: Schulman et al. 2015, arXiv:1506.02438, eq. 16.
    """
    return _backward(reward_per_token, values, mask, jnp.zeros_like(values[:, 0]), discount, decay)


def extended_gae(reward_per_token: Tokens, values: Tokens, mask: Mask, cut: Bool[Array, " N"], discount: Scalar,
                 decay: Scalar) -> Tokens:
    """`gae`, but V after the last token of an answer that was cut off is V before that token: EGAE.

    So an answer that goes on later is not held to be worth 0 there; with discount 1 its newest token
    gets its own reward and nothing else.

    Args:
      reward_per_token: r, in reward units.
      values: V before the token is chosen, in reward units.
      mask: which tokens the policy chose, so far.
      cut: which answers stop before their end.
      discount: gamma per chosen token, in [0, 1].
      decay: lambda, in [0, 1]; 1 trusts the rewards, 0 the values.

    Source: Fan et al. 2025, arXiv:2506.15050, "Extended Generalized Advantage Estimation".
    """
    after = jnp.where(cut, masked.row_total(values, masked.last(mask)), 0.0)
    return _backward(reward_per_token, values, mask, after, discount, decay)


def _backward(reward: Tokens, values: Tokens, mask: Mask, after: PerSequence, discount: Scalar,
              decay: Scalar) -> Tokens:
    """The recursion of `gae` from the last chosen token on, with V after it given and A after it 0."""
    reward, values, after = jax.lax.stop_gradient((masked.zeroed(reward, mask), masked.zeroed(values, mask), after))
    value_from_here = discounted_scan(values, 0.0, last=after, mask=mask)
    next_value = jnp.concatenate([value_from_here[:, 1:], after[:, None]], axis=1)
    surprise = reward + discount * next_value - values
    return masked.zeroed(discounted_scan(surprise, discount * decay, mask=mask), mask)


def reward_to_go(reward_per_token: Tokens, mask: Mask, discount: Scalar) -> Tokens:
    """G_t = r_t + discount G_{t+1}: the discounted rewards from this token on.

    Args:
      reward_per_token: r, in reward units.
      mask: which tokens the policy chose.
      discount: gamma per chosen token, in [0, 1].

    Source: Sutton and Barto 2018, Reinforcement Learning, eq. 3.9.
    """
    return gae(reward_per_token, jnp.zeros_like(reward_per_token), mask, discount, 1.0)


def lambda_return(reward_per_token: Tokens, values: Tokens, mask: Mask, discount: Scalar, decay: Scalar) -> Tokens:
    """A_t + V_t with A from `gae`: what the value of a token is trained towards; 0 where nothing was chosen.

    Args:
      reward_per_token: r, in reward units.
      values: V before the token is chosen, in reward units.
      mask: which tokens the policy chose.
      discount: gamma per chosen token, in [0, 1].
      decay: lambda, in [0, 1].

    Source: Schulman et al. 2015, arXiv:1506.02438, section 5; Sutton and Barto 2018, eq. 12.2.
    """
    advantage = gae(reward_per_token, values, mask, discount, decay)
    return advantage + jax.lax.stop_gradient(masked.zeroed(values, mask))
