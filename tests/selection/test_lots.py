"""Lots: how many are kept, that nothing but the seed decides, and that each has the same chance."""
import jax
import jax.numpy as jnp
import numpy as np

from rl_jax.selection import lots


def seeds(count, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32))


def test_as_many_bad_as_good_in_each_group():
    generator = np.random.default_rng(1)
    reward, group = generator.choice([0.0, 0.5, 1.0], 40), generator.integers(0, 8, 40)
    kept = np.asarray(lots.balanced(jnp.asarray(reward, jnp.float32), jnp.asarray(group), seeds(40)))
    dropped = 0
    for g in range(8):
        rows = np.flatnonzero(group == g)
        good = [bool(reward[i] >= sum(reward[rows]) / len(rows)) for i in rows]
        bad = len(rows) - sum(good)
        assert kept[rows][good].all()
        assert kept[rows].sum() == sum(good) + min(bad, sum(good))
        dropped += bad - min(bad, sum(good))
    assert dropped > 0


def test_the_order_of_rows_decides_nothing():
    generator = np.random.default_rng(2)
    reward, group, seed = (jnp.asarray(x) for x in (generator.normal(size=30).astype(np.float32) ** 4,
                                                    generator.integers(0, 3, 30), seeds(30)))
    order = generator.permutation(30)
    numbers = jnp.asarray(generator.permutation(60))
    straight = lots.balanced(reward, group, seed)
    assert not straight.all()
    np.testing.assert_array_equal(lots.balanced(reward[order], numbers[group][order], seed[order]), straight[order])


def test_every_bad_answer_has_the_same_chance():
    # Formula sheet of REC: on (1, 0, 0, 0) one of the three is kept.
    drawn = seeds(4 * 600, 3).reshape(600, 4)
    kept = jax.jit(jax.vmap(lambda s: lots.balanced(jnp.array([1.0, 0, 0, 0]), jnp.zeros(4, int), s)))(drawn)
    assert kept[:, 0].all() and (kept.sum(axis=1) == 2).all()
    np.testing.assert_allclose(kept[:, 1:].mean(axis=0), 1 / 3, atol=0.06)


def test_degenerate_groups_are_kept():
    # All equal (in a number whose mean rounds), alone, more good than bad.
    reward = jnp.array([0.1, 0.1, 0.1, -3.0, 1.0, 1.0, 0.0])
    np.testing.assert_array_equal(lots.balanced(reward, jnp.array([0, 0, 0, 9, 1, 1, 1]), seeds(7)), True)
