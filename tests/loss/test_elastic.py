"""ETR's half-widths against loops over Python floats, and its formula sheet's numbers."""
import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.loss import elastic
from tests import numeric

ADVANTAGE = 1.5 * numeric.normal(0, 6, 4)
GROUP = np.array([9, 2, 2, 9, 2, 5])  # the last is alone
REWARD = np.array([0.2, 1.0, -1.0, 0.9, 0.3, 0.7])
SPREAD = np.random.default_rng(1).random(6)
LOW, HIGH = 0.2, 0.28


def test_spread_against_loops():
    found = numeric.in_float64(functools.partial(elastic.spread, lowest=-1.0, highest=1.5), REWARD, GROUP)
    expected = [statistics.pvariance([float(r) for r, g in zip(REWARD, GROUP, strict=True) if g == mine]) / (2.5**2 / 4)
                for mine in GROUP]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found[-1] == 0


@pytest.mark.parametrize("right", range(9))
def test_spread_of_right_and_wrong_answers_is_4p_1_minus_p(right):
    p = right / 8
    found = elastic.spread((jnp.arange(8) < right).astype(jnp.float32), jnp.full(8, 3))
    np.testing.assert_allclose(found, 4 * p * (1 - p), rtol=1e-6)
    assert right % 8 or (found == 0).all()


def test_equal_rewards_have_no_spread_at_all():
    np.testing.assert_array_equal(elastic.spread(jnp.full(7, 0.1), jnp.zeros(7, int)), 0.0)


@pytest.mark.parametrize("lowest, highest", [(1.0, 1.0), (0, -1)])
def test_a_range_without_width_is_refused(lowest, highest):
    with pytest.raises(ValueError, match="must have a width"):
        elastic.spread(jnp.ones(2), jnp.zeros(2, int), lowest=lowest, highest=highest)


def oracle(i, t, micro, macro, centre):
    factor = (1 + micro * (math.tanh(abs(ADVANTAGE[i, t])) - centre)) * (1 + macro * SPREAD[i])
    factor = max(factor, 0.0)
    return min(LOW * factor, 0.99), HIGH * factor


FORMS = {"from 0": (elastic.by_outcome, 0.0), "centred": (elastic.by_outcome_centred, math.tanh(1.0))}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("micro, macro", [(0.5, 0.5), (0.0, 1.0), (2.0, 0.0), (9.0, 3.0)])
def test_half_widths_against_loops(form, micro, macro):
    function, centre = FORMS[form]
    found = numeric.in_float64(lambda a, v: jnp.stack(function(a, v, LOW, HIGH, micro=micro, macro=macro)),
                               ADVANTAGE, SPREAD)
    for i, t in np.ndindex(ADVANTAGE.shape):
        np.testing.assert_allclose(found[:, i, t], oracle(i, t, micro, macro, centre), rtol=1e-12)
    assert (found >= 0).all() and (found[0] <= 0.99).all()


def half_width(function, advantage, p, **options):
    advantage, v = jnp.full((1, 1), float(advantage)), jnp.full(1, 4 * p * (1 - p))
    low, high = function(advantage, v, 0.2, 0.2, **{"micro": 0.5, "macro": 0.5, **options})
    np.testing.assert_array_equal(low, high)
    return float(low[0, 0])


@pytest.mark.parametrize("advantage, p, width", [(1, 0.5, 0.414239), (0, 0.5, 0.3), (1, 0.125, 0.336569)])
def test_worked_examples(advantage, p, width):
    # Formula sheet of ETR: epsilon .2, alpha = kappa = .5.
    np.testing.assert_allclose(half_width(elastic.by_outcome, advantage, p), width, rtol=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_wider_with_credit_and_spread_and_the_same_for_both_signs(form):
    width = functools.partial(half_width, FORMS[form][0])
    assert (np.diff([width(a, 0.3) for a in (0.0, 0.1, 0.5, 1.0, 3.0)]) > 0).all()
    assert (np.diff([width(1, p) for p in (0.0, 0.125, 0.25, 0.5)]) > 0).all()
    assert width(0.7, 0.3) == width(-0.7, 0.3)


def test_the_centred_form_is_the_others_band_at_a_credit_of_one_without_alpha():
    for p in (0.0, 0.5):
        expected = 0.2 * (1 + 0.5 * 4 * p * (1 - p))
        np.testing.assert_allclose(half_width(elastic.by_outcome_centred, 1, p), expected, rtol=1e-6)
    assert half_width(elastic.by_outcome_centred, 0, 0.0) < 0.2 < half_width(elastic.by_outcome_centred, 2, 0.0)


@pytest.mark.parametrize("form", FORMS)
def test_switched_off_every_token_has_the_same_band(form):
    found = FORMS[form][0](jnp.asarray(ADVANTAGE), jnp.asarray(SPREAD), LOW, HIGH, micro=0.0, macro=0.0)
    np.testing.assert_allclose(found, np.broadcast_to(np.float32([LOW, HIGH])[:, None, None], (2, 6, 4)))


@pytest.mark.parametrize("form", FORMS)
def test_bands_are_constants(form):
    def total(advantage, reward):
        v = elastic.spread(reward, jnp.asarray(GROUP))
        return sum(side.sum() for side in FORMS[form][0](advantage, v, LOW, HIGH, micro=0.5, macro=0.5))

    for slope in jax.grad(total, argnums=(0, 1))(jnp.asarray(ADVANTAGE), jnp.asarray(REWARD)):
        np.testing.assert_array_equal(slope, 0.0)
