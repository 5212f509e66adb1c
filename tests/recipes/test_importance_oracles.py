"""Recipes that correct for the sampler, or by the size of gradients: loops over Python floats, from formula sheets."""
import dataclasses
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_jax.learner import assemble, update
from rl_jax.recipe import replace, with_old_policy
from rl_jax.recipes.advantage import oblr_po, optimal_token_baseline
from rl_jax.recipes.baselines import grpo
from rl_jax.recipes.loss import dapo_decoupled_clip, llds
from rl_jax.recipes.reward import kl_in_reward
from rl_jax.recipes.weighting import capo_curvature, masked_importance, minirl_routing_replay, truncated_importance
from rl_jax.selection import rejection
from rl_jax.types import Evaluated
from rl_jax.weighting import aggregate, importance
from tests import numeric
from tests.recipes import test_oracles, toy


class Batch(test_oracles.Batch):
    """A toy batch; moments are those of p on the chosen token and the rest spread evenly over four others."""

    def __init__(self, recipe):
        super().__init__(recipe)
        x, policy = self.arrays
        if "moments" in recipe.models:
            p = jnp.exp(x.rollout_logp)
            square = 3000 * x.given["hidden_square"]
            given = {"second_moment": p**2 + (1 - p) ** 2 / 4, "third_moment": p**3 + (1 - p) ** 3 / 16,
                     "hidden_square": square}
            self.arrays = dataclasses.replace(x, given={**x.given, **given}), policy
            self.of |= {name: np.asarray(values, np.float64) for name, values in given.items()}

    def away(self, i, t):
        return self.of["old_logp"][i, t] - self.of["old"][i, t]

    def ratio(self, i, t, old="old"):
        return math.exp(self.of["logp"][i, t] - self.of[old][i, t])

    def clip(self, i, t, advantage, old="old", low=0.2, high=0.2):
        ratio = self.ratio(i, t, old)
        return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)

    def sequence_mean(self, loss):
        of = [[loss(i, t) for t in self.tokens(i)] for i in self.rows]
        return sum(sum(losses) / max(len(losses), 1) for losses in of) / len(self.rows)


def zscore(batch, i, epsilon=1e-6, reward=None):
    of = [(reward or batch.score)[j] for j in batch.peers(i)]
    own = (reward or batch.score)[i]
    return own if len(of) == 1 else (own - statistics.mean(of)) / (statistics.stdev(of) + epsilon)


def oracle_truncated(batch):
    return batch.sequence_mean(lambda i, t: min(math.exp(batch.away(i, t)), 2.0)
                               * batch.clip(i, t, zscore(batch, i), "old_logp"))


def oracle_masked(batch, low=0.0):
    def weight(i):
        whole = math.exp(sum(batch.away(i, t) for t in batch.tokens(i)))
        return whole if low <= whole <= 3.0 else 0.0

    weights = [weight(i) for i in batch.rows]
    assert 0.0 in weights and any(w > 0 for w in weights)
    return batch.sequence_mean(lambda i, t: weights[i] * batch.clip(i, t, zscore(batch, i), "old_logp"))


def oracle_rejected(batch):
    """verl's form: answers whose mean k3 is above 0.3 leave, and tokens whose reciprocal weight leaves [.3, 3]."""
    def kept(i):
        away = [batch.away(i, t) for t in batch.tokens(i)]
        if sum(math.exp(d) - 1 - d for d in away) / max(len(away), 1) > 0.3:
            return []
        return [t for t in batch.tokens(i) if 0.3 <= math.exp(-batch.away(i, t)) <= 3]

    tokens = {i: kept(i) for i in batch.rows}
    left = sum(len(of) for of in tokens.values())
    assert 0 < left < batch.mask.sum()
    return sum(batch.clip(i, t, zscore(batch, i), "old_logp") for i, of in tokens.items() for t in of) / left


def oracle_minirl(batch):
    total, gates = 0.0, set()
    for i in batch.rows:
        of = [batch.score[j] for j in batch.peers(i)]
        advantage = batch.score[i] - statistics.mean(of)
        for t in batch.tokens(i):
            ratio = batch.ratio(i, t, "old_logp")
            gone = (advantage > 0 and ratio > 1.27) or (advantage < 0 and ratio < 0.8)
            weight = min(math.exp(batch.away(i, t)), 5.0) * ratio * (not gone)
            gates.add(gone)
            total -= weight * advantage * batch.of["logp"][i, t]
    assert gates == {True, False}
    return total / len(batch.rows)


def score_norm(batch, i, t):
    return 1 - 2 * math.exp(batch.of["old"][i, t]) + batch.of["second_moment"][i, t]


