"""FiberPO, APC-Obj, R2VPO and ETR as whole algorithms: loops over Python floats, from their formula sheets."""
import dataclasses
import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_jax.learner import assemble, step, update
from rl_jax.loss import gate, ratio
from rl_jax.recipe import replace
from rl_jax.recipes.baselines import grpo
from rl_jax.recipes.loss import apc_obj, etr, fiberpo, fiberpo_domain, r2vpo
from rl_jax.tasks.toys import addmod
from tests.learner import tiny
from tests.recipes import test_oracles, toy

FOUR = {"group_size": 4}


class Batch(test_oracles.Batch):
    """The toy batch, of which the policy has moved `far` times as far, and each answer by `common` nats per token."""

    def __init__(self, recipe, far=1.0, common=0.0):
        super().__init__(recipe)
        x, policy = self.arrays
        shift = common * jnp.cos(jnp.arange(x.mask.shape[0]))[:, None]
        policy = dataclasses.replace(policy, logp=x.rollout_logp + far * (policy.logp - x.rollout_logp) + shift)
        self.arrays = x, policy
        self.of["logp"] = np.asarray(policy.logp, np.float64)
        self.domain = np.asarray(x.domain)

    def away(self, i, t):
        return self.of["logp"][i, t] - self.of["old"][i, t]

    def ratio(self, i, t):
        return math.exp(self.away(i, t))

    def credit(self, i):
        return test_oracles.zscore(self, i, self.score)

    def channel(self, i, sign):
        return sum(max(sign * self.away(i, t), 0.0) for t in self.tokens(i)) / max(len(self.tokens(i)), 1)

    def residual(self, i, t, bound):
        sign = 1 if self.away(i, t) >= 0 else -1
        return (clip(self.away(i, t) - sign * self.channel(i, sign), bound)
                + clip(sign * self.channel(i, -sign), bound))

    def mean_of_token_means(self, loss):
        return sum(sum(loss(i, t) for t in self.tokens(i)) / max(len(self.tokens(i)), 1)
                   for i in self.rows) / len(self.rows)


def clip(a, bound):
    return min(max(a, -bound), bound)


def rollback(a, budget, count):
    if abs(a) <= budget:
        return a
    return math.copysign(max((count + 1) * budget - count * abs(a), 0.0), a)


def oracle_fiberpo(batch, positive=0.12, negative=0.08, bound=0.2):
    def loss(i, t):
        length = len(batch.tokens(i))
        weight = rollback(batch.channel(i, 1), positive, length) - rollback(batch.channel(i, -1), negative, length)
        return -math.exp(weight + batch.residual(i, t, bound)) * batch.credit(i)

    return batch.mean_of_token_means(loss)


def oracle_fiberpo_domain(batch, of_domain=0.1, of_group=0.15, of_answer=0.2, of_token=0.2):
    groups = {}
    for i in batch.rows:
        if batch.tokens(i):
            groups.setdefault(int(batch.group[i]), []).append(i)

    def weight(i, sign):
        mine, length = groups[int(batch.group[i])], len(batch.tokens(i))
        means = {g: statistics.mean(batch.channel(j, sign) for j in rows) for g, rows in groups.items()
                 if batch.domain[rows[0]] == batch.domain[i]}
        domain, own = statistics.mean(means.values()), means[int(batch.group[i])]
        return sign * (rollback(domain, of_domain, len(means)) + rollback(own - domain, of_group, len(mine))
                       + rollback(batch.channel(i, sign) - own, of_answer, length))

    weights = {i: weight(i, 1) + weight(i, -1) for i in batch.rows if batch.tokens(i)}
    return batch.mean_of_token_means(
        lambda i, t: -math.exp(weights[i] + batch.residual(i, t, of_token)) * batch.credit(i))


def oracle_apc_obj(batch, limit=0.2):
    def loss(i, t):
        others = sum(abs(batch.ratio(i, j) - 1) for j in batch.tokens(i) if j != t)
        room = max(0.0, len(batch.tokens(i)) * limit - others)
        return -(1 + clip(batch.ratio(i, t) - 1, room)) * batch.credit(i)

    return batch.mean_of_token_means(loss)


def oracle_r2vpo(batch, price=0.04):
    return batch.token_mean(
        lambda i, t: -(batch.ratio(i, t) * batch.credit(i) - price * (batch.ratio(i, t) - 1) ** 2))


def oracle_etr(batch, band=0.2, micro=0.5, macro=0.5, highest=1.0, beta=0.04):
    def loss(i, t):
        spread = statistics.pvariance([batch.score[j] for j in batch.peers(i)]) / (highest**2 / 4)
        width = band * (1 + micro * math.tanh(abs(batch.credit(i)))) * (1 + macro * spread)
        clipped = batch.clipped(i, t, batch.credit(i), min(width, 0.99), width)
        away = batch.of["logp"][i, t] - batch.of["reference_logp"][i, t] if beta else 0.0
        return clipped + beta * (math.exp(-away) + away - 1)

    return batch.mean_of_token_means(loss)


