"""The definition, one step of time after the other."""
import jax
from jaxtyping import Array, Float


def discounted_scan(x: Float[Array, "N T"], factor: Float[Array, "N T"],
                    last: Float[Array, " N"]) -> Float[Array, "N T"]:
    """y_t = x_t + factor_t y_{t+1} with `last` after the end."""
    def earlier(later, now):
        x, factor = now
        y = x + factor * later
        return y, y

    return jax.lax.scan(earlier, last, (x.T, factor.T), reverse=True)[1].T
