"""Baselines, ratio and gate recipes as whole algorithms: loops over Python floats, from their formula sheets."""
import dataclasses
import functools
import math
import statistics

import jax
import numpy as np
import pytest

from rl_jax.learner import update
from rl_jax.recipes.baselines import dr_grpo, ppo_dual_clip, reinforce_pp, reinforce_pp_baseline
from rl_jax.recipes.loss import cispo, dhpo, dhpo_entropy, gmpo, gspo, gspo_token, sapo_soft_gate
from rl_jax.recipes.weighting import luspo
from tests.recipes import test_oracles


class Batch(test_oracles.Batch):
    """The toy batch, of which the policy has moved `far` times as far."""

    def __init__(self, recipe, far=1.0):
        super().__init__(recipe)
        x, policy = self.arrays
        policy = dataclasses.replace(policy, logp=x.rollout_logp + far * (policy.logp - x.rollout_logp))
        self.arrays = x, policy
        self.of["logp"] = np.asarray(policy.logp, np.float64)
        self.entropy = np.asarray(x.rollout_entropy, np.float64)

    def away(self, i, t):
        return self.of["logp"][i, t] - self.of["old"][i, t]

    def ratio(self, i, t):
        return math.exp(self.away(i, t))

    def sequence_ratio(self, i):
        return math.exp(sum(self.away(i, t) for t in self.tokens(i)) / max(len(self.tokens(i)), 1))

    def zscore(self, i):
        return test_oracles.zscore(self, i, self.score)

    def centred(self, i, reward):
        of = [reward[j] for j in self.peers(i)]
        return reward[i] - (statistics.mean(of) if len(of) > 1 else 0.0)

    def mean_of_token_means(self, loss):
        return sum(sum(loss(i, t) for t in self.tokens(i)) / max(len(self.tokens(i)), 1)
                   for i in self.rows) / len(self.rows)

    def whitened(self, credit):
        """{(i, t): number} whitened over all chosen tokens."""
        mean, variance = statistics.mean(credit.values()), statistics.variance(credit.values())
        return {at: (a - mean) / math.sqrt(variance + 1e-8) for at, a in credit.items()}

    def divergence(self, i, t):
        return self.of["old"][i, t] - self.of["reference_logp"][i, t]


def clip(r, a, low, high):
    return -min(r * a, min(max(r, 1 - low), 1 + high) * a)


def oracle_reinforce_pp(batch, beta=0.001, discount=1.0):
    credit = {}
    for i in batch.rows:
        later, reward = 0.0, batch.score[i]
        for t in reversed(batch.tokens(i)):
            later = reward - (beta * batch.divergence(i, t) if beta else 0.0) + discount * later
            credit[i, t], reward = later, 0.0
    white = batch.whitened(credit)
    return batch.token_mean(lambda i, t: batch.clipped(i, t, white[i, t], 0.2, 0.2))


def oracle_reinforce_pp_baseline(batch, beta=0.0):
    reward = [s - (beta * sum(batch.divergence(i, t) for t in batch.tokens(i)) if beta else 0.0)
              for i, s in enumerate(batch.score)]
    white = batch.whitened({(i, t): batch.centred(i, reward) for i in batch.rows for t in batch.tokens(i)})
    return batch.token_mean(lambda i, t: batch.clipped(i, t, white[i, t], 0.2, 0.2))


def oracle_dual_clip(batch, decay=0.95, ceiling=3.0):
    credit, returns, capped = {}, {}, 0
    for i in batch.rows:
        value, advantage, reward = 0.0, 0.0, batch.score[i]
        for t in reversed(batch.tokens(i)):
            advantage = reward + value - batch.of["values"][i, t] + decay * advantage
            value, reward = batch.of["values"][i, t], 0.0
            credit[i, t], returns[i, t] = advantage, advantage + value
    white = batch.whitened(credit)

    def loss(i, t):
        nonlocal capped
        policy = clip(batch.ratio(i, t), white[i, t], 0.2, 0.2)
        if white[i, t] < 0:
            capped += policy > -ceiling * white[i, t]
            policy = min(policy, -ceiling * white[i, t])
        now, old = batch.of["value"][i, t], batch.of["values"][i, t]
        near = min(max(now, old - 0.5), old + 0.5)
        return policy + max((now - returns[i, t]) ** 2, (near - returns[i, t]) ** 2) / 2

    total = batch.token_mean(loss)
    assert capped > 0
    return total


def oracle_dr_grpo(batch, length=3000):
    return sum(batch.clipped(i, t, batch.centred(i, batch.score), 0.2, 0.2)
               for i in batch.rows for t in batch.tokens(i)) / (len(batch.rows) * length)


def oracle_gspo(batch, low=3e-4, high=4e-4):
    return sum(clip(batch.sequence_ratio(i), batch.zscore(i), low, high)
               for i in batch.rows if batch.tokens(i)) / len(batch.rows)


