"""Few slots draw what the padded loop draws: the same random numbers, answer by answer."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.models.network import Network
from rl_jax.models.shape import Shape
from rl_jax.recipe import Rollout
from rl_jax.rollout import decode, lanes, refill
from rl_jax.types import Prompts
from tests.models import oracle

V, S, T = 11, 4, 7
PAD, ENDS = 0, {"completion_length": T, "stop_ids": (1, 5), "pad_id": 0}
DENSE = Shape(vocabulary=V, width=16, layers=2, heads=2, key_heads=1, head_size=8, inner=24)
NETWORK = Network(DENSE)
PARAMETERS = oracle.perturbed(NETWORK.initialise(jax.random.key(0)))


def prompts(count):
    rng = np.random.default_rng(count)
    zero = jnp.zeros(count, jnp.int32)
    return Prompts(tokens=jnp.asarray(rng.integers(2, V, (count, S)), jnp.int32),
                   lengths=jnp.asarray(rng.integers(1, S + 1, count), jnp.int32), example=zero, domain=zero, facts={})


def both(slots, count, rollout, network=NETWORK, parameters=PARAMETERS, budget=None):
    """(by slots, by the padded loop)"""
    given = (parameters, prompts(count), decode.make_uniforms(jax.random.key(2), count, rollout.group_size, T),
             jnp.int32(3), None, budget)
    return (jax.jit(refill.make_rollout(network, rollout, slots=slots, **ENDS))(*given),
            jax.jit(decode.make_rollout(network, rollout, **ENDS))(*given))


def assert_same(found, expected):
    """Whatever may be read of two batches of samples: behind the mask nobody reads supports and routes."""
    mask = np.asarray(expected.mask)
    for name in ("tokens", "mask", "finished", "version", "prompt_routes"):
        if vars(expected)[name] is not None:
            np.testing.assert_array_equal(vars(found)[name], vars(expected)[name], err_msg=name)
    for name in ("rollout_logp", "rollout_entropy"):
        np.testing.assert_allclose(vars(found)[name], vars(expected)[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for name in ("support", "routes"):
        if vars(expected)[name] is not None:
            np.testing.assert_array_equal(vars(found)[name][mask], vars(expected)[name][mask], err_msg=name)


@pytest.mark.parametrize(("slots", "count", "group"), [(1, 3, 2), (2, 1, 5), (4, 5, 4), (5, 4, 3), (6, 3, 2)])
def test_slots_draw_what_the_padded_loop_draws(slots, count, group):
    found, expected = both(slots, count, Rollout(group))
    assert len(set(np.asarray(expected.mask.sum(axis=1)))) > 2
    assert_same(found, expected)
