"""DCPO and HAPO as whole algorithms: loops over Python floats, written from their formula sheets."""
import dataclasses
import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_jax.advantage import group
from rl_jax.learner import step, update
from rl_jax.recipe import replace
from rl_jax.recipes.loss import dapo_decoupled_clip, dcpo_dynamic_clip, hapo_heterogeneous
from rl_jax.schedule import entropy_statistics as entropies
from rl_jax.tasks.toys import addmod
from tests import numeric
from tests.learner import tiny
from tests.recipes import test_oracles, toy

dcpo, hapo = dcpo_dynamic_clip.dcpo_dynamic_clip, hapo_heterogeneous.hapo_heterogeneous
HISTORY = {"mean": np.abs(numeric.normal(0, 64)), "std": np.abs(numeric.normal(1, 64)),
           "count": np.array([2.0, 0.0, 5.0, 1.0] * 16)}


class Batch(test_oracles.Batch):
    """The toy batch; for DCPO with a history of every prompt."""

    def __init__(self, recipe):
        super().__init__(recipe)
        x, policy = self.arrays
        self.entropy = np.asarray(x.rollout_entropy, np.float64)
        self.example = np.asarray(x.example)
        if "history" in recipe.schedule.controls:
            x = dataclasses.replace(x, coefficients={"history": jax.tree.map(jnp.float32, HISTORY)})
        self.arrays = x, policy

    def dual_clipped(self, i, t, ratio, advantage, bottom, top, ceiling):
        loss = -min(ratio * advantage, min(max(ratio, bottom), top) * advantage)
        return min(loss, -ceiling * advantage) if advantage < 0 else loss


def loss_of(recipe, batch):
    x, policy = batch.arrays
    return jax.jit(lambda policy, x: update.batch_loss(recipe, policy, x)[0])(policy, x)


def smoothed(batch, i):
    """DCPO's advantage of sequence i, and the mean and deviation to be stored for its prompt."""
    rewards = [batch.score[j] for j in batch.peers(i)]
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards) if len(rewards) > 1 else 0.0
    old_mean, old_std, uses = (float(np.float32(HISTORY[name][batch.example[i]])) for name in ("mean", "std", "count"))
    uses += 1
    mean_all = ((uses - 1) * old_mean + mean) / uses
    std_all = math.sqrt(((uses - 1) * old_std**2 + std**2 + (uses - 1) / uses * (mean - old_mean) ** 2) / uses)
    new = (batch.score[i] - mean) / std if std else 0.0
    total = (batch.score[i] - mean_all) / std_all if std_all else 0.0
    both = [(uses - 1) / uses * new + total / uses, new / uses + (uses - 1) / uses * total]
    return min(reversed(both), key=abs), mean_all, std_all


def oracle_dcpo(batch, group_size=16, low=0.16, high=0.2, cap=10.0, ceiling=10.0):
    total = 0.0
    for i in batch.rows:
        advantage, losses = smoothed(batch, i)[0], []
        for t in batch.tokens(i):
            q = math.exp(batch.of["old"][i, t])
            bottom = 0.5 + 0.5 * math.sqrt(max(1 - 4 * low / q, 0))
            top = min(0.5 + 0.5 * math.sqrt(1 + 4 * high / q), cap)
            ratio = math.exp(batch.of["logp"][i, t]) / q
            losses.append(batch.dual_clipped(i, t, ratio, advantage, bottom, top, ceiling))
        total += sum(losses) / max(len(losses), 1)
    return total / (len(batch.rows) / group_size)


def heterogeneity(batch, rows, quantile=0.8):
    """h of every chosen token of these rows."""
    z = {(i, t): math.log(max(batch.entropy[i, t], 1e-12)) for i in rows for t in batch.tokens(i)}
    pivot = sorted(z.values())[round(quantile * (len(z) - 1))]
    sd = math.sqrt(sum((one - pivot) ** 2 for one in z.values()) / len(z))
    h = {at: (one - pivot) / sd for at, one in z.items()}
    above, below = max(h.values()), -min(h.values())
    return {at: one / above if one > 0 else one / below if one < 0 else 0.0 for at, one in h.items()}


def tokenwise(batch, i, reward, limit):
    def credit(rewards, std):
        return (reward[i] - statistics.fmean(rewards)) / (std + 1e-6)

    tokens = [reward[j] for j in batch.peers(i) for _ in batch.tokens(j)]
    mean, std = statistics.fmean(tokens), statistics.pstdev(tokens)
    if max(abs(r - mean) / (std + 1e-6) for r in tokens) < limit:
        return credit(tokens, std)
    answers = [reward[j] for j in batch.peers(i)]
    return credit(answers, statistics.stdev(answers))


