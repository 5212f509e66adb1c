"""The REC family, TRPA, NGRPO and LOOP as whole algorithms.

Losses against loops over Python floats written from the formula sheets; what the sheets say each reduces to, in the
gradient; bandits small enough for exact expectations.
"""
import dataclasses
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.advantage import group
from rl_jax.learner import assemble, update
from rl_jax.loss import gate, ratio, reject, score
from rl_jax.recipe import replace
from rl_jax.recipes.advantage import ngrpo
from rl_jax.recipes.baselines import grpo, loop
from rl_jax.recipes.loss import asymre, opmd, rec, rec_kl, rec_ring, rec_two_side, trpa
from rl_jax.recipes.selection import red_drop
from rl_jax.recipes.weighting import red_weight
from rl_jax.types import Evaluated
from rl_jax.weighting import aggregate
from tests.recipes import test_oracles, toy


class Batch(test_oracles.Batch):
    """The toy batch with what the family reads."""

    def ratio(self, i, t):
        return math.exp(self.away(i, t))

    def away(self, i, t):
        return self.of["logp"][i, t] - self.of["old"][i, t]

    def centred(self, i):
        of = [self.score[j] for j in self.peers(i)]
        return self.score[i] - statistics.mean(of) if len(of) > 1 else self.score[i]

    def mean_of_kept(self, kept, loss):
        """`loss(i, t)` where `kept(i, t)`, over all chosen tokens."""
        used = [(i, t) for i in self.rows for t in self.tokens(i) if kept(i, t)]
        total = sum(len(self.tokens(i)) for i in self.rows)
        assert 0 < len(used) < total
        return sum(loss(i, t) for i, t in used) / total


def oracle_rec(batch, low=0.2, high=0.2):
    def kept(i, t):
        a, r = batch.centred(i), batch.ratio(i, t)
        return (a >= 0 and r <= 1 + high) or (a <= 0 and r >= 1 - low)

    return batch.mean_of_kept(kept, lambda i, t: -batch.ratio(i, t) * batch.centred(i) * batch.of["logp"][i, t])


def oracle_two_side(batch):
    return batch.mean_of_kept(lambda i, t: 0.8 <= batch.ratio(i, t) <= 1.2,
                              lambda i, t: -batch.ratio(i, t) * batch.centred(i) * batch.of["logp"][i, t])


def oracle_ring(batch, far_low=0.6, far_high=2.0):
    def kept(i, t):
        a, r = batch.centred(i), batch.ratio(i, t)
        return 0.8 <= r <= 1.2 or (a >= 0 and r <= 1 - far_low) or (a <= 0 and r >= 1 + far_high)

    return batch.mean_of_kept(kept, lambda i, t: -batch.centred(i) * batch.of["logp"][i, t])


def oracle_kl(batch, coefficient=0.1):
    return batch.token_mean(
        lambda i, t: -batch.centred(i) * batch.of["logp"][i, t] + coefficient * batch.away(i, t) ** 2)


def oracle_opmd(batch, tau=1.0):
    def credit(i):
        of = [batch.score[j] for j in batch.peers(i)]
        baseline = tau * math.log(sum(math.exp(r / tau) for r in of) / len(of))
        return batch.score[i] - baseline if len(of) > 1 else batch.score[i]

    return batch.token_mean(lambda i, t: -credit(i) * batch.of["logp"][i, t] / (1 + tau))


def oracle_asymre(batch, shift=0.1):
    return batch.token_mean(lambda i, t: -(batch.centred(i) + shift) * batch.of["logp"][i, t])


def oracle_red_drop(batch):
    seed = [int(s) for s in batch.arrays[0].seed]
    lot = [int(jax.random.bits(jax.random.key(np.uint32(s)))) for s in seed]
    kept = []
    for i in batch.rows:
        mean = statistics.mean(batch.score[j] for j in batch.peers(i))
        bad = [j for j in batch.peers(i) if batch.score[j] < mean]
        room = len(batch.peers(i)) - len(bad)
        kept.append(i not in bad or sum(lot[j] < lot[i] for j in bad) < room)
    assert not all(kept)

    def credit(i):
        of = [batch.score[j] for j in batch.peers(i) if kept[j]]
        return (batch.score[i] - statistics.mean(of) if len(of) > 1 else batch.score[i]) if kept[i] else 0.0

    return batch.token_mean(lambda i, t: -credit(i) * batch.of["logp"][i, t])