@pytest.mark.parametrize("recipe, oracle, moved", [
    (fiberpo.fiberpo(), oracle_fiberpo, (1, 0.1)),
    (fiberpo.fiberpo(positive=0.3, negative=0.2, residual=0.05),
     functools.partial(oracle_fiberpo, positive=0.3, negative=0.2, bound=0.05), (0.5, 0.3)),
    (fiberpo_domain.fiberpo_domain(), oracle_fiberpo_domain, (1, 0.2)),
    (fiberpo_domain.fiberpo_domain(of_domain=0.15, of_group=0.02, of_answer=0.05, of_token=0.1),
     functools.partial(oracle_fiberpo_domain, of_domain=0.15, of_group=0.02, of_answer=0.05, of_token=0.1), (1, 0.1)),
    (apc_obj.apc_obj(), oracle_apc_obj, (1, 0)),
    (apc_obj.apc_obj(limit=0.5), functools.partial(oracle_apc_obj, limit=0.5), (2, 0)),
    (r2vpo.r2vpo(), oracle_r2vpo, (2, 0)),
    (r2vpo.r2vpo(initial=0.7), functools.partial(oracle_r2vpo, price=0.7), (1, 0)),
    (etr.etr(), oracle_etr, (1.5, 0)),
    (etr.etr(clip=0.1, micro=2.0, macro=1.0, highest=1.5, beta=0.0),
     functools.partial(oracle_etr, band=0.1, micro=2.0, macro=1.0, highest=1.5, beta=0.0), (1.5, 0)),
], ids=lambda value: getattr(value, "name", None))
def test_the_loss_is_that_of_the_formula_sheet(recipe, oracle, moved):
    batch = Batch(recipe, *moved)
    x, policy = batch.arrays
    loss, _ = jax.jit(lambda policy, x: update.batch_loss(recipe, policy, x))(policy, x)
    np.testing.assert_allclose(loss, oracle(batch), rtol=1e-5, atol=1e-6)


def value_and_slope(recipe, x, policy):
    return jax.jit(jax.value_and_grad(
        lambda logp: update.batch_loss(recipe, dataclasses.replace(policy, logp=logp), x)[0]))(policy.logp)


def surrogate(of):
    """The recipe's credit and weights with the ratio and no gate."""
    return replace(of, loss=lambda policy, x: gate.unclipped(ratio.per_token(policy.logp, x.rollout_logp), x.advantage),
                   models=())


HUGE = 1e3
OPEN = [fiberpo.fiberpo(**FOUR, positive=HUGE, negative=HUGE, residual=HUGE),
        fiberpo_domain.fiberpo_domain(**FOUR, of_domain=HUGE, of_group=HUGE, of_answer=HUGE, of_token=HUGE),
        apc_obj.apc_obj(**FOUR, limit=HUGE), r2vpo.r2vpo(**FOUR, initial=0.0)]


@pytest.mark.parametrize("recipe", OPEN, ids=lambda recipe: recipe.name)
def test_without_budget_or_price_it_is_the_surrogate_without_a_gate(recipe):
    x, policy = Batch(recipe, 1, 0.2).arrays
    found, expected = value_and_slope(recipe, x, policy), value_and_slope(surrogate(recipe), x, policy)
    assert np.abs(expected[1]).max() > 1e-3
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", [
    fiberpo.fiberpo(**FOUR), fiberpo_domain.fiberpo_domain(**FOUR), apc_obj.apc_obj(**FOUR), r2vpo.r2vpo(**FOUR),
    etr.etr(**FOUR, beta=0.0)], ids=lambda recipe: recipe.name)