def oracle_otb(batch):
    def energy(i, t):
        return sum(score_norm(batch, i, u) for u in batch.tokens(i) if u <= t)

    def loss(i, t):
        there = [j for j in batch.peers(i) if batch.mask[j, t]]
        energies = {j: energy(j, t) for j in there}
        baseline = sum(energies[j] * batch.score[j] for j in there) / (sum(energies.values()) + 1e-8)
        return batch.clip(i, t, batch.score[i] - (0.0 if len(batch.peers(i)) == 1 else baseline))

    return batch.token_mean(loss)


def oracle_oblr(batch):
    norm = [sum(score_norm(batch, i, t) for t in batch.tokens(i)) for i in batch.rows]
    total = 0.0
    for i in batch.rows:
        of = batch.peers(i)
        if len(of) > 1:
            baseline = sum(norm[j] * batch.score[j] for j in of) / sum(norm[j] for j in of)
            total -= sum((batch.score[i] - baseline) * batch.of["logp"][i, t] for t in batch.tokens(i))
    return total / len(batch.rows)


def oracle_llds(batch, penalty=0.1):
    falls, opened = 0.0, set()
    for i in batch.rows:
        fall = [batch.of["old"][i, t] - batch.of["logp"][i, t] for t in batch.tokens(i)]
        gate = zscore(batch, i) >= 0 and sum(fall) > 0
        opened.add(gate)
        falls += sum(max(0.0, d) for d in fall) if gate else 0.0
    assert opened == {True, False}
    return test_oracles.oracle_grpo(batch) + penalty * falls / batch.mask.sum()


def oracle_capo(batch, rate=1.5e-5, divergence=1e-4, improvement=0.01):
    def kept(i, t, advantage):
        p, square = math.exp(batch.of["old"][i, t]), batch.of["hidden_square"][i, t]
        distribution = [p] + [(1 - p) / 4] * 4
        v = [1 - p] + [-(1 - p) / 4] * 4
        u = [advantage * square * x for x in v]
        along = sum(a * b for a, b in zip(v, u, strict=True))
        spread = sum(q * b * b for q, b in zip(distribution, u, strict=True)) - sum(
            q * b for q, b in zip(distribution, u, strict=True)) ** 2
        m_f = rate**2 * along**2 / 2
        m_h = rate * advantage * along + rate**2 * advantage * (along**2 - spread) / 2
        return m_f < divergence and abs(m_h) < improvement

    total, left = 0.0, 0
    for i in batch.rows:
        advantage = zscore(batch, i, 1e-4)
        tokens = [t for t in batch.tokens(i) if kept(i, t, advantage)]
        total += sum(batch.clip(i, t, advantage) for t in tokens) / max(len(tokens), 1)
        left += len(tokens)
    assert 0 < left < batch.mask.sum()
    return total / len(batch.rows)


def oracle_kl_in_reward(batch, beta=0.001):
    reward = [score - beta * sum(batch.of["old"][i, t] - batch.of["reference_logp"][i, t] for t in batch.tokens(i))
              for i, score in enumerate(batch.score)]
    return batch.sequence_mean(lambda i, t: batch.clip(i, t, zscore(batch, i, reward=reward)))


def oracle_dapo_three(batch):
    right = [score >= 1 for score in batch.score]
    kept = [i for i in batch.rows if 0 < sum(right[j] for j in batch.peers(i)) < len(batch.peers(i))]
    return batch.token_mean(lambda i, t: min(math.exp(batch.away(i, t)), 2.0) * batch.clip(
        i, t, zscore(batch, i), "old_logp", 0.2, 0.28), kept)


def truncated(x):
    return importance.truncated(importance.per_token(x.old_logp, x.rollout_logp, x.mask), 2.0)


def rejected(x):
    token = rejection.within_ratio(rejection.k1(x.old_logp, x.rollout_logp), x.mask, 0.3, 3.0)
    whole = rejection.sequence_mean(rejection.k3(x.old_logp, x.rollout_logp), x.mask)
    return aggregate.token_mean(token & rejection.at_most(whole, x.mask, 0.3))


