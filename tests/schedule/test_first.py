"""The first batch's mean, remembered."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rl_jax.learner import assemble
from rl_jax.schedule import first

MASK = jnp.array([[True, True, False], [True, False, False]])


def batch(entropy, mask=MASK):
    x = assemble.of_arrays(jnp.zeros((2, 3)), mask, jnp.zeros(2), jnp.arange(2))
    return dataclasses.replace(x, rollout_entropy=jnp.where(mask, entropy, jnp.nan))


def test_the_first_batch_with_tokens_is_remembered():
    made = first.token_mean(lambda x: x.rollout_entropy)
    update = jax.jit(lambda state, x: made.update(state, x, None, {}))
    state = made.init(64)
    assert made.read(state) == jnp.inf
    state = update(state, batch(jnp.zeros((2, 3)), jnp.zeros((2, 3), bool)))
    assert made.read(state) == jnp.inf
    for entropy in (jnp.array([[0.1, 0.5, 9.0], [0.9, 9.0, 9.0]]), jnp.full((2, 3), 7.0)):
        new = update(state, batch(entropy))
        assert (new.shape, new.dtype) == (state.shape, state.dtype)
        state = new
        np.testing.assert_allclose(made.read(state), (0.1 + 0.5 + 0.9) / 3, rtol=1e-6)
