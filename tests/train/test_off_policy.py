"""How much reward staleness costs on `chain`, with and without the weights that correct for it. Slow: CI runs it by itself."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax import recipe as recipes
from rl_jax.ahead import Asynchronous
from rl_jax.experiment import Phase, Scale
from rl_jax.learner import roles
from rl_jax.learner.optimiser import Optimiser
from rl_jax.models.network import Network
from rl_jax.models.shape import Shape
from rl_jax.recipes.baselines import sft
from rl_jax.recipes.weighting import truncated_importance
from rl_jax.tasks.toys import chain
from rl_jax.train import asynchronous
from rl_jax.train.loop import PhaseLoop
from rl_jax.weighting import aggregate

TASK = chain.chain(terms=3, modulus=3, train_size=80, validation_size=0, held_out_size=0)
NETWORK = Network(Shape(vocabulary=TASK.tokenizer.size, width=32, layers=1, heads=2, key_heads=1, head_size=16, inner=64))
STEPS, SEEDS, LARGE = 100, 6, 16
CORRECTED = truncated_importance.truncated_importance(8)
UNCORRECTED = recipes.replace(CORRECTED, weighting=lambda x: aggregate.sequence_mean_token_mean(x.mask))
RECIPES = {"corrected": CORRECTED, "uncorrected": UNCORRECTED}


@functools.cache
def warm_start():
    scale = Scale(steps=250, prompts_per_step=32)
    one = PhaseLoop(Phase(sft.sft(), Optimiser(learning_rate=2e-3), scale), TASK, NETWORK)
    *_, last = one.ticks(one.initial_state(jax.random.key(0)), one.stream(0))
    return roles.policy(last.state)


@functools.cache
def programs(name):
    """Compiled once, however far ahead they draw."""
    scale = Scale(steps=STEPS, prompts_per_step=32, program="async")
    one = PhaseLoop(Phase(RECIPES[name], Optimiser(learning_rate=5e-4), scale), TASK, NETWORK, ahead=Asynchronous(staleness=LARGE))
    return one, one.work(one.initial_state(jax.random.key(0)))


@functools.cache
def reward(name, staleness):
    """Mean over the last fifth of the steps, of each seed: all have drawn as many samples."""
    one, work = programs(name)
    found = []
    for seed in range(SEEDS):
        state = one.initial_state(jax.random.key(100 + seed), jax.tree.map(jnp.copy, warm_start()))
        ticks = asynchronous.fixed(work, state, one.stream(seed), staleness=staleness,
                                   drawn_by=asynchronous.versions(STEPS, staleness))
        found.append([float(metrics["reward/mean"]) for _, _, metrics, *_ in ticks][-STEPS // 5:])
    print(f"{name}, staleness {staleness}: {np.mean(found):.3f} +- {error(np.mean(found, axis=1)):.3f}")
    return np.mean(found, axis=1)


def error(values):
    """The standard error of their mean."""
    return values.std(ddof=1) / len(values)**0.5


def lost(name, staleness):
    """How much less reward than synchronously, in standard errors of the difference, and in reward."""
    stale, synchronous = reward(name, staleness), reward("corrected", 0)
    less = synchronous.mean() - stale.mean()
    return less / np.hypot(error(stale), error(synchronous)), less


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [1, 2])
def test_corrected_a_little_staleness_costs_nothing(staleness):
    errors, less = lost("corrected", staleness)
    assert abs(errors) < 3 and abs(less) < 0.03
    assert reward("corrected", 0).mean() > 0.6


@pytest.mark.slow
def test_uncorrected_much_of_it_costs_reward():
    errors, less = lost("uncorrected", LARGE)
    assert errors > 3 and less > 0.1
    assert less > 2 * lost("corrected", LARGE)[1], "which the weights spare"
