import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.reward import exact


def oracle(tokens, mask, target, target_mask):
    """(match, share) of one row, from lists."""
    chosen = [t for t, m in zip(tokens, mask, strict=True) if m]
    asked = [t for t, m in zip(target, target_mask, strict=True) if m]
    hits = sum(m and a == b for a, b, m in zip(chosen, asked, [True] * len(asked)))
    return float(chosen == asked), hits / max(len(asked), 1)


@pytest.mark.parametrize("seed", range(5))
def test_match_and_share_against_lists(seed):
    random = np.random.default_rng(seed)
    shape = (200, 4)
    mask = np.arange(4) < random.integers(0, 5, 200)[:, None]
    target_mask = np.arange(4) < random.integers(0, 5, 200)[:, None]
    tokens, target = random.integers(0, 2, shape), random.integers(0, 2, shape)
    expected = np.array([oracle(*row) for row in zip(tokens, mask, target, target_mask, strict=True)])
    arrays = [jnp.asarray(a) for a in (tokens, mask, target, target_mask)]
    np.testing.assert_array_equal(exact.match(*arrays), expected[:, 0])
    np.testing.assert_allclose(exact.share(*arrays), expected[:, 1], rtol=1e-6)
    scrambled = jnp.where(arrays[1], arrays[0], 1 - arrays[0])
    np.testing.assert_array_equal(exact.match(scrambled, *arrays[1:]), expected[:, 0])