def oracle_red_weight(batch, temperature=1.0):
    return batch.token_mean(lambda i, t: -math.exp(batch.centred(i) / temperature) * batch.centred(i)
                            * batch.of["logp"][i, t])


def oracle_ngrpo(batch, virtual=1):
    right = [s >= 1 for s in batch.score]
    kept = [i for i in batch.rows if sum(right[j] for j in batch.peers(i)) < len(batch.peers(i))]
    assert 0 < len(kept) < len(batch.rows)

    def credit(i):
        of = [batch.score[j] for j in batch.peers(i)] + [1.0] * virtual
        return (batch.score[i] - statistics.mean(of)) / (statistics.stdev(of) + 1e-6)

    return batch.token_mean(lambda i, t: batch.clipped(i, t, credit(i), 0.16, 0.24), kept)


def oracle_loop(batch, clip=0.1, threshold=0.01):
    total, count = 0.0, 0
    for i in batch.rows:
        others = [batch.score[j] for j in batch.peers(i) if j != i]
        credit = batch.score[i] - statistics.mean(others) if others else batch.score[i]
        if abs(credit) < threshold or not batch.tokens(i):
            continue
        edge = (1 + clip) * credit if credit >= 0 else credit / (1 + clip)
        losses = [-min(batch.ratio(i, t) * credit, edge) for t in batch.tokens(i)]
        total, count = total + sum(losses) / len(losses), count + 1
    assert 0 < count < len(batch.rows) - 2  # besides the empty and the failed one, some were dropped
    return total / count


def trpa_level(batch, i):
    return 1 if batch.score[i] >= 1 else 2 if batch.arrays[0].finished[i] else 3


def trpa_z(batch, i):
    of = [batch.of["logp"][i, t] - batch.of["reference_logp"][i, t] for t in batch.tokens(i)]
    return statistics.mean(of) if of else 0.0


def oracle_trpa(batch, beta=0.1, factor=2.5, trust=0.001):
    level, z = [trpa_level(batch, i) for i in batch.rows], [trpa_z(batch, i) for i in batch.rows]
    losses = []
    for i in batch.rows:
        for j in batch.peers(i):
            if level[i] < level[j] and batch.tokens(i) and batch.tokens(j):
                h = beta * (z[i] - z[j]) * (factor if level[i] == 1 else 1)
                losses.append(-math.log(1 / (1 + math.exp(-h))))
    assert {1, 2, 3} == set(level) and len(losses) > 10
    near = batch.token_mean(lambda i, t: math.exp(-batch.away(i, t)) + batch.away(i, t) - 1)
    return statistics.mean(losses) + trust * near