def oracle_hapo(batch, low=0.2, high=0.2, ceiling=10.0, quantile=0.8, beta=1.0, alpha=1.0, z_max=5.0, limit=20480,
                buffer=4096):
    def penalty(n):
        return min(max((limit - buffer - n) / buffer, -1.0), 0.0)

    reward = [score + penalty(len(batch.tokens(i))) for i, score in enumerate(batch.score)]
    right = [score >= 1 for score in batch.score]
    kept = [i for i in batch.rows if 0 < sum(right[j] for j in batch.peers(i)) < len(batch.peers(i))]
    every = heterogeneity(batch, kept, quantile)

    def loss(i, t):
        h, advantage = every[i, t], tokenwise(batch, i, reward, z_max)
        below = low * (1 - alpha * h) if h <= 0 else low
        above = high * (1 + alpha * h) if h > 0 else high
        ratio = math.exp(batch.of["logp"][i, t] - batch.of["old_logp"][i, t])
        inside = 1 - below / 2 < ratio < 1 + above / 2
        if inside != (h > 0):
            advantage *= 1 + beta * h
        return batch.dual_clipped(i, t, ratio, advantage, 1 - below, 1 + above, ceiling)

    return batch.token_mean(loss, kept)


@pytest.mark.parametrize("recipe, oracle, options", [
    (dcpo(), oracle_dcpo, {}),
    (dcpo(4, clip_low=0.2, clip_high=0.28, cap=1.5, ceiling=1.2), oracle_dcpo,
     {"group_size": 4, "low": 0.2, "high": 0.28, "cap": 1.5, "ceiling": 1.2}),
    (hapo(), oracle_hapo, {}),
    (hapo(clip_low=0.5, clip_high=1.0, quantile=0.4, beta=0.6, alpha=0.3, z_max=1.1, limit=5, buffer=3), oracle_hapo,
     {"low": 0.5, "high": 1.0, "quantile": 0.4, "beta": 0.6, "alpha": 0.3, "z_max": 1.1, "limit": 5, "buffer": 3}),
    (hapo(z_max=0.0, beta=0.0, ceiling=1.6), oracle_hapo, {"z_max": 0.0, "beta": 0.0, "ceiling": 1.6}),
], ids=lambda value: getattr(value, "name", None))
def test_the_loss_is_that_of_the_formula_sheet(recipe, oracle, options):
    batch = Batch(recipe)
    np.testing.assert_allclose(loss_of(recipe, batch), oracle(batch, **options), rtol=2e-5, atol=1e-6)


def test_dcpo_remembers_every_prompt_by_its_example():
    """Also where the prompts are numbered otherwise; the failed sequence and the empty one change no other row."""
    batch = Batch(dcpo(4))
    x, policy = batch.arrays
    control = dcpo(4).schedule.controls["history"]
    table = control.update(x.coefficients["history"], x, policy, {})
    expected = {name: np.float32(column) for name, column in HISTORY.items()}
    for i in batch.rows:
        if batch.tokens(i):
            example = batch.example[i]
            expected["mean"][example], expected["std"][example] = smoothed(batch, i)[1:]
            expected["count"][example] = HISTORY["count"][example] + 1
    assert np.asarray(x.failed).sum() == 1 and not batch.tokens(0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), table, expected)
    order = np.random.default_rng(0).permutation(len(batch.rows))
    moved = jax.tree.map(lambda a: a[order], dataclasses.replace(x, prompts=None, coefficients=None))
    moved = dataclasses.replace(moved, coefficients=x.coefficients)
    same = control.update(x.coefficients["history"], moved, policy, {})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), same, table)


@pytest.mark.parametrize("past, teaches", [({"mean": 0.5, "std": 0.5, "count": 3.0}, True),
                                           ({"mean": 0.0, "std": 0.0, "count": 0.0}, False),
                                           ({"mean": 1.0, "std": 0.0, "count": 3.0}, False)])
def test_dcpo_a_group_that_agrees_teaches_once_its_history_differs(past, teaches):
    recipe = dcpo(4)
    x = toy.experience(recipe)
    x = dataclasses.replace(x, score=jnp.ones_like(x.score), reward=jnp.ones_like(x.score),
                            coefficients={"history": {name: jnp.full(64, value) for name, value in past.items()}})
    credit = np.asarray(recipe.advantage(x))
    assert (np.abs(credit[~np.asarray(x.failed)]) > 0.1).all() if teaches else (credit == 0).all()


