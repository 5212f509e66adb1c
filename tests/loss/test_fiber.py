"""FiberPO's gates against loops over Python floats, and the decisive tests of its formula sheet."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.loss import fiber
from tests import numeric

INF = math.inf
FREE = (INF, INF, INF)
# 12 sequences: 5 groups (ids in any order), one sequence alone in its group without any token, as where a verifier
# failed, and an empty one among others; 3 domains, one of them of a single sequence.
GROUP = np.array([7, 7, 2, 2, 2, 0, 0, 0, 5, 5, 9, 23])
DOMAIN = np.array([40, 40, 40, 40, 40, -3, -3, -3, -3, -3, 8, -3])
MASK = np.random.default_rng(0).random((12, 5)) < 0.7
MASK[:, 0] = True
MASK[3] = MASK[11] = False
OLD = np.where(MASK, -np.abs(numeric.normal(1, 12, 5)), np.nan)
AWAY = np.where(MASK, 0.4 * numeric.normal(2, 12, 5) + 0.3 * numeric.normal(3, 12, 1), np.nan)
ROWS = range(len(MASK))
POSITIVE, NEGATIVE, BOUND = (0.1, 0.15, 0.08), (0.12, 0.07, 0.1), 0.2


def tokens(i):
    return [int(t) for t in np.flatnonzero(MASK[i])]


def oracle_rollback(a, budget, count):
    if abs(a) <= budget:
        return a
    if abs(a) < (1 + 1 / count) * budget:
        return math.copysign((count + 1) * budget - count * abs(a), a)
    return 0.0


def oracle_clamp(a, budget, count):
    return min(max(a, -budget), budget)


BASES = {"rollback": (fiber.rollback, oracle_rollback), "clamp": (fiber.clamp, oracle_clamp)}


def oracle_channel(x, i, sign):
    moved = [max(sign * float(x[i, t]), 0.0) for t in tokens(i)]
    return sum(moved) / max(len(moved), 1)


def oracle_trajectory(x, i, positive, negative, base):
    length = len(tokens(i))
    return base(oracle_channel(x, i, 1), positive, length) - base(oracle_channel(x, i, -1), negative, length)


def mean(values):
    return sum(values) / len(values)


def oracle_tree(x, i, positive, negative, base):
    full = [j for j in ROWS if tokens(j)]
    groups = {g: [j for j in full if GROUP[j] == g] for g in {int(GROUP[j]) for j in full}}
    mine = groups[int(GROUP[i])]
    near = [members for members in groups.values() if DOMAIN[members[0]] == DOMAIN[i]]
    total = 0.0
    for sign, budgets in ((1, positive), (-1, negative)):
        of_group = mean([oracle_channel(x, j, sign) for j in mine])
        of_domain = mean([mean([oracle_channel(x, j, sign) for j in members]) for members in near])
        total += sign * (base(of_domain, budgets[0], len(near)) + base(of_group - of_domain, budgets[1], len(mine))
                         + base(oracle_channel(x, i, sign) - of_group, budgets[2], len(tokens(i))))
    return total


def oracle_residual(x, i, t, bound):
    sign = 1 if x[i, t] >= 0 else -1
    own, other = oracle_channel(x, i, sign), oracle_channel(x, i, -sign)
    return oracle_clamp(float(x[i, t]) - sign * own, bound, 0) + oracle_clamp(sign * other, bound, 0)


def log_gate(x, base=fiber.rollback, positive=POSITIVE, negative=NEGATIVE, bound=BOUND, mask=MASK, group=GROUP,
             domain=DOMAIN):
    """log G of log-ratios x by four levels, or by two where the budgets are numbers."""
    mask = jnp.asarray(mask)
    if isinstance(positive, tuple):
        weight = fiber.tree_weight(x, mask, jnp.asarray(group), jnp.asarray(domain), positive=positive,
                                   negative=negative, base=base)
    else:
        weight = fiber.trajectory_weight(x, mask, positive=positive, negative=negative, base=base)
    return jnp.log(fiber.gated_ratio(x, mask, weight, bound))


def jacobian(function, x):
    """d function_i / d x_j in float64, as a matrix."""
    with jax.enable_x64(True):
        return np.asarray(jax.jit(jax.jacobian(function))(jnp.asarray(x, jnp.float64))).reshape(x.size, x.size)


LEVELS = {"two levels": {"positive": 0.2, "negative": 0.1}, "four levels": {}}


@pytest.mark.parametrize("name", BASES)
def test_base_gates_against_loops(name):
    base, oracle = BASES[name]
    a = np.concatenate([np.linspace(-0.5, 0.5, 101), 0.2 * numeric.normal(4, 40)])
    count = np.random.default_rng(5).integers(1, 9, a.size).astype(float)
    found = numeric.in_float64(lambda a, k: base(a, 0.15, k), a, count)
    np.testing.assert_allclose(found, [oracle(x, 0.15, k) for x, k in zip(a, count, strict=True)], atol=1e-12)


@pytest.mark.parametrize("count", [1.0, 3.0, 50.0])
def test_rollback_is_continuous_and_odd_and_falls_with_the_slope_minus_k(count):
    def g(a):
        return fiber.rollback(a, 0.3, jnp.full(a.shape, count))

    end = (1 + 1 / count) * 0.3
    around = np.array([0.3 - 1e-9, 0.3 + 1e-9, end - 1e-9, end + 1e-9])
    np.testing.assert_allclose(numeric.in_float64(g, around), [0.3, 0.3, 0, 0], atol=1e-7)
    inside = np.array([0.1, (0.3 + end) / 2, 1.1 * end])
    np.testing.assert_allclose(numeric.in_float64(g, -inside), -numeric.in_float64(g, inside))
    np.testing.assert_allclose(numeric.gradient(g, inside), [1, -count, 0])


def test_log_ratios_are_clipped_and_hide_what_was_not_chosen():
    logp = np.where(MASK, OLD + 30 * AWAY, np.nan)
    found = numeric.in_float64(fiber.log_ratios, logp, OLD, MASK)
    expected = [[min(max(30 * float(AWAY[i, t]), -20.0), 20.0) if MASK[i, t] else 0.0 for t in range(5)] for i in ROWS]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (np.abs(found) == 20).any()
    with jax.enable_x64(True):
        new, old = jax.grad(lambda *logps: fiber.log_ratios(*logps, jnp.asarray(MASK)).sum(), argnums=(0, 1))(
            jnp.asarray(logp), jnp.asarray(OLD))
    np.testing.assert_array_equal(new, MASK & (np.abs(found) < 20))
    np.testing.assert_array_equal(old, 0.0)


def test_channels_against_loops():
    found = numeric.in_float64(lambda x, m: jnp.stack(fiber.channels(x, m)), AWAY, MASK)
    np.testing.assert_allclose(found, [[oracle_channel(AWAY, i, sign) for i in ROWS] for sign in (1, -1)], atol=1e-15)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("levels", [2, 4])
def test_weights_and_gates_against_loops(name, levels):
    base, oracle_base = BASES[name]
    x = np.where(MASK, AWAY, 0.0)
    if levels == 2:
        budgets, oracle = LEVELS["two levels"], functools.partial(oracle_trajectory, positive=0.2, negative=0.1)
    else:
        budgets, oracle = {}, functools.partial(oracle_tree, positive=POSITIVE, negative=NEGATIVE)
    found = numeric.in_float64(lambda x: log_gate(x, base, **budgets), x)
    for i in ROWS:
        expected = [oracle(x, i, base=oracle_base) + oracle_residual(x, i, t, BOUND) if MASK[i, t] else 0.0
                    for t in range(5)]
        np.testing.assert_allclose(found[i], expected, atol=1e-12)


def test_the_numbers_above_meet_every_branch():
    """Of the rollback: through, falling, shut; of the clip of the residual: inside and outside."""
    met, clipped = set(), set()

    def base(a, budget, count):
        met.add("through" if abs(a) <= budget else "shut" if abs(a) >= (1 + 1 / count) * budget else "falling")
        return 0.0

    for i in ROWS:
        if tokens(i):
            oracle_tree(AWAY, i, POSITIVE, NEGATIVE, base)
        clipped |= {abs(oracle_residual(AWAY, i, t, INF) - oracle_residual(AWAY, i, t, BOUND)) > 0 for t in tokens(i)}
    assert met == {"through", "falling", "shut"} and clipped == {True, False}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("levels", LEVELS)
def test_gradient_through_weights_and_residuals(name, levels):
    @jax.jit
    def value(x):  # each element with a factor of its own, so that nothing cancels
        return jnp.exp(log_gate(x, BASES[name][0], **LEVELS[levels])) * jnp.arange(1.0, x.size + 1).reshape(x.shape)

    x = np.where(MASK, AWAY, 0.0)
    x[~MASK] = 0.7  # what is hidden has no gradient, whatever it is
    np.testing.assert_allclose(numeric.gradient(value, x), numeric.central_difference(value, x), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(numeric.gradient(value, x)[~MASK], 0.0)


# The decisive tests of the formula sheet: T = 4, one sequence; log G, and its Jacobian in x.
EYE, QUARTER = np.eye(4), np.full((4, 4), 0.25)
LAST = np.array([[0.25, 0.25, 0, 0.25]] * 2 + [[0.25, 0.25, 1, 0.25]] + [[0.25, 0.25, 0, 0.25]])
DECISIVE = {
    "a: nothing held": ((0.1, -0.05, 0.02, 0.0), (0.2, 0.1, 0.2), (0.1, -0.05, 0.02, 0.0), EYE),
    "b: a common move passes": ((0.25,) * 4, (0.3, 0.1, 0.05), (0.25,) * 4, EYE),
    "c: rolled back": ((0.22,) * 4, (0.2, 0.1, 0.05), (0.12,) * 4, EYE - 1.25),
    "d: shut": ((0.3,) * 4, (0.2, 0.1, 0.05), (0.0,) * 4, EYE - QUARTER),
    "e: one wild token": ((0.9, 0.01, -0.02, 0.03), (0.3, 0.2, 0.1), (0.335, 0.135, 0.115, 0.135), LAST),
}


@pytest.mark.parametrize("case", DECISIVE)
def test_decisive(case):
    x, (positive, negative, bound), log_g, slopes = DECISIVE[case]
    x = np.array([x])
    gate = functools.partial(log_gate, positive=positive, negative=negative, bound=bound, mask=np.ones((1, 4), bool))
    np.testing.assert_allclose(numeric.in_float64(gate, x)[0], log_g, atol=1e-12)
    np.testing.assert_allclose(jacobian(gate, x), slopes, atol=1e-12)
    if case == "d: shut":  # the columns sum to 0: no gradient where the credit is the same on all tokens
        np.testing.assert_allclose(jacobian(gate, x).sum(axis=0), 0.0, atol=1e-12)


def test_decisive_values_of_the_gate_itself():
    for case, value in (("b: a common move passes", 1.284025), ("c: rolled back", 1.127497), ("d: shut", 1.0)):
        np.testing.assert_allclose(math.exp(DECISIVE[case][2][0]), value, rtol=1e-6)


def blocks(ids):
    """Which pairs of chosen tokens are of the same sequence, group or domain."""
    of_token = np.repeat(ids, 5)
    chosen = MASK.ravel()
    return (of_token[:, None] == of_token) & chosen[:, None] & chosen


def test_two_levels_do_not_cross_sequences_and_four_do_not_cross_domains():
    """Decisive test f, and the reconstruction's: blocks of the Jacobian are exactly 0, and only those."""
    x = np.where(MASK, AWAY, 0.0)
    two = jacobian(functools.partial(log_gate, positive=0.2, negative=0.1), x)
    four = jacobian(functools.partial(log_gate, positive=(0.15, 0.3, 0.05), negative=(0.15, 0.3, 0.05)), x)
    np.testing.assert_array_equal(two[~blocks(np.arange(12))], 0.0)
    np.testing.assert_array_equal(four[~blocks(DOMAIN)], 0.0)
    across = blocks(DOMAIN) & ~blocks(GROUP)
    assert np.abs(four[across]).max() > 0.01


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("levels", LEVELS)
def test_where_the_policy_has_not_moved_the_jacobian_is_the_identity(name, levels):
    """Exactly at x = 0, where max(x, 0) has no slope of its own, and close to it."""
    gate = functools.partial(log_gate, base=BASES[name][0], **LEVELS[levels])
    for x in (np.zeros(MASK.shape), 1e-3 * np.where(MASK, AWAY, 0.0)):
        np.testing.assert_allclose(jacobian(gate, x), np.diag(MASK.ravel().astype(float)), atol=1e-12)
        np.testing.assert_allclose(numeric.in_float64(gate, x), x, atol=1e-12)