@pytest.mark.parametrize("recipe, oracle, options", [
    (rec.rec(), oracle_rec, {}),
    (rec.rec(clip_low=0.1, clip_high=0.4), oracle_rec, {"low": 0.1, "high": 0.4}),
    (rec_two_side.rec_two_side(), oracle_two_side, {}),
    (rec_ring.rec_ring(), oracle_ring, {}),
    (rec_ring.rec_ring(far_low=0.3, far_high=0.4), oracle_ring, {"far_low": 0.3, "far_high": 0.4}),
    (rec_kl.rec_kl(), oracle_kl, {}),
    (opmd.opmd(), oracle_opmd, {}),
    (opmd.opmd(temperature=0.2), oracle_opmd, {"tau": 0.2}),
    (asymre.asymre(), oracle_asymre, {}),
    (red_drop.red_drop(group_size=5), oracle_red_drop, {}),
    (red_weight.red_weight(), oracle_red_weight, {}),
    (red_weight.red_weight(temperature=0.5), oracle_red_weight, {"temperature": 0.5}),
    (ngrpo.ngrpo(), oracle_ngrpo, {}),
    (ngrpo.ngrpo(virtual=2), oracle_ngrpo, {"virtual": 2}),
    (loop.loop(threshold=0.45), oracle_loop, {"threshold": 0.45}),
    (trpa.trpa(), oracle_trpa, {}),
    (trpa.trpa(beta=0.9, factor=1.0, trust=0.3), oracle_trpa, {"beta": 0.9, "factor": 1.0, "trust": 0.3}),
], ids=lambda value: getattr(value, "name", None))
def test_the_loss_is_that_of_the_formula_sheet(recipe, oracle, options):
    batch = Batch(recipe)
    x, policy = batch.arrays
    loss, _ = jax.jit(lambda policy, x: update.batch_loss(recipe, policy, x))(policy, x)
    np.testing.assert_allclose(loss, oracle(batch, **options), rtol=1e-5, atol=1e-6)


def gradient(recipe, policy, x):
    return jax.jit(jax.grad(lambda policy: update.batch_loss(recipe, policy, x)[0]))(policy).logp


def imitating(recipe, coefficient):
    """The recipe with the group's mean as baseline, plus imitation of what was drawn."""
    return replace(recipe, advantage=lambda x: group.centred(x.reward, x.group), loss=lambda policy, x: (
        score.policy_gradient(policy.logp, x.advantage) + reject.forward_divergence(policy.logp, coefficient)))


def divided(recipe):
    """The recipe with credit divided by the population's standard deviation, over token means."""
    return replace(recipe, advantage=lambda x: group.zscore(x.reward, x.group, ddof=0),
                   weighting=lambda x: aggregate.token_mean(x.mask))


SAME_GRADIENT = {
    "REC one-side with IS and std is GRPO without KL": (divided(rec.rec()), divided(grpo.grpo(beta=0.0))),
    "REC that rejects nothing is REINFORCE": (
        replace(rec_two_side.rec_two_side(clip_low=1.0, clip_high=1e9), loss=lambda policy, x: reject.policy_gradient(
            policy.logp, x.advantage, 1.0, reject.two_side(ratio.per_token(policy.logp, x.rollout_logp), 1.0, 1e9))),
        imitating(asymre.asymre(), 0.0)),
    "a regulariser of weight 0 is REINFORCE": (rec_kl.rec_kl(coefficient=0.0), imitating(asymre.asymre(), 0.0)),
    "AsymRE is REINFORCE plus imitation": (asymre.asymre(), imitating(asymre.asymre(), 0.1)),
    "OPMD of a large temperature is REINFORCE over 1 + tau": (
        opmd.opmd(temperature=100.0),
        replace(opmd.opmd(temperature=100.0), advantage=lambda x: group.shifted(x.reward, x.group, 0.0))),
    "LOOP is PPO's clip with its lower edge moved": (loop.loop(), replace(loop.loop(), loss=lambda policy, x: (
        gate.ppo_clip(ratio.per_token(policy.logp, x.rollout_logp), x.advantage, 1 - 1 / 1.1, 0.1)))),
    "NGRPO without virtual answers has GRPO's credit": (
        ngrpo.ngrpo(virtual=0), replace(ngrpo.ngrpo(), advantage=lambda x: group.zscore(x.reward, x.group))),
}


@pytest.mark.parametrize("claim", SAME_GRADIENT)
def test_what_the_formula_sheets_say_it_reduces_to(claim):
    one, other = SAME_GRADIENT[claim]
    x = toy.experience(one)
    policy = toy.policy(x)
    found, expected = gradient(one, policy, x), gradient(other, policy, x)
    assert np.abs(expected).max() > 1e-5
    # log-mean-exp at tau = 100 is the mean within Var R / 200
    loose = {"rtol": 1e-2, "atol": 1e-7} if "temperature" in claim else {"rtol": 1e-4, "atol": 1e-7}
    np.testing.assert_allclose(found, expected, **loose)


