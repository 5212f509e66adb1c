"""Conflict tokens against loops written from the formula sheet of GTPO, and its numbers."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.weighting import conflict

RNG = np.random.default_rng(21)
# Groups of 4, 4, 3 and 1, interleaved; two tokens only, so that runs are common; holes in the mask.
GROUP = RNG.permutation(np.array([0] * 4 + [5] * 4 + [9] * 3 + [20]))
TOKENS = RNG.integers(0, 2, (12, 6))
MASK = RNG.random((12, 6)) < 0.8
MASK[3] = False
ADVANTAGE = RNG.choice([-0.5, -0.5, 0.0, 1.0, 1.0], 12)
ARRAYS = TOKENS, ADVANTAGE, GROUP, MASK
factor, per_run, inverse_count = map(jax.jit, (conflict.factor, conflict.factor_per_run, conflict.inverse_count))


def answer(i, backward):
    """Places and ids of the chosen tokens of row i, from the first or from the last."""
    places = [int(t) for t in np.flatnonzero(MASK[i])]
    return [(t, int(TOKENS[i, t])) for t in (reversed(places) if backward else places)]


def oracle_run(i, backward):
    """Places of row i in the run: until the first position where the group's signs do not meet on the token."""
    run = set()
    for position, (place, token) in enumerate(answer(i, backward)):
        signs = set()
        for j in range(12):
            other = answer(j, backward)
            if GROUP[j] == GROUP[i] and position < len(other) and other[position][1] == token:
                signs.add(float(np.sign(ADVANTAGE[j])))
        if not {1.0, -1.0} <= signs:
            break
        run.add(place)
    return run


def oracle_factor(i, t, runs, boost):
    if not any(t in run for run in runs) or ADVANTAGE[i] == 0:
        return 1.0
    return boost if ADVANTAGE[i] > 0 else 0.0


def table(oracle):
    return [[oracle(i, t) for t in range(6)] for i in range(12)]


def both(i):
    return oracle_run(i, False), oracle_run(i, True)


@pytest.mark.parametrize("function, backward", [(conflict.forward_run, False), (conflict.backward_run, True)])
def test_runs_against_loops(function, backward):
    expected = table(lambda i, t: t in oracle_run(i, backward))
    np.testing.assert_array_equal(function(*map(jnp.asarray, ARRAYS)), expected)
    assert 5 < np.sum(expected) < MASK.sum()


def test_factors_against_loops():
    arrays = tuple(map(jnp.asarray, ARRAYS))
    np.testing.assert_allclose(factor(*arrays, 3.0), table(lambda i, t: oracle_factor(i, t, both(i), 3.0)))
    np.testing.assert_allclose(per_run(*arrays, 3.0), table(
        lambda i, t: np.prod([oracle_factor(i, t, [run], 3.0) for run in both(i)])))
    counts = [len(set.union(*both(i))) if ADVANTAGE[i] else 0 for i in range(12)]
    np.testing.assert_allclose(inverse_count(*arrays), [1 / max(c, 1) for c in counts], rtol=1e-6)
    assert max(counts) > 2


def padded(*answers):
    """Ids of 5 answers to one prompt, right-padded with an id that is in use, and their mask."""
    answers = [*answers, *[()] * (5 - len(answers))]
    return (jnp.array([[*a, *[5] * (5 - len(a))] for a in answers]),
            jnp.array([[t < len(a) for t in range(5)] for a in answers]))


def factors(answers, advantage, function=factor):
    tokens, mask = padded(*answers)
    found = function(tokens, jnp.array([*advantage, *[0.0] * (5 - len(answers))]), jnp.zeros(5, int), mask)
    return [[float(f) for f in row[:len(answer)]] for row, answer in zip(found, answers, strict=False)]


@pytest.mark.parametrize("good, bad, expected", [
    ((5, 7, 9, 2), (5, 8, 9, 2), [[2, 1, 2, 2], [0, 1, 0, 0]]),
    ((5, 7, 9, 2), (5, 8, 8, 9, 2), [[2, 1, 2, 2], [0, 1, 1, 0, 0]]),  # the tail is aligned at the end
    ((1, 7, 3), (2, 7, 4), [[1, 1, 1], [1, 1, 1]]),  # the middle alone is no run
    ((5, 7), (5, 7), [[2, 2], [0, 0]]),
    ((5,), (5, 5), [[2], [0, 0]]),
    ((5, 7), (6,), [[1, 1], [1]])])  # the padding of the second has the id 5
def test_worked_examples(good, bad, expected):
    # Formula sheet of GTPO.
    assert factors([good, bad], [0.5, -0.5]) == expected


def test_a_shared_prefix_in_a_larger_group():
    # Two right answers, two wrong, one of no credit: what starts alike is kept, what differs counts as ever.
    answers = [(1, 2, 3, 9), (1, 2, 4, 8), (1, 2, 5, 7), (1, 6, 6, 6), (1, 2, 3, 6)]
    assert factors(answers, [0.6, 0.6, -0.4, -0.4, 0.0]) == [
        [2, 2, 1, 1], [2, 2, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]


def test_answers_without_credit_make_no_conflict():
    assert factors([(5, 7), (5, 7)], [0.5, 0.0]) == [[1, 1], [1, 1]]


def test_published_codes_forms():
    # A token in both runs of a good answer counts 4; the loss is divided by the number of conflict tokens, at least 1.
    answers = [(5, 7), (5, 7), (6, 6)]
    assert factors(answers, [0.5, -0.5, 0.5], per_run) == [[4, 4], [0, 0], [1, 1]]
    tokens, mask = padded(*answers)
    found = inverse_count(tokens, jnp.array([0.5, -0.5, 0.5, 0.0, 0.0]), jnp.zeros(5, int), mask)
    np.testing.assert_allclose(found, [0.5, 0.5, 1.0, 1.0, 1.0])


def test_order_and_numbering_change_nothing():
    order, names = RNG.permutation(12), RNG.permutation(24)
    straight = factor(*map(jnp.asarray, ARRAYS))
    moved = factor(*(jnp.asarray(a[order]) for a in (TOKENS, ADVANTAGE, names[GROUP], MASK)))
    np.testing.assert_array_equal(moved, straight[order])


def test_what_was_not_chosen_is_not_read_and_takes_no_place():
    tokens, mask = jnp.array([[5, 1, 7, 9], [5, 7, 3, 9]]), jnp.array([[1, 0, 1, 1], [1, 1, 0, 1]], bool)
    found = factor(tokens, jnp.array([1.0, -1.0]), jnp.zeros(2, int), mask)
    np.testing.assert_array_equal(np.asarray(found)[np.asarray(mask)], [2, 2, 2, 0, 0, 0])


def test_constant():
    def total(advantage):
        return factor(*map(jnp.asarray, (TOKENS, advantage, GROUP, MASK))).sum()

    gradient = jax.grad(total)(jnp.asarray(ADVANTAGE))
    np.testing.assert_array_equal(gradient, 0.0)