# Numbers of the formula sheet: one domain, two groups of two; group 0 has moved by .3, group 1 not at all.
@pytest.mark.parametrize("of_group, moved, other", [(0.2, 1.349859, 1.0), (0.09, 1.161834, 1.161834)])
def test_domain_worked_example(of_group, moved, other):
    x = np.repeat([0.3, 0.3, 0.0, 0.0], 3).reshape(4, 3)
    budgets = (0.2, of_group, 0.05)
    found = numeric.in_float64(
        functools.partial(log_gate, positive=budgets, negative=budgets, bound=0.2, mask=np.ones((4, 3), bool),
                          group=np.array([0, 0, 1, 1]), domain=np.zeros(4, int)), x)
    np.testing.assert_allclose(np.exp(found), np.repeat([moved, moved, other, other], 3).reshape(4, 3), rtol=1e-6)


@pytest.mark.parametrize("huge", [1e3, INF])
@pytest.mark.parametrize("name", BASES)
def test_with_huge_budgets_the_gate_is_the_ratio(name, huge):
    x = np.where(MASK, AWAY, 0.0)
    for budgets in (huge, (huge,) * 3):
        gate = functools.partial(log_gate, base=BASES[name][0], positive=budgets, negative=budgets, bound=huge)
        np.testing.assert_allclose(numeric.in_float64(gate, x), x, atol=1e-12)
        np.testing.assert_allclose(jacobian(gate, x), np.diag(MASK.ravel().astype(float)), atol=1e-12)


