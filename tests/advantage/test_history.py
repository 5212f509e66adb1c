"""DCPO's smooth advantage standardisation against loops over all stored rewards, and its formula sheet's numbers."""
import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.advantage import group, history
from tests import numeric

# Three groups of 3, 4 and 1, interleaved, ids anywhere in [0, 2N), at their 3rd, 1st and 5th use.
IDS = np.array([3, 0, 3, 0, 15, 0, 3, 0])
REWARD = numeric.normal(0, 8)
PAST = {3: (0.3, 0.7, 2.0), 0: (0.0, 0.0, 0.0), 15: (-0.2, 0.4, 4.0)}
MEAN, STD, COUNT = (np.array([PAST[g][k] for g in IDS]) for k in range(3))


def of_group(rewards):
    return statistics.mean(rewards), statistics.stdev(rewards) if len(rewards) > 1 else 0.0


def oracle_merged(mean, std, old_mean, old_std, i):
    """The sheet's update rule, i being the number of uses with this one."""
    total = ((i - 1) * old_mean + mean) / i
    variance = ((i - 1) * old_std**2 + std**2 + (i - 1) / i * (mean - old_mean) ** 2) / i
    return total, math.sqrt(variance)


def oracle_smoothed(rewards, old_mean, old_std, i):
    mean, std = of_group(rewards)
    mean_all, std_all = oracle_merged(mean, std, old_mean, old_std, i)
    credit = []
    for r in rewards:
        new = (r - mean) / std if std else 0.0
        total = (r - mean_all) / std_all if std_all else 0.0
        smooth_new, smooth_total = (i - 1) / i * new + total / i, new / i + (i - 1) / i * total
        credit.append(smooth_new if abs(smooth_new) < abs(smooth_total) else smooth_total)
    return credit


def by_rows(function):
    """An oracle of a group's rewards, for every row of the batch."""
    rows = np.zeros(8)
    for g, (mean, std, count) in PAST.items():
        rows[IDS == g] = function([float(r) for r in REWARD[IDS == g]], mean, std, count + 1)
    return rows


def test_smoothed_against_loops():
    found = numeric.in_float64(history.smoothed, REWARD, IDS, MEAN, STD, COUNT)
    np.testing.assert_allclose(found, by_rows(oracle_smoothed), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name, k", [("mean", 0), ("std", 1)])
def test_updated_against_loops(name, k):
    def found(*arguments):
        return history.updated(*arguments)[name]

    expected = by_rows(lambda rewards, *old: oracle_merged(*of_group(rewards), *old)[k])
    np.testing.assert_allclose(numeric.in_float64(found, REWARD, IDS, MEAN, STD, COUNT), expected, rtol=1e-9)
    with jax.enable_x64(True):
        new = history.updated(*map(jnp.asarray, (REWARD, IDS, MEAN, STD, COUNT)))
    np.testing.assert_array_equal(new["count"], COUNT + 1)


def worked(rewards, i):
    """Credit of one group at the prompt's i-th use, with the sheet's history."""
    n = len(rewards)
    past = [np.full(n, value) for value in (0.25, 0.5, i - 1.0)]
    return numeric.in_float64(history.smoothed, np.array(rewards, float), np.zeros(n, int), *past)


@pytest.mark.parametrize("rewards, i, expected", [
    ((1, 1, 1, 1), 2, [0.363803] * 4),
    ((1, 1, 0, 0), 2, [0.996747, 0.996747, -0.771253, -0.771253]),
    ((1, 1, 0, 0), 3, [0.988826, 0.988826, -0.700150, -0.700150])])
def test_worked_examples(rewards, i, expected):
    # Formula sheet of DCPO: history of mean .25 and deviation .5; the last of its numbers is cut, not rounded.
    np.testing.assert_allclose(worked(rewards, i), expected, atol=1e-6)


@pytest.mark.parametrize("rewards, i, mean, std", [((1, 1, 1, 1), 2, 0.625, 0.515388),
                                                   ((1, 1, 0, 0), 3, 1 / 3, 0.540062)])
def test_worked_history(rewards, i, mean, std):
    past = [jnp.full(4, value) for value in (0.25, 0.5, i - 1.0)]
    new = history.updated(jnp.array(rewards, jnp.float32), jnp.zeros(4, int), *past)
    np.testing.assert_allclose([new["mean"][0], new["std"][0], new["count"][0]], [mean, std, i], rtol=1e-5)


def test_at_the_first_use_it_is_the_zscore_without_epsilon_whatever_the_empty_memory_holds():
    ids = np.where(IDS == 15, 0, IDS)  # no group of one: there GRPO keeps the reward
    plain = numeric.in_float64(functools.partial(group.zscore, epsilon=0.0), REWARD, ids)
    for empty in (np.zeros(8), np.full(8, 7.0)):
        found = numeric.in_float64(history.smoothed, REWARD, ids, empty, empty, np.zeros(8))
        np.testing.assert_allclose(found, plain, rtol=1e-12)


def stored(steps, ddof):
    """Mean and deviation after a group per step, by the update rule."""
    mean = std = jnp.zeros(1)
    for i, rewards in enumerate(steps):
        now = (jnp.asarray([np.mean(rewards)]), jnp.asarray([np.std(rewards, ddof=ddof)]))
        mean, std = history.merged(*now, mean, std, jnp.full(1, float(i)))
    return float(mean[0]), float(std[0])


def test_the_running_mean_and_variance_are_those_of_all_stored_rewards():
    steps = numeric.normal(4, 7, 5)
    with jax.enable_x64(True):
        mean, std = stored(steps, ddof=0)
        np.testing.assert_allclose([mean, std], [steps.mean(), steps.std()], rtol=1e-12)
        mean, std = stored(steps, ddof=1)  # as DCPO has it
    variance = steps.var(axis=1, ddof=1).mean() + steps.mean(axis=1).var()
    np.testing.assert_allclose([mean, std**2], [steps.mean(), variance], rtol=1e-12)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0 / 3.0, -7.7e3])
