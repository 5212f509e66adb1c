"""Learning from given answers."""
from rl_jax.types import Tokens


def negative_log_likelihood(logp: Tokens) -> Tokens:
    """-logp of the given token, in nats.

    Args:
      logp: log-probability of the given token now, in nats; differentiable.

    Source: Ouyang et al. 2022, arXiv:2203.02155, section 3.5.
    """
    return -logp