def test_without_budgets_for_the_sequence_only_residuals_are_clipped():
    x = np.where(MASK, AWAY, 0.0)
    found = numeric.in_float64(functools.partial(log_gate, positive=INF, negative=INF), x)
    for i, t in zip(*np.nonzero(MASK), strict=True):
        sign = 1 if x[i, t] >= 0 else -1
        own, other = oracle_channel(x, i, sign), oracle_channel(x, i, -sign)
        np.testing.assert_allclose(found[i, t], oracle_channel(x, i, 1) - oracle_channel(x, i, -1) + oracle_clamp(
            x[i, t] - sign * own, BOUND, 0) + oracle_clamp(sign * other, BOUND, 0), atol=1e-12)


def test_without_residuals_all_tokens_of_a_sequence_share_one_weight():
    x = np.where(MASK, AWAY, 0.0)
    found = numeric.in_float64(functools.partial(log_gate, positive=0.2, negative=0.1, bound=0.0), x)
    for i in ROWS:
        expected = oracle_trajectory(x, i, 0.2, 0.1, oracle_rollback)
        np.testing.assert_allclose(found[i][MASK[i]], expected, atol=1e-12)


@pytest.mark.parametrize("name", BASES)
def test_four_levels_without_any_budget_are_two_without_any(name):
    x = np.where(MASK, 3 * AWAY, 0.0)
    four, two = (functools.partial(log_gate, base=BASES[name][0], positive=budgets, negative=budgets)
                 for budgets in (FREE, INF))
    np.testing.assert_allclose(numeric.in_float64(four, x), numeric.in_float64(two, x), atol=1e-12)
    np.testing.assert_allclose(jacobian(four, x), jacobian(two, x), atol=1e-12)


