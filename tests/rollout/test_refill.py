"""Few slots draw what the padded loop draws: the same random numbers, answer by answer."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.models.network import Network
from rl_jax.models.mixture import Experts
from rl_jax.models.shape import Shape
from rl_jax.recipe import Rollout
from rl_jax.rollout import decode, refill
from rl_jax.types import Prompts
from tests.models import oracle
from tests.rollout import test_decode

V, S, T = 11, 4, 7
ENDS = {"completion_length": T, "stop_ids": (1, 5), "pad_id": 0}
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


@pytest.mark.parametrize("setting", [{"top_k": 3}, {"top_p": 0.7, "temperature": 0.8}, {"temperature": 0.0}], ids=str)
def test_truncated_and_greedy_answers_are_the_same(setting):
    found, expected = both(3, 4, Rollout(3, **setting))
    assert (expected.support is not None) == Rollout(**setting).truncated
    assert_same(found, expected)


MIXED = dataclasses.replace(DENSE, mixture=Experts(experts=6, chosen=2, inner=8, normalised=True), dense_layers=(1,))


@pytest.mark.parametrize("shape", [MIXED, dataclasses.replace(DENSE, scan_layers=True)], ids=["mixture", "scanned"])
def test_every_kind_of_network_draws_the_same(shape):
    network = Network(shape)
    found, expected = both(4, 5, Rollout(4), network, oracle.perturbed(network.initialise(jax.random.key(1))))
    assert (expected.routes is not None) == (shape.mixture is not None)
    assert_same(found, expected)


def test_an_answer_keeps_to_its_own_budget():
    """Cut off there, it has not finished; one that ends with its last token has."""
    rng = np.random.default_rng(0)
    budget = jnp.asarray(rng.integers(1, T + 3, (4, 3)), jnp.int32)  # also longer than the completion
    found, expected = both(5, 4, Rollout(3), budget=budget)
    free = both(5, 4, Rollout(3))[1]
    mask = np.asarray(free.mask) & (np.arange(T) < np.asarray(budget).reshape(-1, 1))
    ended = np.isin(np.where(mask, np.asarray(free.tokens), -1), ENDS["stop_ids"]).any(axis=1)
    assert (mask != np.asarray(free.mask)).any() and ended.any() and not ended.all()
    np.testing.assert_array_equal(expected.mask, mask)
    np.testing.assert_array_equal(expected.tokens, np.where(mask, free.tokens, ENDS["pad_id"]))
    np.testing.assert_array_equal(expected.finished, ended)
    assert_same(found, expected)


class Watched(Network):
    """Tells how many rows each decode step has."""

    def decode(self, parameters, prompt_cache, cache, token, lengths, now, table):
        jax.debug.callback(lambda n: ROWS.append(n.size), now)
        return super().decode(parameters, prompt_cache, cache, token, lengths, now, table)


ROWS = []


def test_steps_are_as_many_as_the_slots_need():
    """One slot: every token is a step. As many slots as answers: the longest answer decides."""
    for slots in (1, 6):
        ROWS.clear()
        found = jax.jit(refill.make_rollout(Watched(DENSE), Rollout(2), slots=slots, **ENDS))(
            PARAMETERS, prompts(3), decode.make_uniforms(jax.random.key(2), 3, 2, T), jnp.int32(0))
        length = np.asarray(found.mask.sum(axis=1))
        jax.effects_barrier()
        assert sum(ROWS) == (length.sum() if slots == 1 else length.max() * slots)


def test_replicas_wait_for_each_other_and_change_nothing():
    """Under a named axis all replicas go through the same loops, and no replica sees the others."""
    draw = refill.make_rollout(NETWORK, Rollout(3), slots=4, axis="seed", **ENDS)
    numbers = jnp.stack([decode.make_uniforms(jax.random.key(i), 4, 3, T) for i in range(3)]).at[2].set(0.0)
    run = jax.vmap(draw, (None, None, 0, None), axis_name="seed")
    replicas = jax.jit(run)(PARAMETERS, prompts(4), numbers, jnp.int32(0))
    alone = jax.jit(decode.make_rollout(NETWORK, Rollout(3), **ENDS))
    for i in range(3):
        assert_same(jax.tree.map(lambda a, i=i: a[i], replicas), alone(PARAMETERS, prompts(4), numbers[i], jnp.int32(0)))
    program = jax.make_jaxpr(run)(PARAMETERS, prompts(4), numbers, jnp.int32(0)).jaxpr
    loops = [q for q in test_decode.equations(program) if q.primitive.name == "while"]
    assert len(loops) == 2  # a batched predicate would select every cache
    assert all(loop.params["cond_jaxpr"].out_avals[0].shape == () for loop in loops)


def test_other_lengths_do_not_retrace():
    run = jax.jit(refill.make_rollout(NETWORK, Rollout(3), slots=4, **ENDS))
    for seed in range(2):
        run(PARAMETERS, prompts(4), decode.make_uniforms(jax.random.key(seed), 4, 3, T), jnp.int32(seed))
    assert run._cache_size() == 1


def test_more_slots_than_answers_are_refused():
    with pytest.raises(ValueError, match="13 slots for 4 prompts x 3 samples = 12 answers"):
        both(13, 4, Rollout(3))
