"""Credit normalised over the batch, turn by turn, against loops over Python floats."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.advantage import batch
from tests import numeric

# Turns between holes: the fourth sequence has only the second turn, the fifth nothing, the sixth one beyond the last.
TURN = np.array([[0, 0, 1, 1, 1, 9], [0, 1, 1, 2, 2, 9], [0, 0, 0, 0, 0, 0], [9, 9, 1, 9, 1, 9], [0, 1, 2, 0, 1, 2],
                 [0, 3, 3, 1, 1, 1]])
MASK = np.array([[1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 1, 0], [1, 0, 1, 1, 1, 1], [0, 0, 1, 0, 1, 0], [0] * 6,
                 [1, 1, 1, 0, 1, 1]], bool)
CREDIT = numeric.normal(0, 6)
TURNS = 3


def oracle(credit, limit=3.0, smallest=1e-6):
    out = np.zeros(MASK.shape)
    for k in range(TURNS):
        active = [i for i in range(6) if any(MASK[i, t] and TURN[i, t] == k for t in range(6))]
        of = [float(credit[i]) for i in active]
        mean = sum(of) / len(of)
        std = math.sqrt(sum((x - mean) ** 2 for x in of) / (len(of) - 1)) if len(of) > 1 else 0.0
        for i in active:
            x = (credit[i] - mean) / std if std > smallest else credit[i]
            for t in range(6):
                if MASK[i, t] and TURN[i, t] == k:
                    out[i, t] = min(max(x, -limit), limit)
    return out


@pytest.mark.parametrize("scale, options", [(1.0, {}), (7.0, {}), (1.0, {"limit": 0.5}), (1.0, {"smallest": 1.2})])
def test_against_loops(scale, options):
    """Turn 2 belongs to one sequence alone, whose credit stays as it is; a large one is clipped all the same."""
    function = functools.partial(batch.zscore_per_turn, turns=TURNS, **options)
    found = numeric.in_float64(function, scale * CREDIT, TURN, MASK)
    np.testing.assert_allclose(found, oracle(scale * CREDIT, **options), rtol=1e-9, atol=1e-12)
    assert found[1, 3] == np.clip(scale * CREDIT[1], *(np.array([-1, 1]) * options.get("limit", 3.0)))


@pytest.mark.parametrize("credit", [0.0, 0.1, -0.3])
def test_equal_credit_stays_as_it_is(credit):
    # Formula sheet of SeeUPO: only if std > 1e-6, otherwise x is left as is.
    found = batch.zscore_per_turn(jnp.full(6, credit), jnp.asarray(TURN), jnp.asarray(MASK), TURNS)
    np.testing.assert_array_equal(found, np.where(MASK & (TURN < TURNS), np.float32(credit), 0.0))


def test_what_has_no_turn_is_never_read():
    """A failed sequence may hold any number; and a turn that nobody has has no credit."""
    credit = jnp.asarray(CREDIT, jnp.float32)
    straight = batch.zscore_per_turn(credit, jnp.asarray(TURN), jnp.asarray(MASK), TURNS + 4)
    found = batch.zscore_per_turn(credit.at[4].set(jnp.nan), jnp.asarray(TURN), jnp.asarray(MASK), TURNS + 4)
    np.testing.assert_array_equal(found, straight)
    nothing = batch.zscore_per_turn(credit, jnp.asarray(TURN), jnp.zeros((6, 6), bool), TURNS)
    np.testing.assert_array_equal(nothing, 0.0)


def test_credit_is_constant():
    slope = jax.grad(lambda credit: batch.zscore_per_turn(credit, jnp.asarray(TURN), jnp.asarray(MASK), TURNS).sum())(
        jnp.asarray(CREDIT, jnp.float32))
    np.testing.assert_array_equal(slope, 0.0)