def loss_and_gradient(recipe, policy, x):
    found = jax.jit(jax.value_and_grad(lambda policy: update.batch_loss(recipe, policy, x)[0]))(policy)
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("recipe, oracle", [
    (truncated_importance.truncated_importance(), oracle_truncated),
    (masked_importance.masked_importance(), oracle_masked),
    (masked_importance.masked_importance(low=0.2), lambda batch: oracle_masked(batch, 0.2)),
    (replace(truncated_importance.truncated_importance(), weighting=rejected), oracle_rejected),
    (minirl_routing_replay.minirl_routing_replay(), oracle_minirl),
    (optimal_token_baseline.optimal_token_baseline(), oracle_otb),
    (oblr_po.oblr_po(), oracle_oblr),
    (llds.llds(), oracle_llds),
    (capo_curvature.capo_curvature(), oracle_capo),
    (kl_in_reward.kl_in_reward(), oracle_kl_in_reward),
    (kl_in_reward.kl_in_reward(beta=0.3), lambda batch: oracle_kl_in_reward(batch, 0.3)),
    (with_old_policy(dapo_decoupled_clip.dapo_decoupled_clip(), truncated, "dapo_three_policies"), oracle_dapo_three),
], ids=lambda value: getattr(value, "name", None))
def test_the_loss_is_that_of_the_formula_sheet(recipe, oracle):
    batch = Batch(recipe)
    x, policy = batch.arrays
    np.testing.assert_allclose(update.batch_loss(recipe, policy, x)[0], oracle(batch), rtol=1e-5, atol=1e-6)


def on_engines_that_agree(recipe):
    """The recipe's batch with x.old_logp made what really sampled, and a policy that has moved from it."""
    x = toy.experience(recipe)
    return dataclasses.replace(x, given={**x.given, "old_logp": x.rollout_logp}), toy.policy(x)


@pytest.mark.parametrize("recipe", [
    truncated_importance.truncated_importance(), masked_importance.masked_importance(),
    with_old_policy(grpo.grpo(beta=0.0), truncated, "grpo_three_policies"),
    capo_curvature.capo_curvature(divergence_limit=0.0, improvement_limit=0.0)], ids=lambda recipe: recipe.name)
def test_nothing_to_correct_is_grpo(recipe):
    # Formula sheets of TIS/MIS (nothing when both log-probabilities agree) and CAPO (both tests off), reduces to.
    x, policy = on_engines_that_agree(recipe)
    plain = grpo.grpo(beta=0.0, epsilon=1e-4 if "moments" in recipe.models else 1e-6)
    (loss, found), (value, expected) = loss_and_gradient(recipe, policy, x), loss_and_gradient(plain, policy, x)
    np.testing.assert_allclose(loss, value, rtol=1e-6)
    np.testing.assert_allclose(found.logp, expected.logp, rtol=1e-6, atol=1e-9)


def test_llds_without_penalty_is_grpo():
    recipe = llds.llds(penalty=0.0)
    x, policy = on_engines_that_agree(recipe)
    (_, found), (_, expected) = loss_and_gradient(recipe, policy, x), loss_and_gradient(grpo.grpo(), policy, x)
    np.testing.assert_allclose(found.logp, expected.logp, rtol=1e-6, atol=1e-9)


def test_llds_does_nothing_in_the_first_step():
    x, policy = on_engines_that_agree(llds.llds())
    still = dataclasses.replace(policy, logp=x.rollout_logp)
    (_, found), (_, expected) = (loss_and_gradient(llds.llds(penalty=penalty), still, x) for penalty in (1e3, 0.0))
    np.testing.assert_allclose(found.logp, expected.logp, rtol=1e-4, atol=1e-8)


def test_minirl_has_the_gradient_of_the_clip_when_the_engines_agree():
    # Formula sheet of MiniRL, reduces to: PPO-clip's gradient with A not normalised; the values differ.
    recipe = minirl_routing_replay.minirl_routing_replay()
    clip = replace(dapo_decoupled_clip.dapo_decoupled_clip(group_size=8, clip_high=0.27, resample=0), reward=None,
                   selection=None, advantage=recipe.advantage, weighting=recipe.weighting)
    x, policy = on_engines_that_agree(recipe)
    (loss, found), (value, expected) = loss_and_gradient(recipe, policy, x), loss_and_gradient(clip, policy, x)
    np.testing.assert_allclose(found.logp, expected.logp, rtol=1e-5, atol=1e-8)
    assert abs(loss - value) > 0.01


@pytest.mark.parametrize("recipe", [masked_importance.masked_importance(low=1e9, high=2e9), replace(
    truncated_importance.truncated_importance(), weighting=lambda x: aggregate.token_mean(
        rejection.at_most(rejection.k2(x.old_logp, x.rollout_logp), x.mask, -1.0)))], ids=["weight 0", "no token"])
def test_all_rejected_is_a_loss_of_zero(recipe):
    # Formula sheet of TIS and MIS, degenerate.
    x = toy.experience(recipe)
    loss, gradient = loss_and_gradient(recipe, toy.policy(x), x)
    assert loss == 0 and (gradient.logp == 0).all()


