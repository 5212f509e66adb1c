"""Credit by comparison with the whole batch."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rl_jax.types import Mask, PerSequence, Tokens


def zscore_per_turn(credit: PerSequence, turn: Int[Array, "N T"], mask: Mask, turns: int, *, limit: float = 3.0,
                    smallest: float = 1e-6) -> Tokens:
    """clip((x - mean_k) / std_k, -limit, limit) on the tokens of turn k, over the sequences that have that turn.

    std_k has ddof 1 and no epsilon. Where it is not above `smallest`, as for a turn that one sequence
    has alone, x stays as it is (the published account leaves that case open). 0 on every other token.

    Args:
      credit: x, in reward units, such as the reward less its group's mean.
      turn: number of each token's turn; those of turns beyond the last get 0.
      mask: which tokens the policy chose.
      turns: K, how many turns are told apart.
      limit: largest credit, in standard deviations.
      smallest: standard deviation, in reward units, from which on x is compared.

    Source: SeeUPO, arXiv:2602.06554.
    """
    number = jnp.arange(turns)
    chosen = (turn[:, :, None] == number[None, None, :]) & mask[:, :, None]
    has = chosen.any(axis=1)
    credit = jnp.where(has, jax.lax.stop_gradient(credit)[:, None], 0.0)
    # measured from the smallest: equal credit is exactly 0 from its mean, whatever the mean's rounding
    above = jnp.where(has, credit - jnp.where(has, credit, jnp.inf).min(axis=0, keepdims=True), 0.0)
    centred = jnp.where(has, above - _over(above, has.sum(axis=0)), 0.0)
    std = jnp.sqrt(_over(centred**2, has.sum(axis=0) - 1))
    compared = jnp.where(std > smallest, centred / jnp.maximum(std, smallest), credit)
    return jnp.where(chosen, jnp.clip(compared, -limit, limit)[:, None, :], 0.0).sum(axis=2)


def _over(x: Float[Array, "N K"], count: Int[Array, " K"]) -> Float[Array, "1 K"]:
    """The sum over sequences divided by a count of at least 1."""
    return (x.sum(axis=0) / jnp.maximum(count, 1))[None, :]