def test_loop_is_rloo_before_the_policy_moves():
    # Formula sheet of LOOP; with its own aggregator, and every answer kept.
    recipe = loop.loop(threshold=0.0)
    x = toy.experience(recipe)
    policy = dataclasses.replace(toy.policy(x), logp=x.rollout_logp)
    rloo = replace(recipe, loss=lambda policy, x: score.policy_gradient(policy.logp, x.advantage))
    np.testing.assert_allclose(gradient(recipe, policy, x), gradient(rloo, policy, x), rtol=1e-5, atol=1e-8)


def test_groups_that_agree():
    # NGRPO learns where all failed and leaves out where all are right; LOOP leaves out both.
    recipe = ngrpo.ngrpo(group_size=4)
    x = toy.experience(recipe)
    scores = jnp.where(jnp.arange(24) < 4, 0.0, 1.0)
    x = dataclasses.replace(x, score=scores, reward=scores)
    seen = assemble.with_advantage(recipe, x)
    np.testing.assert_allclose(seen.advantage[:4], -0.447213, rtol=1e-5)
    assert seen.mask[:4].any() and not seen.mask[4:].any()
    assert not assemble.with_advantage(loop.loop(group_size=4), x).mask[:-1].any()


def test_a_dropped_answer_counts_in_the_denominator_only():
    # Formula sheet of REC: RED-Drop on (1, 0, 0, 0) has A = (.5, -.5, 0, 0) in some order.
    recipe = red_drop.red_drop(group_size=4)
    reward, mask = jnp.array([1.0, 0, 0, 0]), jnp.ones((4, 1), bool)
    x = assemble.of_arrays(jnp.zeros((4, 1)), mask, reward, jnp.zeros(4, int))
    credit = assemble.with_advantage(recipe, x).advantage[:, 0]
    assert credit[0] == 0.5 and sorted(credit[1:].tolist()) == [-0.5, 0, 0]
    found = gradient(recipe, Evaluated(logp=jnp.zeros((4, 1)), entropy=jnp.zeros((4, 1))), x)
    np.testing.assert_allclose(found[:, 0], -credit / 4)


def trpa_batch(scores):
    recipe = trpa.trpa(group_size=4)
    x = toy.experience(recipe)
    return recipe, dataclasses.replace(x, score=scores, reward=scores)


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_trpa_without_any_pair(right):
    # Formula sheet of TRPA: mean of -log sigmoid(+-beta z), + where right. All answers are finished.
    recipe, x = trpa_batch(jnp.full(24, right))
    x, policy = dataclasses.replace(x, finished=jnp.ones(24, bool)), toy.policy(x)
    loss, extras = update.batch_loss(recipe, policy, x)
    mask, away = np.asarray(x.mask), np.asarray(policy.logp - x.reference_logp, np.float64)
    total = 0.0
    for i in np.flatnonzero(mask.any(axis=1)):
        z = statistics.mean(float(away[i, t]) for t in np.flatnonzero(mask[i]))
        total += math.log1p(math.exp(-0.1 * z if right else 0.1 * z))
    np.testing.assert_allclose(extras["loss/unpaired"], total / 24, rtol=1e-5)
    np.testing.assert_allclose(loss, total / 24 + extras["loss/trust"], rtol=1e-5)
    assert extras["loss/policy"] == 0


def test_trpa_knows_of_pairs_in_the_other_part_of_the_batch():
    # Only the first prompt has pairs; the second micro-batch sees none and must not go by the rule for none.
    recipe, x = trpa_batch(jnp.where(jnp.arange(24) % 4 < 2, 1.0, 0.0).at[4:].set(1.0))
    x = assemble.with_advantage(recipe, dataclasses.replace(x, finished=jnp.ones(24, bool)))
    (whole, metrics), (parts, _) = (jax.jit(update.make_gradient(recipe, toy.evaluate, n))(toy.parameters(), x)
                                    for n in (1, 2))
    assert metrics["loss/policy"] > 0 and metrics["loss/unpaired"] == 0
    np.testing.assert_allclose(parts["logits"], whole["logits"], rtol=1e-5, atol=1e-7)


