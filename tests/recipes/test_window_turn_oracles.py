"""T-PPO and SeeUPO as whole algorithms: loops over Python floats, written from their formula sheets."""
import dataclasses
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.learner import update
from rl_jax.recipe import replace
from rl_jax.recipes.baselines import ppo
from rl_jax.recipes.loss import gspo
from rl_jax.recipes.rollout import t_ppo
from rl_jax.recipes.schedule import seeupo
from tests.recipes.test_oracles import Batch


def run(recipe, x, policy):
    """Loss, extras, gradient in what the policy says."""
    one = jax.jit(jax.value_and_grad(lambda policy, x: update.batch_loss(recipe, policy, x), has_aux=True))
    (loss, extras), slope = one(policy, x)
    return loss, extras, slope


# T-PPO


def in_a_window(recipe):
    """The toy batch, in which every other answer goes on and only later tokens are of this window."""
    batch = Batch(recipe)
    x, policy = batch.arrays
    rows = np.arange(len(batch.mask))
    fresh = batch.mask & (np.arange(batch.mask.shape[1])[None] >= rows[:, None] % 3)
    x = dataclasses.replace(x, complete=jnp.asarray(rows % 2 == 1), fresh=jnp.asarray(fresh))
    return batch, x, policy, fresh


def oracle_t_ppo(batch, complete, fresh, clip=0.2, value_clip=0.5, value_coefficient=1.0, discount=1.0, decay=0.95):
    advantages, policy_losses, value_losses = {}, [], []
    for i in batch.rows:
        chosen = batch.tokens(i)
        after = 0.0 if complete[i] or not chosen else batch.of["values"][i, chosen[-1]]
        reward, advantage = (batch.score[i] if complete[i] else 0.0), 0.0
        for t in reversed(chosen):
            advantage = reward + discount * after - batch.of["values"][i, t] + discount * decay * advantage
            after, reward = batch.of["values"][i, t], 0.0
            advantages[i, t] = advantage
        for place, t in enumerate(chosen):
            if not complete[i]:
                continue
            goal = batch.score[i] * discount ** (len(chosen) - 1 - place)
            now, old = batch.of["value"][i, t], batch.of["values"][i, t]
            near = min(max(now, old - value_clip), old + value_clip)
            value_losses.append(max((now - goal) ** 2, (near - goal) ** 2) / 2)
    own = {(i, t): advantage for (i, t), advantage in advantages.items() if fresh[i, t]}
    mean, variance = statistics.mean(own.values()), statistics.variance(own.values())
    for (i, t), advantage in own.items():
        policy_losses.append(batch.clipped(i, t, (advantage - mean) / math.sqrt(variance + 1e-8), clip, clip))
    return statistics.mean(policy_losses), value_coefficient * statistics.mean(value_losses)


@pytest.mark.parametrize("options", [{}, {"discount": 0.9, "decay": 0.8, "value_coefficient": 0.7},
                                     {"clip": 0.05, "value_clip": 0.1}], ids=str)
def test_t_ppo(options):
    recipe = t_ppo.t_ppo(**options)
    batch, x, policy, fresh = in_a_window(recipe)
    loss, extras, _ = run(recipe, x, policy)
    expected = oracle_t_ppo(batch, np.asarray(x.complete), fresh, **options)
    np.testing.assert_allclose([extras["loss/policy"], extras["loss/value"]], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loss, sum(expected), rtol=1e-5, atol=1e-6)


def test_t_ppos_policy_and_critic_learn_from_tokens_of_their_own():
    """The policy from this window's, also of answers that go on; the critic from all tokens of whole answers."""
    recipe = t_ppo.t_ppo(clip=9.0, value_clip=9.0)  # bands so wide that nothing leaves them
    _, x, policy, fresh = in_a_window(recipe)
    _, _, slope = run(recipe, x, policy)
    np.testing.assert_array_equal(np.asarray(slope.logp) != 0, fresh)
    whole = np.asarray(x.mask) & np.asarray(x.complete)[:, None]
    np.testing.assert_array_equal(np.asarray(slope.values) != 0, whole)
    assert (fresh & ~whole).any() and (whole & ~fresh).any()


