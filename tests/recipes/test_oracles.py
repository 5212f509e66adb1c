"""The first recipes as whole algorithms: loops over Python floats, written from their formula sheets."""
import math
import statistics

import jax
import numpy as np
import pytest

from rl_jax.learner import update
from rl_jax.recipes.baselines import grpo, ppo, reinforce, rloo, sft
from rl_jax.recipes.loss import dapo_decoupled_clip
from tests.recipes import toy


class Batch:
    """A toy batch as Python floats; `tokens(i)` are the positions of sequence i that the policy chose."""

    def __init__(self, recipe):
        x = toy.experience(recipe)
        policy = toy.policy(x)
        self.arrays = x, policy
        self.rows = range(x.mask.shape[0])
        self.mask, self.group = np.asarray(x.mask), np.asarray(x.group)
        self.score = [float(s) for s in x.score]
        numbers = {"old": x.rollout_logp, "logp": policy.logp, "value": policy.values, **x.given}
        self.of = {name: np.asarray(values, np.float64) for name, values in numbers.items()}

    def tokens(self, i):
        return [int(t) for t in np.flatnonzero(self.mask[i])]

    def peers(self, i):
        return [j for j in self.rows if self.group[j] == self.group[i]]

    def clipped(self, i, t, advantage, low, high):
        ratio = math.exp(self.of["logp"][i, t] - self.of["old"][i, t])
        return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)

    def token_mean(self, loss, rows=None):
        losses = [loss(i, t) for i in rows or self.rows for t in self.tokens(i)]
        return sum(losses) / len(losses)


def zscore(batch, i, reward):
    of = [reward[j] for j in batch.peers(i)]
    if len(of) == 1:
        return reward[i]
    return (reward[i] - statistics.mean(of)) / (statistics.stdev(of) + 1e-6)


def oracle_sft(batch):
    return batch.token_mean(lambda i, t: -batch.of["logp"][i, t])


def oracle_reinforce(batch, baseline=0.0):
    return sum(-(batch.score[i] - baseline) * batch.of["logp"][i, t]
               for i in batch.rows for t in batch.tokens(i)) / len(batch.rows)


def oracle_rloo(batch, beta=0.0):
    reward = list(batch.score)
    if beta:
        reward = [r - beta * sum(batch.of["old"][i, t] - batch.of["reference_logp"][i, t] for t in batch.tokens(i))
                  for i, r in enumerate(reward)]
    total = 0.0
    for i in batch.rows:
        others = [reward[j] for j in batch.peers(i) if j != i]
        advantage = reward[i] - statistics.mean(others) if others else reward[i]
        total += sum(-advantage * batch.of["logp"][i, t] for t in batch.tokens(i))
    return total / len(batch.rows)


def oracle_grpo(batch, beta=0.04, clip=0.2):
    total = 0.0
    for i in batch.rows:
        advantage = zscore(batch, i, batch.score)
        losses = []
        for t in batch.tokens(i):
            loss = batch.clipped(i, t, advantage, clip, clip)
            if beta:
                away = batch.of["logp"][i, t] - batch.of["reference_logp"][i, t]
                loss += beta * (math.exp(-away) + away - 1)
            losses.append(loss)
        total += sum(losses) / max(len(losses), 1)
    return total / len(batch.rows)


def oracle_ppo(batch, decay=0.95, clip=0.2, band=0.5):
    advantages, returns = {}, {}
    for i in batch.rows:
        value, advantage, reward = 0.0, 0.0, batch.score[i]
        for t in reversed(batch.tokens(i)):
            advantage = reward + value - batch.of["values"][i, t] + decay * advantage
            value, reward = batch.of["values"][i, t], 0.0
            advantages[i, t], returns[i, t] = advantage, advantage + value
    mean, variance = statistics.mean(advantages.values()), statistics.variance(advantages.values())

    def loss(i, t):
        white = (advantages[i, t] - mean) / math.sqrt(variance + 1e-8)
        now, old = batch.of["value"][i, t], batch.of["values"][i, t]
        near = min(max(now, old - band), old + band)
        return (batch.clipped(i, t, white, clip, clip)
                + max((now - returns[i, t]) ** 2, (near - returns[i, t]) ** 2) / 2)

    return batch.token_mean(loss)


def oracle_dapo(batch, limit=20480, buffer=4096):
    def penalty(n):
        if n <= limit - buffer:
            return 0.0
        return (limit - buffer - n) / buffer if n <= limit else -1.0

    reward = [score + penalty(len(batch.tokens(i))) for i, score in enumerate(batch.score)]
    right = [score >= 1 for score in batch.score]
    kept = [i for i in batch.rows if 0 < sum(right[j] for j in batch.peers(i)) < len(batch.peers(i))]
    assert 0 < len(kept) < len(batch.rows)
    return batch.token_mean(lambda i, t: batch.clipped(i, t, zscore(batch, i, reward), 0.2, 0.28), kept)


@pytest.mark.parametrize("recipe, oracle, options", [
    (sft.sft(), oracle_sft, {}),
    (reinforce.reinforce(), oracle_reinforce, {}),
    (reinforce.reinforce(baseline=0.4), oracle_reinforce, {"baseline": 0.4}),
    (rloo.rloo(), oracle_rloo, {}),
    (rloo.rloo(beta=0.3), oracle_rloo, {"beta": 0.3}),
    (grpo.grpo(), oracle_grpo, {}),
    (grpo.grpo(beta=0.0, clip=0.1), oracle_grpo, {"beta": 0.0, "clip": 0.1}),
    (ppo.ppo(), oracle_ppo, {}),
    (dapo_decoupled_clip.dapo_decoupled_clip(), oracle_dapo, {}),
    (dapo_decoupled_clip.dapo_decoupled_clip(limit=5, buffer=3), oracle_dapo, {"limit": 5, "buffer": 3}),
], ids=lambda value: getattr(value, "name", None))
def test_the_loss_is_that_of_the_formula_sheet(recipe, oracle, options):
    batch = Batch(recipe)
    x, policy = batch.arrays
    loss, _ = jax.jit(lambda policy, x: update.batch_loss(recipe, policy, x))(policy, x)
    np.testing.assert_allclose(loss, oracle(batch, **options), rtol=1e-5, atol=1e-6)
