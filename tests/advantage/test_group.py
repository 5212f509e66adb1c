"""Group statistics against loops over Python floats; degenerate groups; worked examples of the formula sheets."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.advantage import group
from tests import numeric

# Three groups of 3, 4 and 1, interleaved, with ids anywhere in [0, 2N).
IDS = np.array([3, 0, 3, 0, 15, 0, 3, 0])
REWARD = numeric.normal(0, 8)


def peers(i):
    return [float(r) for r, g in zip(REWARD, IDS, strict=True) if g == IDS[i]]


def oracle_mean(i):
    return sum(peers(i)) / len(peers(i))


def oracle_std(i, ddof):
    of = peers(i)
    if len(of) <= ddof:
        return 0.0
    return math.sqrt(sum((r - oracle_mean(i)) ** 2 for r in of) / (len(of) - ddof))


def oracle_centred(i):
    return REWARD[i] if len(peers(i)) == 1 else REWARD[i] - oracle_mean(i)


def oracle_zscore(i, ddof, epsilon):
    return REWARD[i] if len(peers(i)) == 1 else oracle_centred(i) / (oracle_std(i, ddof) + epsilon)


def oracle_leave_one_out(i):
    others = [float(REWARD[j]) for j in range(8) if IDS[j] == IDS[i] and j != i]
    return REWARD[i] - sum(others) / len(others) if others else REWARD[i]


# Which rows of REWARD were kept: two of group 3, two of group 0, and the one that is alone.
KEPT = np.array([True, True, False, True, True, False, True, False])


def kept_peers(i):
    return [float(REWARD[j]) for j in range(8) if IDS[j] == IDS[i] and KEPT[j]]


def oracle_leave_one_out_zscore(i):
    return oracle_leave_one_out(i) / (max(oracle_std(i, 0), 0.5) if len(peers(i)) > 1 else 1)


def oracle_shifted(i):
    return REWARD[i] if len(peers(i)) == 1 else REWARD[i] - (oracle_mean(i) - 0.1)


def oracle_log_mean_exp(i):
    return 0.3 * math.log(sum(math.exp(r / 0.3) for r in peers(i)) / len(peers(i)))


def oracle_with_virtual(i, count, ddof):
    of = peers(i) + [1.0] * count
    if len(peers(i)) == 1:
        return REWARD[i]
    mean = sum(of) / len(of)
    return (REWARD[i] - mean) / (math.sqrt(sum((r - mean) ** 2 for r in of) / (len(of) - ddof)) + 1e-6)


def oracle_centred_among(i):
    of = kept_peers(i)
    if not KEPT[i]:
        return 0.0
    return REWARD[i] - sum(of) / len(of) if len(of) > 1 else REWARD[i]


def oracle_zscore_among(i, ddof):
    of = kept_peers(i)
    if len(of) <= 1:
        return oracle_centred_among(i)
    mean = sum(of) / len(of)
    return oracle_centred_among(i) / (math.sqrt(sum((r - mean) ** 2 for r in of) / (len(of) - ddof)) + 1e-6)


CASES = [
    (group.size, None, lambda i: len(peers(i))),
    (group.mean, {}, oracle_mean),
    (group.std, {"ddof": 1}, lambda i: oracle_std(i, 1)),
    (group.std, {"ddof": 0}, lambda i: oracle_std(i, 0)),
    (group.centred, {}, oracle_centred),
    (group.zscore, {"ddof": 1, "epsilon": 1e-6}, lambda i: oracle_zscore(i, 1, 1e-6)),
    (group.zscore, {"ddof": 0, "epsilon": 1e-2}, lambda i: oracle_zscore(i, 0, 1e-2)),
    (group.leave_one_out, {}, oracle_leave_one_out),
    (group.leave_one_out_zscore, {"floor": 0.5}, oracle_leave_one_out_zscore),
    (group.shifted, {"shift": 0.1}, oracle_shifted),
    (group.log_mean_exp, {"temperature": 0.3}, oracle_log_mean_exp),
    (group.above_log_mean_exp, {"temperature": 0.3},
     lambda i: REWARD[i] - (oracle_log_mean_exp(i) if len(peers(i)) > 1 else 0)),
    (group.zscore_with_virtual, {"virtual": 1.0, "count": 2}, lambda i: oracle_with_virtual(i, 2, 1)),
    (group.zscore_with_virtual, {"virtual": 1.0, "ddof": 0}, lambda i: oracle_with_virtual(i, 1, 0)),
    (group.centred_among, {"kept": jnp.asarray(KEPT)}, oracle_centred_among),
    (group.zscore_among, {"kept": jnp.asarray(KEPT)}, lambda i: oracle_zscore_among(i, 0)),
    (group.zscore_among, {"kept": jnp.asarray(KEPT), "ddof": 1}, lambda i: oracle_zscore_among(i, 1)),
]
of_temperature = functools.partial(group.above_log_mean_exp, temperature=0.5)
CREDITS = [group.centred, group.zscore, group.leave_one_out, group.leave_one_out_zscore, of_temperature]


def among_all(function):
    """`function` of reward and group with every sequence kept."""
    return lambda reward, ids: function(reward, ids, jnp.ones(ids.shape, bool))


CREDITS += [among_all(group.centred_among), among_all(group.zscore_among)]
STATISTICS = [group.mean, group.std, functools.partial(group.log_mean_exp, temperature=0.5),
              functools.partial(group.shifted, shift=0.1), functools.partial(group.zscore_with_virtual, virtual=1.0)]


@pytest.mark.parametrize("function, options, oracle", CASES)
def test_against_loops(function, options, oracle):
    arguments = (IDS,) if options is None else (REWARD, IDS)
    found = numeric.in_float64(functools.partial(function, **options or {}), *arguments)
    np.testing.assert_allclose(found, [oracle(i) for i in range(8)], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function", [*STATISTICS, *CREDITS])
def test_order_and_numbering_change_nothing(function):
    order = np.random.default_rng(1).permutation(8)
    renamed = np.array([7, 1, 2, 12, 4, 5, 6, 3, 8, 9, 10, 11, 0, 13, 14, 15])[IDS]
    straight = numeric.in_float64(function, REWARD, IDS)
    np.testing.assert_allclose(numeric.in_float64(function, REWARD[order], renamed[order]), straight[order],
                               rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function", CREDITS)
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0 / 3.0, -7.7e3, 1e-20])
def test_equal_rewards_give_exactly_zero(function, reward):
    ids = jnp.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(function(jnp.full(10, reward), ids), 0.0)


@pytest.mark.parametrize("function", CREDITS)
def test_a_sequence_alone_keeps_its_reward(function):
    np.testing.assert_array_equal(function(jnp.array([0.7, 1.0, 0.0]), jnp.array([5, 0, 0]))[0], jnp.float32(0.7))


@pytest.mark.parametrize("function", CREDITS)
def test_a_bad_number_stays_in_its_group(function):
    credit = function(jnp.array([jnp.nan, 1.0, 0.0]), jnp.array([5, 0, 0]))
    assert np.isfinite(credit[1:]).all()


@pytest.mark.parametrize("function", [*STATISTICS, *CREDITS])
def test_rewards_are_constants(function):
    gradient = jax.grad(lambda r: function(r, jnp.asarray(IDS)).sum())(jnp.asarray(REWARD, jnp.float32))
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("function, expected", [
    (functools.partial(group.zscore, epsilon=0.0), [1.5, -0.5, -0.5, -0.5]),
    (functools.partial(group.zscore, epsilon=0.0, ddof=0), [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]),
    (group.leave_one_out, [1, -1 / 3, -1 / 3, -1 / 3]),
    (group.centred, [0.75, -0.25, -0.25, -0.25])])
def test_worked_examples(function, expected):
    # Formula sheets of GRPO and RLOO: R = (1, 0, 0, 0).
    found = function(jnp.array([1.0, 0, 0, 0]), jnp.zeros(4, int))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("reward, ddof, expected", [
    ([0.0] * 8, 1, [-1 / 3] * 8), ([0.0] * 8, 0, [-0.353553] * 8), ([0.0] * 4, 1, [-0.447213] * 4),
    ([1.0] * 8, 1, [0] * 8),
    ([1.0, 0, 0, 0], 1, [1.095443, -0.730295, -0.730295, -0.730295]), ([0.7], 1, [0.7])])
def test_virtual_answers_worked_examples(reward, ddof, expected):
    # Formula sheet of NGRPO: r_max = 1, one virtual answer.
    found = group.zscore_with_virtual(jnp.array(reward), jnp.zeros(len(reward), int), 1.0, ddof=ddof)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(reward) == 1 or reward[0] == reward[-1] == 1 or abs(found.sum()) > 0.5


@pytest.mark.parametrize("ddof", [0, 1])
def test_no_virtual_answers_are_grpo(ddof):
    reward, ids = jnp.asarray(REWARD, jnp.float32), jnp.asarray(IDS)
    np.testing.assert_array_equal(group.zscore_with_virtual(reward, ids, 1.0, count=0, ddof=ddof),
                                  group.zscore(reward, ids, ddof=ddof))


@pytest.mark.parametrize("temperature, baseline", [
    (0.1, 0.861384), (1.0, 0.357374), (100.0, 0.250939), (1e-3, 0.998614)])
def test_log_mean_exp_worked_example(temperature, baseline):
    # Formula sheet of REC: OPMD's baseline of (1, 0, 0, 0), mean .25; the last is 1 - .001 log 4.
    reward, ids = jnp.array([1.0, 0, 0, 0]), jnp.zeros(4, int)
    np.testing.assert_allclose(group.log_mean_exp(reward, ids, temperature), baseline, rtol=1e-4)
    np.testing.assert_allclose(group.above_log_mean_exp(reward, ids, temperature), reward - baseline, atol=1e-4)


def test_a_shifted_baseline_is_what_it_says():
    # Formula sheet of REC: AsymRE, R - (mu - .1), also where all are equal.
    found = group.shifted(jnp.array([1.0, 0, 0, 0, 0.5, 0.5]), jnp.array([0, 0, 0, 0, 1, 1]), 0.1)
    np.testing.assert_allclose(found, [0.85, -0.15, -0.15, -0.15, 0.1, 0.1], rtol=1e-6)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_what_was_dropped_does_not_count(kept):
    # Formula sheet of REC: RED-Drop on (1, 0, 0, 0) with one bad answer kept.
    reward, ids = jnp.array([1.0, 0, 0, 0]), jnp.zeros(4, int)
    mask = (jnp.arange(4) == 0) | (jnp.arange(4) == kept)
    expected = jnp.where(mask, jnp.array([0.5, -0.5, -0.5, -0.5]), 0.0)
    np.testing.assert_allclose(group.centred_among(reward, ids, mask), expected)
    np.testing.assert_allclose(group.zscore_among(reward, ids, mask, epsilon=0.0), 2 * expected)
    for function in (group.centred_among, group.zscore_among):
        np.testing.assert_array_equal(function(reward, ids, jnp.arange(4) == 0), [1, 0, 0, 0])
        np.testing.assert_array_equal(function(reward, ids, jnp.zeros(4, bool)), 0.0)
        odd = jnp.array([0.1, 0.1, 0.1, -5.0])  # equal but for what was dropped
        np.testing.assert_array_equal(function(odd, ids, jnp.arange(4) < 3), 0.0)


def test_leave_one_out_of_six():
    # Formula sheet of LOOP; its option divides by sqrt(5) / 6.
    reward, ids = jnp.array([1.0, 0, 0, 0, 0, 0]), jnp.zeros(6, int)
    np.testing.assert_allclose(group.leave_one_out(reward, ids), [1, *[-0.2] * 5], rtol=1e-5)
    np.testing.assert_allclose(group.leave_one_out_zscore(reward, ids)[0], 6 / 5**0.5, rtol=1e-5)
