"""TEMPORARY until the real one arrives."""
import dataclasses
import jax, jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    experts: int
    chosen: int
    inner: int
    normalised: bool = True


class Mixture(nnx.Module):
    def __init__(self, sizes, width, layers, *, rngs):
        self.sizes = sizes
        n = jax.nn.initializers.variance_scaling(1., "fan_in", "normal")
        self.router = nnx.Param(n(rngs.params(), (width, sizes.experts), jnp.float32))
        self.gate = nnx.Param(n(rngs.params(), (sizes.experts, width, sizes.inner), jnp.float32))
        self.up = nnx.Param(n(rngs.params(), (sizes.experts, width, sizes.inner), jnp.float32))
        self.down = nnx.Param(n(rngs.params(), (sizes.experts, sizes.inner, width), jnp.float32))

    def __call__(self, x, chosen=None):
        p = jax.nn.softmax(x.astype(jnp.float32) @ self.router[...], axis=-1)
        if chosen is None:
            chosen = jax.lax.top_k(p, self.sizes.chosen)[1]
        w = jnp.take_along_axis(p, chosen, axis=1)
        if self.sizes.normalised:
            w = w / w.sum(axis=1, keepdims=True)
        full = (jax.nn.one_hot(chosen, self.sizes.experts) * w[..., None]).sum(axis=1)
        h = jax.nn.silu(jnp.einsum("md,xdf->xmf", x, self.gate[...])) * jnp.einsum("md,xdf->xmf", x, self.up[...])
        return jnp.einsum("xmf,xfd,mx->md", h, self.down[...], full).astype(x.dtype), chosen


def load(expert, mask, experts):
    return {"routing/load_max": jnp.zeros(())}