def test_dcpo_an_example_outside_of_the_memory_does_not_pass_unnoticed():
    """Its number is NaN, so the learner skips the step and counts it."""
    recipe = dcpo(4)
    x = toy.experience(recipe)
    x = dataclasses.replace(x, example=x.example.at[4:8].set(64))
    assert not np.isfinite(update.batch_loss(recipe, toy.policy(x), x)[0])


def test_dcpo_needs_the_number_of_examples():
    with pytest.raises(ValueError, match="give initial_state examples="):
        step.initial_state(dcpo(), tiny.network(TASK), optax.sgd(0.1), jax.random.key(0))


def whole(x):
    """Every answer of one length, and the policy that sampled as the old one."""
    mask = jnp.broadcast_to(~x.failed[:, None], x.mask.shape)
    return dataclasses.replace(x, mask=mask, fresh=mask, given={**x.given, "old_logp": x.rollout_logp})


def test_hapo_all_off_is_dapo_with_population_deviations():
    off = functools.partial(hapo, tau=0.0, beta=0.0, alpha=0.0, clip_high=0.28, limit=5, buffer=3)
    dapo = dapo_decoupled_clip.dapo_decoupled_clip(limit=5, buffer=3)
    x = toy.experience(off())
    policy = toy.policy(x)

    def both(recipe, x):
        return jax.jit(jax.value_and_grad(lambda policy: update.batch_loss(recipe, policy, x)[0]))(policy)

    def same(found, expected):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected)

    population = replace(dapo, advantage=lambda x: group.zscore(x.reward, x.group, ddof=0))
    same(both(off(), whole(x)), both(population, whole(x)))
    x = dataclasses.replace(x, given={"old_logp": x.rollout_logp})  # of any length, where answers are compared
    same(both(off(z_max=0.0), x), both(dapo, x))


@pytest.mark.parametrize("on", [{"beta": 1.0}, {"alpha": 1.0}, {"z_max": 5.0}, {"quantile": 0.2, "beta": 1.0}], ids=str)
def test_hapo_each_part_changes_the_loss(on):
    off = {"beta": 0.0, "alpha": 0.0, "z_max": 0.0}
    x = toy.experience(hapo())
    x = dataclasses.replace(x, given={"old_logp": x.rollout_logp})
    without, with_it = (update.batch_loss(hapo(**options), toy.policy(x), x)[0] for options in (off, off | on))
    assert abs(float(without - with_it)) > 1e-4


TASK = addmod.addmod(4, validation_size=0, held_out_size=0)
P = 4


def ran(recipe, firsts):
    """States, experiences and prompts of real steps on the examples from each of `firsts` on."""
    run = jax.jit(step.composed(tiny.pieces(recipe, TASK, optax.sgd(0.5))))
    state = step.initial_state(recipe, tiny.network(TASK), optax.sgd(0.5), jax.random.key(0),
                               examples=len(TASK.splits["train"]))
    results = []
    for first in firsts:
        asked = tiny.prompts(TASK, P, first=first)
        state, _, x = run(state, asked)
        results.append((state.control, x, asked))
    return results


def test_dcpo_memory_through_real_steps():
    """Two batches that share two examples; the reward of every answer is stored here and all of it counted again."""
    control = None
    stored = {e: [] for e in range(len(TASK.splits["train"]))}
    for control, x, asked in ran(dcpo(4), (0, 2, 2)):
        for p, e in enumerate(np.asarray(asked.example)):
            stored[int(e)].append(np.asarray(x.reward).reshape(P, -1)[p])
    table = control["history"]
    assert sorted({len(groups) for groups in stored.values()}) == [0, 1, 2, 3]
    for e, groups in stored.items():
        groups = np.array(groups or [[0.0, 0.0]])
        mean, variance = groups.mean(), groups.var(axis=1, ddof=1).mean() + groups.mean(axis=1).var()
        found = [float(table[name][e]) for name in ("mean", "std", "count")]
        np.testing.assert_allclose(found, [mean, math.sqrt(variance), len(stored[e])], rtol=1e-5, atol=1e-6)


def test_hapo_temperatures_follow_the_step_before():
    """The first step draws from the policy itself, the second does not; statistics are those of each step's tokens."""
    recipe = replace(hapo(4, tau=0.5, resample=0), selection=None, name="all_groups")
    (first, x, _), (second, y, _) = ran(recipe, (0, 0))
    for control, one in ((first, x), (second, y)):
        expected = entropies.of_tokens(one.rollout_entropy, one.mask)
        for name, value in expected.items():
            np.testing.assert_allclose(control["entropies"][name], value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(x.rollout_logp, x.old_logp, atol=1e-4)
    assert np.abs(np.asarray(y.rollout_logp - y.old_logp)).max() > 1e-2
