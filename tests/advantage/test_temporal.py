"""Credit along a sequence against backward loops over Python floats; what the mask leaves out is NaN."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.advantage import temporal
from tests import numeric

# Tool output in the middle, padding at the end, a row with nothing, one token, everything.
MASK = np.array([[1, 1, 0, 0, 1, 1, 0], [0, 1, 0, 1, 0, 0, 0], [0] * 7, [0, 0, 1, 0, 0, 0, 0], [1] * 7], bool)
REWARD = np.where(MASK, numeric.normal(0, 5, 7), np.nan)
VALUES = np.where(MASK, numeric.normal(1, 5, 7), np.nan)
DISCOUNT, DECAY = 0.9, 0.8


def oracle_gae(discount, decay, cut=(False,) * 5):
    """With V after a row that is cut equal to V before its last token."""
    out = np.zeros(MASK.shape)
    for i in range(MASK.shape[0]):
        chosen = [t for t in range(MASK.shape[1]) if MASK[i, t]]
        value, advantage = float(VALUES[i, chosen[-1]]) if cut[i] and chosen else 0.0, 0.0
        for t in reversed(range(MASK.shape[1])):
            if MASK[i, t]:
                delta = float(REWARD[i, t]) + discount * value - float(VALUES[i, t])
                advantage = delta + discount * decay * advantage
                value = float(VALUES[i, t])
                out[i, t] = advantage
    return out


def oracle_reward_to_go(discount):
    out = np.zeros(MASK.shape)
    for i in range(MASK.shape[0]):
        chosen = [t for t in range(MASK.shape[1]) if MASK[i, t]]
        for k, t in enumerate(chosen):
            out[i, t] = sum(discount**d * float(REWARD[i, u]) for d, u in enumerate(chosen[k:]))
    return out


def test_gae_against_loops():
    found = numeric.in_float64(temporal.gae, REWARD, VALUES, MASK, DISCOUNT, DECAY)
    np.testing.assert_allclose(found, oracle_gae(DISCOUNT, DECAY), rtol=1e-12)


def test_reward_to_go_against_loops():
    found = numeric.in_float64(temporal.reward_to_go, REWARD, MASK, DISCOUNT)
    np.testing.assert_allclose(found, oracle_reward_to_go(DISCOUNT), rtol=1e-12)


def test_lambda_return_is_advantage_and_value():
    found = numeric.in_float64(temporal.lambda_return, REWARD, VALUES, MASK, DISCOUNT, DECAY)
    np.testing.assert_allclose(found, oracle_gae(DISCOUNT, DECAY) + np.where(MASK, VALUES, 0.0), rtol=1e-12)


def test_with_decay_one_the_values_cancel_from_the_return():
    found = numeric.in_float64(temporal.lambda_return, REWARD, VALUES, MASK, DISCOUNT, 1.0)
    np.testing.assert_allclose(found, oracle_reward_to_go(DISCOUNT), rtol=1e-9)


def test_worked_example():
    # Formula sheet of PPO: rewards (0, 0, 1), values (.2, .5, .6), discount 1, decay .95.
    rewards, values = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.2, 0.5, 0.6]])
    advantage = temporal.gae(rewards, values, jnp.ones((1, 3), bool), 1.0, 0.95)
    np.testing.assert_allclose(advantage, [[0.756, 0.48, 0.4]], rtol=1e-6)


def test_tool_output_between_two_turns_takes_nothing_and_no_time():
    chosen = np.flatnonzero(MASK[0])
    with_tool = temporal.gae(*map(jnp.asarray, (REWARD[:1], VALUES[:1], MASK[:1])), DISCOUNT, DECAY)
    without = temporal.gae(*(jnp.asarray(a[:1, chosen]) for a in (REWARD, VALUES, MASK)), DISCOUNT, DECAY)
    np.testing.assert_array_equal(with_tool[:, chosen], without)


def test_at_last_token():
    found = temporal.at_last_token(jnp.arange(1.0, 6.0), jnp.asarray(MASK))
    expected = np.zeros(MASK.shape)
    expected[[0, 1, 3, 4], [5, 3, 2, 6]] = [1, 2, 4, 5]
    np.testing.assert_array_equal(found, expected)


# What is not at its end yet


CUT = np.array([True, False, True, True, False])


def test_extended_gae_against_loops():
    found = numeric.in_float64(temporal.extended_gae, REWARD, VALUES, MASK, CUT, DISCOUNT, DECAY)
    np.testing.assert_allclose(found, oracle_gae(DISCOUNT, DECAY, CUT), rtol=1e-12)


def test_extended_gae_is_gae_where_nothing_is_cut():
    found = numeric.in_float64(temporal.extended_gae, REWARD, VALUES, MASK, np.zeros(5, bool), DISCOUNT, DECAY)
    np.testing.assert_array_equal(found, numeric.in_float64(temporal.gae, REWARD, VALUES, MASK, DISCOUNT, DECAY))


@pytest.mark.parametrize("cut, expected", [(True, [0.395, 0.1, 0.0]), (False, [-0.1465, -0.47, -0.6])])
def test_extended_gae_worked_example(cut, expected):
    # Formula sheet of T-PPO: no reward, values (.2, .5, .6), discount 1, decay .95; then, taken as the end.
    values = jnp.array([[0.2, 0.5, 0.6]])
    found = temporal.extended_gae(jnp.zeros((1, 3)), values, jnp.ones((1, 3), bool), jnp.array([cut]), 1.0, 0.95)
    np.testing.assert_allclose(found, [expected], rtol=1e-6, atol=1e-7)


def test_the_first_token_of_an_answer_that_goes_on_earns_nothing():
    # Formula sheet of T-PPO: l = 1, cut: A = 0, with discount 1 and no reward.
    mask = jnp.array([[False, True, False]])
    found = temporal.extended_gae(jnp.zeros((1, 3)), jnp.full((1, 3), 0.7), mask, jnp.array([True]), 1.0, 0.95)
    np.testing.assert_array_equal(found, 0.0)


@pytest.mark.parametrize("length", [1, 3, 6])
def test_a_cut_answers_advantage_is_the_whole_answers_without_what_came_later(length):
    """A_t of the whole = A_t of the first l tokens + (discount decay)^(l - t) A_l, where V_l is V_{l-1}."""
    reward, values = (numeric.normal(seed, 1, 7) for seed in (2, 3))
    values[0, length] = values[0, length - 1]
    whole = numeric.in_float64(temporal.gae, reward, values, np.ones((1, 7), bool), DISCOUNT, DECAY)
    first = np.arange(7)[None] < length
    cut = numeric.in_float64(temporal.extended_gae, reward, values, first, np.array([True]), DISCOUNT, DECAY)
    for t in range(length):
        rest = (DISCOUNT * DECAY) ** (length - t) * whole[0, length]
        np.testing.assert_allclose(cut[0, t] + rest, whole[0, t], rtol=1e-9)


@pytest.mark.parametrize("function", [
    functools.partial(temporal.gae, discount=1.0, decay=0.95),
    lambda *given: temporal.extended_gae(*given, jnp.asarray(CUT), 1.0, 0.95),
    functools.partial(temporal.lambda_return, discount=1.0, decay=0.95)])
def test_rewards_and_values_are_constants(function):
    given = (jnp.asarray(REWARD), jnp.asarray(VALUES))
    gradients = jax.grad(lambda given: function(*given, jnp.asarray(MASK)).sum())(given)
    np.testing.assert_array_equal(gradients, 0.0)


def test_discount_and_decay_may_be_traced():
    mask = jnp.asarray(MASK)
    found = jax.jit(temporal.gae)(jnp.asarray(REWARD), jnp.asarray(VALUES), mask, jnp.float32(DISCOUNT),
                                  jnp.float32(DECAY))
    np.testing.assert_allclose(found, oracle_gae(DISCOUNT, DECAY), rtol=1e-4, atol=1e-6)
