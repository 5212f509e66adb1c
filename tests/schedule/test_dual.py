"""The price of a constraint: one step against loops, its formula sheet's lines, and where it settles."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.learner import assemble
from rl_jax.schedule import dual

INITIAL, TARGET, RATE = 0.04, 0.02, 0.1


def batch(tokens=True):
    mask = jnp.full((2, 3), tokens)
    return assemble.of_arrays(jnp.zeros((2, 3)), mask, jnp.zeros(2), jnp.zeros(2, int))


def metrics(measured):
    return {"ratio_variance": jnp.float32(measured), "loss/total": jnp.float32(9.0)}


MADE = dual.ascent(INITIAL, TARGET, RATE, "ratio_variance")
UPDATE = jax.jit(lambda state, x, measured: MADE.update(state, x, None, metrics(measured)))


def test_against_loops():
    state, price = MADE.init(64), INITIAL
    assert MADE.read(state) == np.float32(INITIAL)
    for measured in np.abs(np.random.default_rng(0).normal(size=20)) * 0.3:
        state, price = UPDATE(state, batch(), measured), max(0.0, price + RATE * (float(measured) - TARGET))
        np.testing.assert_allclose(MADE.read(state), price, rtol=1e-5)


def test_at_the_target_it_stays_above_it_rises_below_it_falls_and_never_under_0():
    # Formula sheet of R2VPO.
    state = MADE.init(64)
    assert UPDATE(state, batch(), TARGET) == state
    assert UPDATE(state, batch(), 2 * TARGET) > state > UPDATE(state, batch(), TARGET / 2)
    for _ in range(30):
        state = UPDATE(state, batch(), 0.0)
        assert state >= 0
    assert state == 0 and UPDATE(state, batch(), 1.0) > 0


def test_it_settles_at_the_price_at_which_the_target_is_met():
    """A quantity that falls with its price, V = .1 / (1 + 20 lambda): .02 at lambda = .2."""
    def step(state, _):
        state = MADE.update(state, batch(), None, {"ratio_variance": 0.1 / (1 + 20 * state)})
        return state, state

    _, prices = jax.lax.scan(step, MADE.init(64), None, length=800)
    np.testing.assert_allclose(prices[-1], 0.2, rtol=1e-2)
    assert (np.diff(prices) > -1e-7).all()


@pytest.mark.parametrize("measured", [jnp.nan, jnp.inf])
def test_what_is_not_a_number_changes_nothing(measured):
    state = UPDATE(MADE.init(64), batch(), 0.5)
    assert UPDATE(state, batch(), measured) == state


def test_a_batch_without_tokens_changes_nothing():
    assert UPDATE(MADE.init(64), batch(False), 0.0) == MADE.init(64)


def test_the_state_keeps_its_shape_and_dtype():
    state = MADE.init(64)
    new = UPDATE(state, batch(), 0.5)
    assert (new.shape, new.dtype) == (state.shape, state.dtype)


def test_no_gradient_passes():
    slope = jax.grad(lambda v: MADE.update(MADE.init(64), batch(), None, {"ratio_variance": v}))(jnp.float32(0.5))
    assert slope == 0


def test_a_metric_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="'ratio_variance'.*loss/total"):
        MADE.update(MADE.init(64), batch(), None, {"loss/total": jnp.float32(9.0)})


@pytest.mark.parametrize("initial, rate", [(-0.1, 0.1), (0.1, -0.1)])
def test_negative_prices_and_steps_are_refused(initial, rate):
    with pytest.raises(ValueError, match="neither a price"):
        dual.ascent(initial, TARGET, rate, "ratio_variance")