def alike(moves, sequences, length):
    """One domain of groups of one, each sequence with the same channels as the others, tokens in another order."""
    rows = [np.roll(moves, i) for i in range(sequences)]
    return np.array(rows), {"mask": np.ones((sequences, length), bool), "group": np.arange(sequences),
                            "domain": np.zeros(sequences, int)}


@pytest.mark.parametrize("name, sequences, size", [
    ("rollback", 1, 0.05), ("rollback", 1, 0.5), ("clamp", 1, 0.05), ("clamp", 1, 0.23), ("clamp", 1, 0.5),
    ("rollback", 4, 0.05), ("rollback", 4, 0.23), ("rollback", 4, 0.5), ("clamp", 4, 0.23), ("clamp", 3, 0.23)])
def test_four_levels_are_two_where_all_sequences_of_a_domain_moved_alike(name, sequences, size):
    """With the domain's budget for the sequence's; the rollback's interval is (.2, .25) for T = 4 tokens.

    A sequence alone in its domain is the simplest case. In the interval K_D must be T, as 4 is.
    """
    x, tree = alike(size * np.array([1.6, 0.8, 0.6, 1.0]), sequences, 4)
    gate = functools.partial(log_gate, base=BASES[name][0])
    expected = numeric.in_float64(functools.partial(gate, positive=0.2, negative=0.1, mask=tree["mask"]), x)
    for below in ((0.3, 0.3), (INF, INF)):
        found = functools.partial(gate, positive=(0.2, *below), negative=(0.1, *below), **tree)
        np.testing.assert_allclose(numeric.in_float64(found, x), expected, atol=1e-12)


