"""Weights by rank against loops, and draws by lot: their numbers, their shares, and that order decides nothing."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.selection import resample
from tests import numeric

BW = functools.partial(resample.ranked, best=1.0, worst=1.0, rest=0.0)
BR = functools.partial(resample.ranked, best=0.4, worst=0.1, rest=0.1)
BON = functools.partial(resample.ranked, best=1.0, worst=0.0, rest=0.0)
GROUP = np.random.default_rng(0).permutation(np.repeat([0, 7, 9, 30], [6, 5, 4, 1]))
REWARD = numeric.normal(1, 16)


def seeds(count, start=0):
    return jax.random.bits(jax.random.key(start), (count,), jnp.uint32)


def weights(function, reward=REWARD, group=GROUP):
    return function(jnp.asarray(reward), jnp.asarray(group), seeds(len(reward)))


@pytest.mark.parametrize("function, best, worst, rest", [(BW, 1, 1, 0), (BR, 0.4, 0.1, 0.1), (BON, 1, 0, 0)])
def test_ranks_against_loops(function, best, worst, rest):
    def oracle(i):
        of = [float(REWARD[j]) for j in range(16) if GROUP[j] == GROUP[i]]
        return best if REWARD[i] == max(of) else worst if REWARD[i] == min(of) else rest

    np.testing.assert_allclose(weights(function), [oracle(i) for i in range(16)], rtol=1e-6)


@pytest.mark.parametrize("function, expected", [
    (BW, [1, 1, 0, 1, 0, 1]), (BR, [0.4, 0.1, 0.1, 0.4, 0.1, 0.1]), (BON, [1, 0, 0, 1, 0, 0])])
def test_worked_example(function, expected):
    # Formula sheet of PF-PPO: prompts (3, 1, 2) and (9, 8, 7); BW per prompt keeps 3, 1, 9, 7, over the batch 9 and 1.
    found = weights(function, np.array([3.0, 1, 2, 9, 8, 7]), np.array([0, 0, 0, 1, 1, 1]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_power_worked_example():
    # Same sheet: |R|^2.
    np.testing.assert_allclose(resample.power(jnp.array([3.0, -1.0, 0.0, 0.5])), [9.0, 1.0, 0.0, 0.25])
    np.testing.assert_allclose(resample.power(jnp.array([3.0, -4.0]), 1.0), [3.0, 4.0])


def test_of_equal_rewards_one_is_best_and_another_worst():
    found = np.asarray(weights(functools.partial(resample.ranked, best=3.0, worst=2.0, rest=0.0), np.full(16, 0.5)))
    for group in (0, 7, 9):
        assert sorted(found[GROUP == group])[-3:] == [0.0, 2.0, 3.0]
    assert found[GROUP == 30] == 3.0  # alone it is both, and drawn whatever its weight


@pytest.mark.parametrize("function", [BW, BR, lambda reward, group, seed: resample.power(reward)])
def test_only_rows_of_the_own_group_with_weight_are_drawn(function):
    weight = np.asarray(weights(function))
    draw = jax.jit(lambda seed: resample.drawn(jnp.asarray(weight), jnp.asarray(GROUP), seed))
    for start in range(20):
        row = np.asarray(draw(seeds(16, start)))
        np.testing.assert_array_equal(GROUP[row], GROUP)
        assert (weight[row] > 0).all()


def test_who_has_no_group_and_who_has_no_weight():
    # Failed sequences are alone; in a group without any weight all are drawn from.
    group = jnp.array([0, 0, 0, 9, 1, 1, 10])
    weight = jnp.array([0.0, 0.0, 0.0, jnp.nan, 0.0, 1.0, 0.0])
    draw = jax.jit(lambda seed: resample.drawn(weight, group, seed))
    rows = np.stack([draw(seeds(7, start)) for start in range(30)])
    np.testing.assert_array_equal(rows[:, [3, 6]], [[3, 6]] * 30)
    np.testing.assert_array_equal(rows[:, [4, 5]], 5)
    assert set(rows[:, :3].ravel().tolist()) == {0, 1, 2}


def test_shares_are_those_of_the_weights():
    # 120 prompts of 4, over 4 draws of lots: 1920 draws, within 4 standard deviations.
    weight, group = jnp.tile(jnp.array([0.4, 0.1, 0.1, 0.2]), 120), jnp.repeat(jnp.arange(120), 4)
    draw = jax.jit(lambda seed: resample.drawn(weight, group, seed))
    place = np.concatenate([np.asarray(draw(seeds(480, start))) % 4 for start in range(4)])
    share, expected = np.bincount(place, minlength=4) / 1920, np.array([0.5, 0.125, 0.125, 0.25])
    assert (np.abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 1920)).all()


def test_even_weights_draw_each_row_once_on_average():
    # Formula sheet of PF-PPO: uniform weights reduce to PPO.
    draw = jax.jit(lambda seed: jnp.bincount(resample.drawn(jnp.ones(16), jnp.asarray(GROUP), seed), length=16))
    counts = np.stack([draw(seeds(16, start)) for start in range(300)])
    assert np.abs(counts.mean(axis=0) - 1).max() < 4 / np.sqrt(300)
    assert counts.max() > 2


@pytest.mark.parametrize("reward", [REWARD, np.round(REWARD), np.zeros(16)])
def test_order_and_numbering_decide_nothing(reward):
    order, names, seed = np.random.default_rng(3).permutation(16), np.random.default_rng(4).permutation(32), seeds(16)

    def run(reward, group, seed):
        kept = resample.best_and_another(reward, group, seed)
        return resample.drawn(BR(reward, group, seed), group, seed), kept

    row, kept = run(jnp.asarray(reward), jnp.asarray(GROUP), seed)
    moved, moved_kept = run(jnp.asarray(reward[order]), jnp.asarray(names[GROUP][order]), seed[order])
    np.testing.assert_array_equal(order[moved], row[order])
    np.testing.assert_array_equal(moved_kept, kept[order])


def test_the_filter_keeps_the_best_and_one_other():
    draw = jax.jit(lambda seed: resample.best_and_another(jnp.asarray(REWARD), jnp.asarray(GROUP), seed))
    kept = np.stack([draw(seeds(16, start)) for start in range(300)])
    for group, size in ((0, 6), (7, 5), (9, 4)):
        own = np.flatnonzero(GROUP == group)
        best = own[REWARD[own].argmax()]
        assert kept[:, best].all() and (kept[:, own].sum(axis=1) == 2).all()
        share = kept[:, own[own != best]].mean(axis=0)
        assert np.abs(share - 1 / (size - 1)).max() < 4 * np.sqrt(0.25 / 300)
    assert kept[:, GROUP == 30].all()


def r_squared(x, y):
    return jnp.corrcoef(x, y)[0, 1] ** 2


def learnt(best, rest, true, key, reward):
    """R^2 on the filtered answers of the first steps, and the true reward after 12 on rewards of the model."""
    prompts, size = 16, 6
    group = jnp.repeat(jnp.arange(prompts), size)

    def step(logits, key):
        draw, lots = jax.random.split(key)
        arm = jax.random.categorical(draw, logits, shape=(prompts * size,))
        seed = jax.random.bits(lots, arm.shape, jnp.uint32)
        weight = resample.ranked(reward[arm], group, seed, best=best, worst=best, rest=rest)
        arm = arm[resample.drawn(weight, group, seed)]
        advantage = (reward[arm] - reward[arm].mean()) / (reward[arm].std() + 1e-6)
        gradient = jax.grad(lambda logits: (advantage * jax.nn.log_softmax(logits)[arm]).mean())(logits)
        return logits + 1.5 * gradient, r_squared(reward[arm], true[arm])

    logits, explained = jax.lax.scan(step, jnp.zeros(reward.shape), jax.random.split(key, 12))
    return explained[:3].mean(), jax.nn.softmax(logits) @ true


def test_the_filter_that_trusts_the_right_rewards_learns_most():
    # A reward model that is right at both ends of its range and guesses between, in 8 worlds of 24 answers: how well
    # it explains the true reward of what a filter keeps ranks the filters as the true reward does that they lead to.
    reward = jnp.linspace(-1.0, 1.0, 24)
    noise = jnp.where(jnp.abs(reward) < 0.6, 1.5, 0.05)[None] * jnp.asarray(numeric.normal(5, 8, 24), jnp.float32)
    worlds = reward[None] + noise, jax.random.split(jax.random.key(0), 8)
    run = jax.jit(jax.vmap(functools.partial(learnt, reward=reward), in_axes=(None, None, 0, 0)))
    middle, everything, ends = ([float(values.mean()) for values in run(*weights, *worlds)]
                                for weights in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.0)))
    assert (np.diff([middle, everything, ends], axis=0) > 0.05).all(), (middle, everything, ends)
