"""A coefficient along a cosine, against the formula."""
import math

import jax
import numpy as np
import pytest

from rl_jax.schedule import cosine


@pytest.mark.parametrize("initial, final, batches", [(1e-4, 0.0, 5), (0.2, 0.5, 4), (1.0, 0.0, 1)])
def test_against_the_formula(initial, final, batches):
    made = cosine.annealed(initial, final, batches)
    update, read = jax.jit(lambda state: made.update(state, None, None, {})), jax.jit(made.read)
    state, found = made.init(64), []
    for _ in range(batches + 3):
        found.append(float(read(state)))
        state = update(state)
    share = [(1 + math.cos(math.pi * min(k / batches, 1))) / 2 for k in range(batches + 3)]
    np.testing.assert_allclose(found, [final + (initial - final) * s for s in share], rtol=1e-5, atol=1e-10)
    assert found[batches:] == [pytest.approx(final, abs=0 if final == 0 else 1e-7)] * 3


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="batches=0"):
        cosine.annealed(1.0, 0.0, 0)