def test_where_the_policy_has_not_moved_the_gradient_is_the_surrogates(recipe):
    x, policy = Batch(recipe, 0).arrays
    found, expected = value_and_slope(recipe, x, policy), value_and_slope(surrogate(recipe), x, policy)
    assert np.abs(expected[1]).max() > 1e-3
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_etr_that_is_not_elastic_is_grpo(beta):
    one, other = etr.etr(**FOUR, micro=0.0, macro=0.0, beta=beta), grpo.grpo(**FOUR, beta=beta)
    x, policy = Batch(other, 1.5).arrays
    for found, expected in zip(value_and_slope(one, x, policy), value_and_slope(other, x, policy), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_fiberpo_of_equal_rewards_teaches_nothing():
    for recipe in (fiberpo.fiberpo(**FOUR), fiberpo_domain.fiberpo_domain(**FOUR), apc_obj.apc_obj(**FOUR)):
        x, policy = Batch(recipe).arrays
        x = dataclasses.replace(x, score=jnp.ones_like(x.score), reward=jnp.where(x.failed, 0.0, 1.0))
        np.testing.assert_array_equal(value_and_slope(recipe, x, policy)[1], 0.0)


def test_r2vpo_pulls_back_what_has_no_credit():
    x, policy = Batch(r2vpo.r2vpo(**FOUR)).arrays
    x = dataclasses.replace(x, score=jnp.zeros_like(x.score), reward=jnp.zeros_like(x.reward))
    slope = np.asarray(value_and_slope(r2vpo.r2vpo(**FOUR), x, policy)[1])
    np.testing.assert_array_equal(np.sign(slope), np.sign(policy.logp - x.rollout_logp) * x.mask)


def test_answers_teach_each_other_within_a_domain_only():
    """The four-level gate: an answer's tokens move the loss of the prompts beside its own; FiberPO's do not."""
    for recipe, crosses in ((fiberpo_domain.fiberpo_domain(**FOUR), True), (fiberpo.fiberpo(**FOUR), False)):
        x, policy = Batch(recipe, 0.5, 0.3).arrays
        assert recipe.indivisible == crosses
        x = assemble.with_advantage(recipe, x)

        def of_prompt(logp, recipe=recipe, x=x, policy=policy):
            loss = recipe.loss(dataclasses.replace(policy, logp=logp), x)
            return jnp.where(x.mask, loss * jnp.cos(jnp.arange(loss.size)).reshape(loss.shape), 0.0)[4:8].sum()

        slope = np.abs(jax.jit(jax.grad(of_prompt))(policy.logp)).sum(axis=1)
        domain, own = np.asarray(x.domain) == x.domain[4], np.arange(slope.size) // 4 == 1
        assert (slope[~domain] == 0).all() and slope[own].max() > 0
        assert (slope[domain & ~own] > 0).any() == crosses


def test_the_price_of_variance_follows_the_variance_that_the_update_met():
    """Two steps on one batch: the first meets a ratio of 1, the second the ratio that the first one made."""
    recipe = r2vpo.r2vpo(**FOUR, target=1e-3, rate=2.0, epochs=2, replay=0)
    control = recipe.schedule.controls["price"]
    x, start = toy.experience(recipe), toy.parameters()
    x = dataclasses.replace(x, rollout_logp=toy.evaluate(start, x).logp)
    x = assemble.with_advantage(recipe, x)
    passes = update.make_passes(recipe, toy.evaluate, optax.sgd(0.5))
    _, _, metrics = jax.jit(passes)(start, optax.sgd(0.5).init(start), x, jax.random.key(0))
    first = jax.grad(lambda p: update.weighted_loss(
        recipe, toy.evaluate(p, x), x, recipe.weighting(x), update.token_share(x))[0])(start)
    moved = jax.tree.map(lambda p, g: p - 0.5 * g, start, first)
    change = np.asarray(toy.evaluate(moved, x).logp - x.rollout_logp, np.float64)
    met = [(math.exp(change[i, t]) - 1) ** 2 for i, t in zip(*np.nonzero(np.asarray(x.mask)), strict=True)]
    np.testing.assert_allclose(metrics["ratio_variance"], statistics.mean(met) / 2, rtol=1e-4)
    price = control.update(control.init(0), x, None, metrics)
    np.testing.assert_allclose(price, max(0.0, 0.04 + 2.0 * (statistics.mean(met) / 2 - 1e-3)), rtol=1e-4)
    assert control.read(price) != np.float32(0.04)


def test_a_real_step_of_r2vpo_learns_again_from_the_batch_before_and_prices_what_it_met():
    task, optimiser = addmod.addmod(4, validation_size=0, held_out_size=0), optax.adam(3e-2)
    recipe = r2vpo.r2vpo(**FOUR, rate=1.0)
    pieces, prompts = tiny.pieces(recipe, task, optimiser), [tiny.prompts(task, 4, 4 * i) for i in range(3)]
    state = step.initial_state(recipe, tiny.network(task), optimiser, jax.random.key(0),
                               carried=pieces.carried(prompts[0]))
    run = jax.jit(step.composed(pieces))
    price = np.float32(0.04)
    for i, asked in enumerate(prompts):
        state, metrics, x = run(state, asked)
        np.testing.assert_allclose(metrics["control/price"], price, rtol=1e-6)
        assert x.mask[16:].any() == (i > 0)  # the first step has only its own batch
        assert (metrics["ratio_variance"] > 1e-4) == (i > 0)
        price = max(0.0, price + metrics["ratio_variance"] - 0.02)
        np.testing.assert_allclose(state.control["price"], price, rtol=1e-6)
