"""The learning half of a step in every shape that a batch may take: the same gradient, and the shape that was meant."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax import recipe as recipes
from rl_jax.batching import Batching
from rl_jax.learner import lengths, step
from rl_jax.learner.lengths import Form
from rl_jax.models.mixture import Experts
from rl_jax.models.network import Network
from rl_jax.recipes.baselines import grpo, ppo
from rl_jax.recipes.weighting import minirl_routing_replay
from rl_jax.tasks import judge
from rl_jax.tasks.toys import addmod
from rl_jax.types import Samples, Verdict
from tests.learner import tiny
from tests.models import oracle

TASK = addmod.addmod(4, validation_size=0, held_out_size=0)
P, G, T = 2, 4, 8
NETWORK = tiny.network(TASK)
ONE_LONG = [1, 3, 2, 2, 8, 1, 2, 2]
RECIPE = recipes.replace(grpo.grpo(G, beta=0.0), reward=lambda x: (x.seed % 7).astype(jnp.float32))


def batch(answers, network=NETWORK):
    """Prompts, samples with answers of these lengths, and their verdict; one token was not chosen."""
    rng = np.random.default_rng(0)
    shape, prompts = (P * G, T), tiny.prompts(TASK, P)
    mask = (np.arange(T) < np.asarray(answers)[:, None]) & ((np.arange(T) != 0) | (np.asarray(answers) != 3)[:, None])
    logp = jnp.asarray(-np.abs(rng.normal(size=shape)), jnp.float32)
    experts = {}
    if network.shape.mixtures:
        mixture = network.shape.mixture
        routes = rng.permuted(np.tile(np.arange(mixture.experts), (P * G + P, 64, network.shape.mixtures, 1)), axis=3)
        routes = jnp.asarray(routes[..., :mixture.chosen], jnp.uint8)
        experts = {"routes": routes[:P * G, :T], "prompt_routes": routes[P * G:, :prompts.tokens.shape[1]]}
    samples = Samples(tokens=jnp.asarray(rng.integers(0, TASK.tokenizer.size, shape), jnp.int32), mask=jnp.asarray(mask),
                      rollout_logp=logp, rollout_entropy=-logp, finished=jnp.ones(P * G, bool),
                      version=jnp.zeros(P * G, jnp.int32), **experts)
    verdict = Verdict(score=jnp.asarray(rng.random(P * G), jnp.float32), parts={}, failed=jnp.zeros(P * G, bool))
    return prompts, samples, verdict


def learner(recipe, batching, network=NETWORK, microbatches=1):
    """answers -> (gradient, metrics, experience), compiled once for all lengths."""
    optimiser = tiny.recorder()
    pieces = step.make_pieces(recipe, TASK, network, optimiser, judge.pure(TASK.verifier), microbatches=microbatches,
                              batching=batching)
    weights = jax.tree.map(lambda a: a / 2, oracle.perturbed(network.initialise(jax.random.key(5))))
    state = step.initial_state(recipe, network, optimiser, jax.random.key(1), weights)
    run = jax.jit(pieces.learn)

    def learn(answers):
        after, metrics, x = run(state, *batch(answers, network))
        return after.optimiser, metrics, {name: x.given[name] for name in x.given}

    return learn


def same(found, expected):
    """All but what says in which shape it was found, which comes back."""
    (gradient, metrics, given), whole = found, expected[1]
    own = {name: metrics[name] for name in metrics if name.startswith("batch/")}
    tiny.same((gradient, {name: metrics[name] for name in whole}, given), expected, rtol=2e-4, atol=2e-5)
    assert set(metrics) - set(whole) == set(own)
    return {name: float(value) for name, value in own.items()}


def test_shapes_stand_in_the_order_of_their_positions():
    assert lengths.forms(Batching(), 4, 10) == (Form(10),)
    assert lengths.forms(Batching(length_buckets=3), 4, 10) == (Form(3), Form(5), Form(10))
    assert lengths.forms(Batching(length_buckets=9), 4, 3) == (Form(1), Form(2), Form(3))
    found = lengths.forms(Batching(length_buckets=3, packed_rows=2), 4, 8)
    assert found == (Form(2), Form(4), Form(8, packed=2), Form(8))
    assert lengths.forms(Batching(packed_rows=4), 4, 8) == lengths.forms(Batching(packed_rows=4), 1, 8) == (Form(8),)


def test_one_program_learns_in_the_shape_that_fits():
    whole = learner(RECIPE, Batching())
    both = learner(RECIPE, Batching(length_buckets=2, packed_rows=1))
    fits = {"packed": ([1, 1, 5, 0, 3, 1, 2, 2], 1 / 4, 1), "cut": ([4, 4, 4, 0, 4, 1, 1, 1], 1 / 2, 0),
            "whole": (ONE_LONG, 1, 0), "nothing": ([0] * 8, 1 / 4, 1)}
    for name, (answers, positions, packed) in fits.items():
        assert same(both(answers), whole(answers)) == {"batch/positions": positions, "batch/packed": packed}, name


def test_every_microbatch_has_its_own_shape():
    whole, cut = (learner(RECIPE, batching, microbatches=2) for batching in (Batching(), Batching(length_buckets=2)))
    assert same(cut(ONE_LONG), whole(ONE_LONG)) == {"batch/positions": (1 / 2 + 1) / 2}


def mixed():
    shape = dataclasses.replace(NETWORK.shape, mixture=Experts(experts=6, chosen=2, inner=8))
    return Network(shape)


OTHERS = {
    "a critic, two minibatches": lambda: (
        recipes.replace(ppo.ppo(epochs=1, minibatches=2), rollout=recipes.Rollout(G)), NETWORK),
    "moments": lambda: (recipes.replace(RECIPE, models=("reference", "moments")), NETWORK),
    "experts of the rollout": lambda: (minirl_routing_replay.minirl_routing_replay(G), mixed()),
    "experts of the old policy": lambda: (recipes.replace(RECIPE, routing="old"), mixed()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_else_the_networks_are_asked(name):
    recipe, network = OTHERS[name]()
    whole, both = (learner(recipe, batching, network) for batching in (
        Batching(), Batching(length_buckets=2, packed_rows=1)))
    for answers, packed in (([3, 4, 2, 2, 3, 1, 4, 1], 0), ([1, 1, 5, 0, 3, 1, 2, 2], 1)):
        positions = 1 / 4 if packed else 1 / 2
        assert same(both(answers), whole(answers)) == {"batch/positions": positions, "batch/packed": packed}
