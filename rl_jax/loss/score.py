"""The score function: the gradient of a log-probability, times credit."""
import jax

from rl_jax.types import Tokens


def policy_gradient(logp: Tokens, advantage: Tokens) -> Tokens:
    """-A logp: its gradient is that of the expected reward; its value means nothing.

    Args:
      logp: log-probability of the chosen token now, in nats; differentiable.
      advantage: A, in reward units; carries no gradient.

    Source: Williams 1992, Machine Learning 8, section 4.
    """
    return -jax.lax.stop_gradient(advantage) * logp