def test_a_prompt_that_always_agrees_teaches_exactly_nothing(reward):
    past = {name: jnp.zeros(5) for name in history.NONE}
    for _ in range(4):
        arguments = jnp.full(5, reward), jnp.zeros(5, int)
        np.testing.assert_array_equal(history.smoothed(*arguments, **past), 0.0)
        past = history.updated(*arguments, **past)
    np.testing.assert_array_equal(past["std"], 0.0)
    np.testing.assert_array_equal(past["mean"], np.float32(reward))


@pytest.mark.parametrize("i", [2, 5])
def test_a_group_that_agrees_teaches_a_share_of_its_distance_from_the_history(i):
    mean_all, std_all = oracle_merged(1.0, 0.0, 0.25, 0.5, i)
    np.testing.assert_allclose(worked((1, 1, 1), i), (1 - mean_all) / std_all / i, rtol=1e-12)


def test_a_sequence_alone_is_compared_with_the_history_only():
    (found,) = worked((1.0,), 4)
    mean_all, std_all = oracle_merged(1.0, 0.0, 0.25, 0.5, 4)
    np.testing.assert_allclose(found, (1 - mean_all) / std_all / 4, rtol=1e-12)


@pytest.mark.parametrize("function", [history.smoothed, lambda *a: sum(history.updated(*a).values())])
def test_rewards_and_history_are_constants(function):
    inputs = [jnp.asarray(a, jnp.float32) for a in (REWARD, MEAN, STD, COUNT)]
    gradient = jax.grad(lambda inputs: function(inputs[0], jnp.asarray(IDS), *inputs[1:]).sum())(inputs)
    for values in gradient:
        np.testing.assert_array_equal(values, 0.0)


def test_an_unknown_history_is_not_taken_for_an_empty_one():
    """NaN, which the memory gives for an example that it has no row of, reaches the credit of its group only."""
    bad = [jnp.where(jnp.asarray(IDS) == 3, jnp.nan, jnp.asarray(a)) for a in (MEAN, STD, COUNT)]
    found = history.smoothed(jnp.asarray(REWARD), jnp.asarray(IDS), *bad)
    np.testing.assert_array_equal(np.isnan(found), IDS == 3)


def test_order_and_numbering_change_nothing():
    order = np.random.default_rng(1).permutation(8)
    renamed = np.array([7, 1, 2, 12, 4, 5, 6, 3, 8, 9, 10, 11, 0, 13, 14, 15])[IDS]
    straight = numeric.in_float64(history.smoothed, REWARD, IDS, MEAN, STD, COUNT)
    moved = numeric.in_float64(history.smoothed, *(a[order] for a in (REWARD, renamed, MEAN, STD, COUNT)))
    np.testing.assert_allclose(moved, straight[order], rtol=1e-9)
