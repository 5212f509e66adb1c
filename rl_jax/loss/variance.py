"""A penalty on the variance of the ratio, in the place of a clip."""
import jax

from rl_jax.types import Scalar, Tokens


def squared_change(ratio: Tokens) -> Tokens:
    """(r - 1)^2: on tokens of the old policy its mean is the variance of r, chi-square of the new policy to the old.

    About 2 KL (in nats) while the policies are close.

    Args:
      ratio: r, current over old probability of the chosen token; differentiable.

    Source: Luo et al. 2026, arXiv:2601.03320.
    """
    return (ratio - 1) ** 2


def penalised(ratio: Tokens, advantage: Tokens, coefficient: Scalar) -> Tokens:
    """-(r A - lambda (r - 1)^2): no token is clipped, the further it has moved the harder it is pulled back.

    The gradient in log p is -r (A - 2 lambda (r - 1)): that of the surrogate at r = 1, none at r = 1 + A / (2 lambda),
    and towards r = 1 where A = 0.

    Args:
      ratio: r, current over old probability of the chosen token; differentiable.
      advantage: A, in reward units; carries no gradient.
      coefficient: lambda, in reward units, >= 0; 0 is `gate.unclipped`. Carries no gradient.

    Source: Luo et al. 2026, arXiv:2601.03320, as two third-party implementations have it.
    """
    advantage, coefficient = jax.lax.stop_gradient((advantage, coefficient))
    return -(ratio * advantage - coefficient * squared_change(ratio))