def test_trpa_reads_the_format_where_a_verifier_says():
    recipe, x = trpa_batch(jnp.ones(24))
    x = dataclasses.replace(x, finished=jnp.ones(24, bool), parts={"format": (jnp.arange(24) % 4 > 0) * 1.0})
    seen = assemble.with_advantage(recipe, x)
    np.testing.assert_array_equal(seen.reward.reshape(6, 4), [[-4, -1, -1, -1]] * 6)


def on_bandit(recipe, logits, old, arm, reward):
    """Loss of a batch of one prompt's answers of one token each, drawn by `old`."""
    logp, rollout_logp = jax.nn.log_softmax(logits)[arm][:, None], jax.nn.log_softmax(old)[arm][:, None]
    zero = jnp.zeros(arm.shape[0], int)
    x = assemble.of_arrays(rollout_logp, jnp.ones(logp.shape, bool), reward, zero)
    return update.batch_loss(recipe, Evaluated(logp=logp, entropy=jnp.zeros(logp.shape)), x)[0]


ARMS = jnp.array([0] * 3 + [1] * 6 + [2])  # ten draws whose shares are exactly (.3, .6, .1)
WORTH = jnp.array([0.0, 0.8, 1.0])
VANILLA = imitating(asymre.asymre(), 0.0)


@pytest.mark.parametrize("logits", [[0.0, 0.0, 0.0], [2.0, -1.0, 0.5], [-3.0, 1.0, 4.0]])
def test_the_exact_gradient_of_reinforce_on_stale_data(logits):
    # Formula sheet of REC: pi_b = (.3, .6, .1), R = (0, .8, 1): the same for every policy.
    old = jnp.log(jnp.array([0.3, 0.6, 0.1]))
    found = jax.grad(lambda p: on_bandit(VANILLA, p, old, ARMS, WORTH[ARMS]))(jnp.array(logits))
    np.testing.assert_allclose(-found, [-0.174, 0.132, 0.042], rtol=1e-4, atol=1e-6)


def test_reinforce_on_stale_data_converges_to_the_second_best():
    # Formula sheet of REC: to arm 2 (.8) and not to the best. Rejection on one side stops before.
    old = jnp.log(jnp.array([0.3, 0.6, 0.1]))

    def after(recipe):
        def step(logits, _):
            return logits - jax.grad(lambda p: on_bandit(recipe, p, old, ARMS, WORTH[ARMS]))(logits), None

        return jax.nn.softmax(jax.jit(lambda: jax.lax.scan(step, old, length=300))()[0])

    np.testing.assert_allclose(after(VANILLA), [0, 1, 0], atol=1e-4)
    held = after(rec.rec())
    assert held[2] > 0.1 and (held[1:] / jnp.array([0.6, 0.1]) < 1.5).all()


@pytest.mark.parametrize("recipe", [rec.rec(), rec_ring.rec_ring(), asymre.asymre(), opmd.opmd(), rec_kl.rec_kl()],
                         ids=lambda recipe: recipe.name)
def test_data_five_steps_old_still_teach(recipe):
    """Three arms, 32 answers per step drawn by the weights of five steps before."""
    def step(weights, key):
        old = weights[0]
        arm = jax.random.categorical(key, old, shape=(32,))
        now = weights[-1] - 0.5 * jax.grad(lambda p: on_bandit(recipe, p, old, arm, WORTH[arm]))(weights[-1])
        return jnp.concatenate([weights[1:], now[None]]), (jax.nn.softmax(now) * WORTH).sum()

    keys = jax.random.split(jax.random.key(0), 200)
    _, expected = jax.jit(lambda keys: jax.lax.scan(step, jnp.zeros((6, 3)), keys))(keys)
    assert expected[0] < 0.65 and expected[-1] > 0.85
