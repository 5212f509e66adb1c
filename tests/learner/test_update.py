"""One update, on the policy of `recipes.toy`: its next token depends on the position alone."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_jax import masked
from rl_jax.advantage import group
from rl_jax.learner import assemble, update
from rl_jax.recipe import Recipe, Rollout, Schedule, replace
from rl_jax.recipes.baselines import grpo
from rl_jax.weighting import aggregate
from tests.learner import tiny
from tests.recipes import toy

G = 3


def in_its_group(policy, x):
    """A loss that compares with the group inside the loss itself, where micro-batches see only their own groups."""
    average = group.mean(masked.row_mean(x.rollout_logp, x.mask), x.group)
    return -(x.advantage + average[:, None]) * policy.logp, {"loss/average": jnp.broadcast_to(average[:, None], x.mask.shape)}


RECIPE = Recipe(rollout=Rollout(G), advantage=lambda x: group.leave_one_out(x.reward, x.group), loss=in_its_group,
                weighting=lambda x: aggregate.token_mean(x.mask))
OPTIMISER = optax.adam(0.05)


RECIPES = {"group": RECIPE, "grpo": grpo.grpo(G), "alone": replace(RECIPE, rollout=Rollout(1))}


@functools.cache
def batch(name="group"):
    return assemble.with_advantage(RECIPES[name], toy.experience(RECIPES[name]))


def updated(recipe, x, microbatches=1):
    start = toy.parameters()
    return jax.jit(update.make_update(recipe, toy.evaluate, OPTIMISER, microbatches))(start, OPTIMISER.init(start), x)


@pytest.mark.parametrize("name", RECIPES)
def test_microbatches_change_nothing(name):
    """Parameters after Adam and every metric, in 1, 2, 3 and 6 pieces: sequences differ in length, some failed."""
    whole = updated(RECIPES[name], batch(name))
    for pieces in (2, 3, 6):
        parts = updated(RECIPES[name], batch(name), pieces)
        tiny.same(parts[0], whole[0], atol=1e-6)
        tiny.same(parts[2], whole[2], rtol=1e-4, atol=1e-6)


def test_a_mean_over_microbatches_would_be_another_update():
    """The batch is one on which averaging token means would show."""
    lengths = np.asarray(batch().mask).sum(axis=1).reshape(2, -1).sum(axis=1)
    assert lengths.max() / lengths.min() > 1.2


def test_the_gradient_is_that_of_the_batch_loss():
    x = batch()

    def loss(parameters):
        return update.batch_loss(RECIPE, toy.evaluate(parameters, x), x)[0]

    found = jax.jit(update.make_gradient(RECIPE, toy.evaluate))(toy.parameters(), x)[0]
    tiny.same(found, jax.grad(loss)(toy.parameters()), rtol=1e-5, atol=1e-7)


def by_hand(recipe, x, key):
    """The same deal, cut here: weights of each minibatch are its own, groups are whole."""
    schedule, start = recipe.schedule, toy.parameters()
    state, parameters, one = OPTIMISER.init(start), start, jax.jit(update.make_update(recipe, toy.evaluate, OPTIMISER))
    size = toy.PROMPTS // schedule.minibatches
    for k in jax.random.split(key, schedule.epochs):
        order = np.asarray(jax.random.permutation(k, toy.PROMPTS))
        for i in range(schedule.minibatches):
            prompts = order[i * size:(i + 1) * size]
            rows = (prompts[:, None] * G + np.arange(G)).reshape(-1)
            part = jax.tree.map(lambda a, rows=rows: a[rows], dataclasses.replace(x, prompts=None))
            part = dataclasses.replace(part, prompts=jax.tree.map(lambda a, p=prompts: a[p], x.prompts),
                                       group=assemble.group_ids(part.failed, G))
            parameters, state, _ = one(parameters, state, part)
    return parameters, state


@pytest.mark.parametrize(("epochs", "minibatches"), [(2, 1), (1, 3), (2, 2)])
def test_epochs_and_minibatches_are_a_loop_over_parts(epochs, minibatches):
    recipe, key, start = replace(RECIPE, schedule=Schedule(epochs, minibatches)), jax.random.key(3), toy.parameters()
    x = dataclasses.replace(batch(), coefficients=None)
    passes = jax.jit(update.make_passes(recipe, toy.evaluate, OPTIMISER))
    parameters, state, metrics = passes(start, OPTIMISER.init(start), x, key)
    expected, expected_state = by_hand(recipe, x, key)
    assert int(optax.tree.get(state, "count")) == epochs * minibatches
    tiny.same(parameters, expected, atol=1e-6)
    tiny.same(state, expected_state, atol=1e-6)
    assert metrics["gradient/skipped"] == 0


def test_minibatches_of_microbatches():
    recipe, start, x = replace(RECIPE, schedule=Schedule(1, 2)), toy.parameters(), batch()
    found = [jax.jit(update.make_passes(recipe, toy.evaluate, OPTIMISER, pieces))(
        start, OPTIMISER.init(start), x, jax.random.key(0)) for pieces in (1, 3)]
    tiny.same(found[1][0], found[0][0], atol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(bad):
    x = batch()
    given = {"advantage": x.advantage.at[1, 0].set(bad)}
    assert x.mask[1, 0]
    start = toy.parameters()
    parameters, state, metrics = updated(RECIPE, dataclasses.replace(x, given=given))
    tiny.same(parameters, start)
    tiny.same(state, OPTIMISER.init(start))
    assert metrics["gradient/skipped"] == 1 and not np.isfinite(metrics["gradient/norm"])


def test_a_skipped_minibatch_does_not_stop_the_others():
    """One bad prompt of six, in three minibatches: two of them learn."""
    recipe, start, x = replace(RECIPE, schedule=Schedule(1, 3)), toy.parameters(), batch()
    x = dataclasses.replace(x, given={"advantage": x.advantage.at[1, 0].set(jnp.nan)})
    _, state, metrics = jax.jit(update.make_passes(recipe, toy.evaluate, OPTIMISER))(
        start, OPTIMISER.init(start), x, jax.random.key(0))
    assert metrics["gradient/skipped"] == 1 and int(optax.tree.get(state, "count")) == 2


def test_batch_loss_is_jittable_and_runs_every_slot():
    """-sum A logp / tokens of rewards 1 and 0 in one group, by hand; the recipe's extras are token means."""
    recipe = replace(RECIPE, loss=lambda policy, x: (-x.advantage * policy.logp, {"loss/entropy": policy.entropy}))
    x = toy.experience(recipe)
    policy = toy.policy(x)
    loss, extras = jax.jit(lambda policy, x: update.batch_loss(recipe, policy, x))(policy, x)
    mask, reward, ids = (np.asarray(a) for a in (x.mask, x.reward, x.group))
    total = 0.0
    for n in range(len(reward)):
        others = [reward[m] for m in range(len(reward)) if ids[m] == ids[n] and m != n]
        advantage = reward[n] - np.mean(others) if others else reward[n]
        total -= advantage * np.asarray(policy.logp)[n, mask[n]].sum()
    np.testing.assert_allclose(loss, total / mask.sum(), rtol=1e-5)
    np.testing.assert_allclose(extras["loss/entropy"], np.asarray(policy.entropy)[mask].mean(), rtol=1e-5)


def test_a_batch_without_any_chosen_token_changes_nothing():
    x = dataclasses.replace(batch(), mask=jnp.zeros_like(batch().mask))
    parameters, _, metrics = updated(RECIPE, x)
    tiny.same(parameters, toy.parameters())
    assert metrics["gradient/norm"] == 0 and metrics["loss/total"] == 0