def test_named_terms_keep_their_own_weights_under_an_old_policy():
    """Only the policy's term is corrected, and the fall is from the learner's old policy."""
    recipe = with_old_policy(llds.llds(beta=0.0), truncated, "llds_three_policies")
    x, policy = Batch(recipe).arrays
    plain = llds.llds(beta=0.0)
    moved = dataclasses.replace(x, rollout_logp=x.old_logp)
    _, extras = update.batch_loss(recipe, policy, x)
    _, expected = update.batch_loss(plain, policy, moved)
    np.testing.assert_allclose(extras["loss/displacement"], expected["loss/displacement"], rtol=1e-6)
    np.testing.assert_allclose(extras["loss/policy"], oracle_truncated(Batch(recipe)), rtol=1e-5)
    assert recipe.models == ("old",) and recipe.name == "llds_three_policies"


# Two tokens out of two, the second's distribution depending on the first's: four answers, held as often as expected in
# a group of eight. p(first) = (1/2, 1/2); p(second | first) = (3/4, 1/4) and (1/2, 1/2).
OLD_LOGITS = np.log(np.array([[0.5, 0.5], [0.75, 0.25], [0.5, 0.5]]))
ANSWERS = np.array([(0, 0)] * 3 + [(0, 1)] + [(1, 0)] * 2 + [(1, 1)] * 2)
PAYS = {(0, 0): 1.0, (0, 1): 0.3, (1, 0): -0.4, (1, 1): 0.8}


def answers_logp(logits):
    logp = jax.nn.log_softmax(logits)
    return jnp.stack([logp[0, ANSWERS[:, 0]], logp[1 + ANSWERS[:, 0], ANSWERS[:, 1]]], axis=1)


def exact_objective(logits):
    """E[R] over whole answers."""
    p = jax.nn.softmax(logits)
    return sum(p[0, a] * p[1 + a, b] * pay for (a, b), pay in PAYS.items())


def test_minirl_is_the_first_order_of_the_exact_objective():
    """The token surrogate and the objective of whole answers share their gradient at the old policy, and only there."""
    recipe = minirl_routing_replay.minirl_routing_replay(clip_low=0.9, clip_high=9.0)
    reward = jnp.asarray([PAYS[tuple(answer)] for answer in ANSWERS.tolist()], jnp.float32)
    old = answers_logp(jnp.asarray(OLD_LOGITS, jnp.float32))
    x = assemble.of_arrays(old, jnp.ones((8, 2), bool), reward, jnp.zeros(8, int), old_logp=old)

    def loss(logits):
        logp = answers_logp(logits)
        return update.batch_loss(recipe, Evaluated(logp=logp, entropy=jnp.zeros_like(logp)), x)[0]

    for moved, same in ((0.0, True), (0.5, False)):
        logits = jnp.asarray(OLD_LOGITS + moved * numeric.normal(0, 3, 2), jnp.float32)
        found, exact = -jax.grad(loss)(logits), jax.grad(exact_objective)(logits)
        assert np.allclose(found, exact, rtol=1e-4, atol=1e-6) == same


def test_oblr_po_scales_its_step_by_the_noise_between_two_halves():
    """Gradients of both halves by hand: the step is the learning rate's times the share of the signal."""
    recipe = oblr_po.oblr_po(group_size=4)
    x = toy.experience(recipe, count=24)
    x = assemble.with_advantage(recipe, dataclasses.replace(x, reward=(x.tokens[:, 0] == 1).astype(jnp.float32)))
    start, optimiser, weight = toy.parameters(), optax.sgd(0.1), recipe.weighting(x)
    step = jax.jit(update.make_update(recipe, toy.evaluate, optimiser))
    parameters, _, metrics = step(start, optimiser.init(start), x)

    def loss(parameters, rows):
        policy = toy.evaluate(parameters, x)
        return (recipe.loss(policy, x) * weight * x.mask * rows[:, None]).sum()

    half = np.arange(x.mask.shape[0]) < x.mask.shape[0] // 2
    first, second = (np.asarray(jax.grad(loss)(start, jnp.asarray(rows))["logits"]) for rows in (half, ~half))
    whole = first + second
    # each half's own estimate of the gradient is twice its part; the variance of their mean
    variance = ((2 * first - whole) ** 2 + (2 * second - whole) ** 2).sum() / 2
    signal = max((whole**2).sum() - variance, 0.0)
    assert signal > 0, "the batch must show a signal"
    factor = signal / (signal + variance)
    np.testing.assert_allclose(metrics["optimiser/step_scale"], factor, rtol=1e-4)
    np.testing.assert_allclose(parameters["logits"], start["logits"] - 0.1 * factor * whole, rtol=1e-4, atol=1e-6)
