"""The shape that a batch is learned from changes no recipe's gradient: cut to its longest answer, or several in a row."""
import dataclasses

import jax
import jax.numpy as jnp
import pytest

from rl_jax import sections
from rl_jax.batching import Batching
from rl_jax.learner import assemble, update
from rl_jax.models import packing
from rl_jax.types import Evaluated
from tests.learner import tiny
from tests.recipes import toy

NAMES = sections.names("rl_jax.recipes")
# Between them: every kind of stage, a critic, several turns, several terms, resampled rows, a group of one.
FEW = ("baselines.grpo", "baselines.ppo", "baselines.sft", "selection.pf_ppo")
HALF = toy.TIME // 2


def evaluate(parameters, x):
    """A policy whose next token depends on its position in its answer alone, and so does its value."""
    _, position = packing.fed(jnp.zeros(x.tokens.shape[0], jnp.int32), x.tokens, x.segment)
    logp = jax.nn.log_softmax(parameters["logits"])[jnp.broadcast_to(position, x.tokens.shape)]
    chosen = jnp.take_along_axis(logp, x.tokens[:, :, None], axis=2)[:, :, 0]
    values = jnp.broadcast_to(parameters["values"][position], x.tokens.shape)
    return Evaluated(logp=chosen, entropy=-(jnp.exp(logp) * logp).sum(axis=2), values=values)


def holds(name):
    recipe = sections.find("recipe", "rl_jax.recipes", name)()
    x = toy.experience(recipe)
    short = (jnp.arange(toy.TIME) < HALF)[None, :]
    x = dataclasses.replace(x, mask=x.mask & short, fresh=x.fresh & short)
    size = recipe.group_size
    shapes = [Batching(), Batching(length_buckets=2), Batching(packed_rows=(size + 1) // 2)][:2 + (size > 1)]

    @jax.jit
    def found(parameters, x):
        x = assemble.with_advantage(recipe, x)
        return [update.make_gradient(recipe, evaluate, batching=shape)(parameters, x) for shape in shapes]

    whole, *others = found(toy.parameters(), x)
    for gradient, metrics in others:
        assert metrics.pop("batch/positions") < 1 and metrics.pop("batch/packed", 1) == 1
        tiny.same((gradient, metrics), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FEW)
def test_the_gradient_and_the_metrics_are_those_of_whole_rows(name):
    holds(name)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FEW])
def test_and_so_for_all_others(name):
    holds(name)