def oracle_luspo(batch, low=2e-3, high=2.5e-3):
    return sum(len(batch.tokens(i)) * clip(batch.sequence_ratio(i), batch.zscore(i), low, high)
               for i in batch.rows) / len(batch.rows)


def oracle_cispo(batch, cap=5.0):
    return batch.token_mean(lambda i, t: -min(batch.ratio(i, t), cap) * batch.zscore(i) * batch.of["logp"][i, t])


def oracle_gmpo(batch, low=0.4, high=0.4):
    total = 0.0
    for i in batch.rows:
        credit = batch.zscore(i)
        sign = (credit > 0) - (credit < 0)
        held = [sign * min(sign * d, sign * min(max(d, -low), high))
                for d in (batch.away(i, t) for t in batch.tokens(i))]
        total -= math.exp(sum(held) / len(held)) * credit if held else 0.0
    return total / len(batch.rows)


def oracle_sapo(batch, positive=1.0, negative=1.05):
    def loss(i, t):
        credit = batch.zscore(i)
        tau = positive if credit > 0 else negative
        return -4 / tau / (1 + math.exp(-tau * (batch.ratio(i, t) - 1))) * credit

    return batch.mean_of_token_means(loss)


def oracle_dhpo(batch, share=0.5, band=0.2, low=3e-4, high=4e-4):
    """`share` None: by entropy."""
    largest = max(batch.entropy[i, t] for i in batch.rows for t in batch.tokens(i))

    def loss(i, t):
        w = batch.entropy[i, t] / largest if share is None else share
        r, s, a = batch.ratio(i, t), batch.sequence_ratio(i), batch.zscore(i)
        free = w * r + (1 - w) * s
        held = w * min(max(r, 1 - band), 1 + band) + (1 - w) * min(max(s, 1 - low), 1 + high)
        return -min(free * a, held * a)

    return batch.mean_of_token_means(loss)


@pytest.mark.parametrize("recipe, oracle, far", [
    (reinforce_pp.reinforce_pp(group_size=2), oracle_reinforce_pp, 1),
    (reinforce_pp.reinforce_pp(group_size=2, beta=0.3, discount=0.9),
     functools.partial(oracle_reinforce_pp, beta=0.3, discount=0.9), 1),
    (reinforce_pp.reinforce_pp(group_size=2, beta=0.0), functools.partial(oracle_reinforce_pp, beta=0.0), 1),
    (reinforce_pp_baseline.reinforce_pp_baseline(), oracle_reinforce_pp_baseline, 1),
    (reinforce_pp_baseline.reinforce_pp_baseline(beta=0.3),
     functools.partial(oracle_reinforce_pp_baseline, beta=0.3), 1),
    (ppo_dual_clip.ppo_dual_clip(), oracle_dual_clip, 15),
    (dr_grpo.dr_grpo(), oracle_dr_grpo, 1),
    (dr_grpo.dr_grpo(length=6), functools.partial(oracle_dr_grpo, length=6), 1),
    (gspo.gspo(), oracle_gspo, 0.01),
    (gspo.gspo(clip_low=0.1, clip_high=0.15), functools.partial(oracle_gspo, low=0.1, high=0.15), 1),
    (gspo_token.gspo_token(), oracle_gspo, 0.01),
    (gspo_token.gspo_token(clip_low=0.1, clip_high=0.15), functools.partial(oracle_gspo, low=0.1, high=0.15), 1),
    (luspo.luspo(), oracle_luspo, 0.01),
    (cispo.cispo(), oracle_cispo, 6),
    (cispo.cispo(cap=1.3), functools.partial(oracle_cispo, cap=1.3), 1),
    (gmpo.gmpo(), oracle_gmpo, 3),
    (gmpo.gmpo(clip_low=0.1, clip_high=0.2), functools.partial(oracle_gmpo, low=0.1, high=0.2), 1),
    (sapo_soft_gate.sapo_soft_gate(), oracle_sapo, 2),
    (sapo_soft_gate.sapo_soft_gate(positive=3.0, negative=5.0),
     functools.partial(oracle_sapo, positive=3.0, negative=5.0), 1),
    (dhpo.dhpo(), oracle_dhpo, 1),
    (dhpo.dhpo(share=0.2, clip=0.1, sequence_clip_low=0.05, sequence_clip_high=0.08),
     functools.partial(oracle_dhpo, share=0.2, band=0.1, low=0.05, high=0.08), 1),
    (dhpo_entropy.dhpo_entropy(), functools.partial(oracle_dhpo, share=None), 1),
], ids=lambda value: getattr(value, "name", None))
def test_the_loss_is_that_of_the_formula_sheet(recipe, oracle, far):
    batch = Batch(recipe, far)
    x, policy = batch.arrays
    loss, _ = jax.jit(lambda policy, x: update.batch_loss(recipe, policy, x))(policy, x)
    np.testing.assert_allclose(loss, oracle(batch), rtol=1e-5, atol=1e-6)