def test_and_differ_where_one_of_those_conditions_fails():
    x, tree = alike(0.23 * np.array([1.6, 0.8, 0.6, 1.0]), 1, 4)  # rollback's interval, K_D = 1
    two = functools.partial(log_gate, positive=0.2, negative=0.1, mask=tree["mask"])
    four = functools.partial(log_gate, positive=(0.2, INF, INF), negative=(0.1, INF, INF), **tree)
    assert np.abs(numeric.in_float64(two, x) - numeric.in_float64(four, x)).max() > 0.05
    # Without budgets for domain and group the sequence's gate still starts from its group's mean, not from 0.
    x = np.where(MASK, AWAY, 0.0)
    two = numeric.in_float64(functools.partial(log_gate, positive=0.08, negative=0.1), x)
    four = numeric.in_float64(functools.partial(log_gate, positive=(INF, INF, 0.08), negative=(INF, INF, 0.1)), x)
    assert np.abs(two - four).max() > 0.05


@pytest.mark.parametrize("levels", LEVELS)
def test_empty_sequences_are_1_have_no_gradient_and_change_no_other(levels):
    gate = functools.partial(log_gate, **LEVELS[levels])
    x, full = np.where(MASK, AWAY, 0.0), MASK.any(axis=1)
    found = numeric.in_float64(gate, x)
    np.testing.assert_array_equal(found[~MASK], 0.0)
    rest = functools.partial(gate, mask=MASK[full], group=np.minimum(GROUP[full], 19), domain=DOMAIN[full])
    alone = numeric.in_float64(rest, x[full])
    np.testing.assert_allclose(found[full], alone, atol=1e-12)
    slopes = numeric.gradient(jax.jit(gate), x)
    assert np.isfinite(slopes).all() and (slopes[~MASK] == 0).all() and (slopes[~full] == 0).all()


@pytest.mark.parametrize("levels", LEVELS)
def test_finite_in_float32_where_nothing_or_everything_moved(levels):
    @jax.jit
    @jax.value_and_grad
    def run(logp, mask):
        x = fiber.log_ratios(logp, jnp.zeros(logp.shape), mask)
        return jnp.exp(log_gate(x, mask=mask, **LEVELS[levels])).sum()

    for mask in (np.zeros((12, 5), bool), MASK):
        for away in (0.0, 80.0, -80.0):
            value, slopes = run(jnp.where(jnp.asarray(MASK), away, jnp.nan), jnp.asarray(mask))
            assert np.isfinite(value) and np.isfinite(slopes).all()
            assert mask.any() or (value == 60 and (slopes == 0).all())


def test_neither_order_nor_numbering_of_groups_and_domains_matters():
    x = np.where(MASK, AWAY, 0.0)
    order = np.random.default_rng(7).permutation(12)
    numbers = np.random.default_rng(8).permutation(24)
    one = numeric.in_float64(log_gate, x)
    other = numeric.in_float64(lambda x: log_gate(x, mask=MASK[order], group=numbers[GROUP[order]],
                                                  domain=-DOMAIN[order] * 1000), x[order])
    np.testing.assert_allclose(other, one[order], atol=1e-12)