def test_t_ppo_is_ppo_where_nothing_is_cut():
    """Its policy term, value and gradient; the critic's goal is another one."""
    recipe, other = t_ppo.t_ppo(value_coefficient=0.0), ppo.ppo(value_coefficient=0.0)
    batch = Batch(recipe)
    found, expected = (run(r, *batch.arrays) for r in (recipe, other))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found[2].logp, expected[2].logp, rtol=1e-5, atol=1e-7)


# SeeUPO


def oracle_seeupo(batch, turn, turns, low=3e-4, high=4e-4, beta=0.002):
    """Before the first turn's step: every answer is still weighed with 1."""
    def centred(i):
        of = [batch.score[j] for j in batch.peers(i)]
        return batch.score[i] - statistics.mean(of) if len(of) > 1 else batch.score[i]

    def credit(i, k):
        active = [centred(j) for j in batch.rows if any(turn[j, t] == k for t in batch.tokens(j))]
        std = statistics.stdev(active) if len(active) > 1 else 0.0
        x = (centred(i) - statistics.mean(active)) / std if std > 1e-6 else centred(i)
        return min(max(x, -3.0), 3.0)

    total = 0.0
    for i in batch.rows:
        chosen, losses = batch.tokens(i), []
        change = [batch.of["logp"][i, t] - batch.of["old_logp"][i, t] for t in chosen]
        ratio = math.exp(min(max(sum(change) / max(len(chosen), 1), -20), 10))
        for t in chosen:
            advantage = credit(i, turn[i, t]) if turn[i, t] < turns else 0.0
            away = batch.of["logp"][i, t] - batch.of["reference_logp"][i, t]
            losses.append(-min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
                          + beta * (math.exp(-away) + away - 1))
        total += sum(losses) / max(len(chosen), 1)
    return total / len(batch.rows)


@pytest.mark.parametrize("options, oracle", [
    ({}, {}), ({"turns": 1}, {}),
    ({"beta": 0.5, "clip_low": 0.1, "clip_high": 0.2}, {"beta": 0.5, "low": 0.1, "high": 0.2})], ids=str)
def test_seeupo(options, oracle):
    """The toy batch has two turns; with turns=1 the second one has no credit."""
    recipe = seeupo.seeupo(**options)
    batch = Batch(recipe)
    x, policy = batch.arrays
    assert set(np.asarray(x.turn).reshape(-1)) == {0, 1}
    loss, extras, _ = run(recipe, x, policy)
    expected = oracle_seeupo(batch, np.asarray(x.turn), options.get("turns", 10), **oracle)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    away = [batch.of["logp"][i, t] - batch.of["reference_logp"][i, t] for i in batch.rows for t in batch.tokens(i)]
    np.testing.assert_allclose(extras["loss/kl"], statistics.mean(math.exp(-a) + a - 1 for a in away), rtol=1e-5)


def test_seeupo_of_one_turn_is_gspo_with_its_credit():
    """Value and gradient, away from ratio 1."""
    recipe = seeupo.seeupo(turns=1, beta=0.0, clip_low=0.1, clip_high=0.1)
    x, policy = Batch(recipe).arrays
    x = dataclasses.replace(x, turn=jnp.zeros_like(x.turn))
    other = replace(gspo.gspo(clip_low=0.1, clip_high=0.1), advantage=recipe.advantage)
    found = run(recipe, x, policy)
    expected = run(other, dataclasses.replace(x, rollout_logp=x.old_logp), policy)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[2].logp, expected[2].logp, rtol=1e-5, atol=1e-8)
    assert 0 < (np.asarray(found[2].logp)[np.asarray(x.mask)] == 0).mean() < 1, "some are clipped and some are not"
