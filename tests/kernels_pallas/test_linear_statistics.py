import functools
import math

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.linear_logprob import blocks
from kernels_pallas.linear_logprob.op import linear_logprob
from kernels_pallas.linear_logprob.statistics import NAMES, Head, linear_statistics
from kernels_pallas.linear_logprob.support import pack_support

IMPLEMENTATIONS = "reference", "xla"
NUMBERS = tuple(name for name in NAMES if name != "top")
DIFFERENTIABLE = "logp", "entropy", "log_normaliser", "divergence"


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks small enough that little arrays have many: 2 or more row blocks, tiles of 32 tokens."""
    monkeypatch.setattr(blocks, "ONE_TILE", 40)
    monkeypatch.setattr(blocks, "TILE", 32)
    monkeypatch.setattr(blocks, "LOGITS", 64)


def _arrays(rows: int, size: int, width: int = 8, seed: int = 0):
    """Two heads of widths 8 and 9, targets and kept tokens: every target is kept, a third of the others."""
    random = np.random.default_rng(seed)
    heads = [(random.normal(size=(rows, d)).astype(np.float32), random.normal(size=(size, d)).astype(np.float32))
             for d in (width, width + 1)]
    targets = random.integers(0, size, rows).astype(np.int32)
    kept = random.random((rows, size)) < 1 / 3
    kept[np.arange(rows), targets] = True
    return heads, targets, kept


def _log_softmax(hidden, vocabulary, kept, temperature, soft_cap):
    """Log-probabilities of one row's kept tokens, by id, and the log-normaliser: loops over Python floats."""
    logits = {}
    for v in np.flatnonzero(kept):
        z = math.fsum(float(a) * float(b) for a, b in zip(hidden, vocabulary[v], strict=True))
        logits[int(v)] = (z if soft_cap is None else soft_cap * math.tanh(z / soft_cap)) / temperature
    normaliser = math.log(math.fsum(map(math.exp, logits.values())))
    return {v: u - normaliser for v, u in logits.items()}, normaliser


def _loops(heads, targets, kept, options):
    """Oracle, from the table's formulas alone: every statistic by name, and each row's tokens in falling order."""
    rows = []
    for i, target in enumerate(targets):
        (p, normaliser), (q, _) = (_log_softmax(hidden[i], vocabulary, kept[i], *option)
                                   for (hidden, vocabulary), option in zip(heads, options, strict=True))
        rows.append({
            "logp": p[int(target)], "entropy": -math.fsum(math.exp(x) * x for x in p.values()),
            "log_normaliser": normaliser, "second_moment": math.fsum(math.exp(2 * x) for x in p.values()),
            "third_moment": math.fsum(math.exp(3 * x) for x in p.values()),
            "divergence": math.fsum(math.exp(x) * (x - q[v]) for v, x in p.items()),
            "top": sorted(p.items(), key=lambda pair: -pair[1])})
    return {name: [row[name] for row in rows] for name in rows[0]}


def _heads(heads, options, dtype=jnp.float32):
    return [Head(jnp.asarray(hidden, dtype), jnp.asarray(vocabulary, dtype), *option)
            for (hidden, vocabulary), option in zip(heads, options, strict=True)]


PLAIN, CAPPED = ((1.0, None), (1.0, None)), ((0.7, 2.0), (1.3, 3.0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("size, truncated, options", [(7, False, PLAIN), (7, True, CAPPED), (75, False, PLAIN),
                                                      (75, True, CAPPED), (75, True, PLAIN)])
def test_values_are_those_of_loops_over_floats(small_blocks, implementation, size, truncated, options):
    heads, targets, kept = _arrays(6, size)
    kept = kept if truncated else np.ones_like(kept)
    expected = _loops(heads, targets, kept, options)
    head, other = _heads(heads, options)
    support = pack_support(jnp.asarray(kept)) if truncated else None
    call = lambda h, g: linear_statistics(head._replace(hidden=h), jnp.asarray(targets), NAMES, support=support, top=5,
                                          other=other._replace(hidden=g), implementation=implementation)
    found = jax.jit(call)(head.hidden, other.hidden)
    assert set(found) == {"logp", "entropy", *NAMES}
    for name in ("logp", "entropy", *NUMBERS):
        assert found[name].dtype == jnp.float32
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=1e-5, err_msg=name)
    for i, pairs in enumerate(expected["top"]):
        pairs = (pairs + [(-1, -math.inf)] * 5)[:5]
        assert found["top"].tokens[i].tolist() == [v for v, _ in pairs]
        np.testing.assert_allclose(found["top"].logp[i], [x for _, x in pairs], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["log_normaliser", "divergence"])
def test_gradient_is_the_central_difference_in_float64(small_blocks, implementation, name):
    heads, targets, kept = _arrays(4, 45, width=3)
    head, other = _heads(heads, CAPPED)
    weight = np.array([0.7, -1.1, 0.2, 0.9])

    def oracle(hidden, vocabulary):
        values = _loops([(hidden, vocabulary), heads[1]], targets, kept, CAPPED)[name]
        return (weight * np.array(values)).sum()

    def loss(hidden, vocabulary):
        found = linear_statistics(head._replace(hidden=hidden, vocabulary=vocabulary), jnp.asarray(targets),
                                  ("log_normaliser", "divergence"), other=other, implementation=implementation,
                                  support=pack_support(jnp.asarray(kept)))
        return (jnp.asarray(weight, jnp.float32) * found[name]).sum()

    found = jax.jit(jax.grad(loss, (0, 1)))(head.hidden, head.vocabulary)
    point = [x.astype(np.float64) for x in heads[0]]
    for which, gradient in enumerate(found):
        for index in list(np.ndindex(point[which].shape))[::7]:
            step = np.zeros_like(point[which])
            step[index] = 1e-5
            up, down = ([x + sign * step if i == which else x for i, x in enumerate(point)] for sign in (1, -1))
            np.testing.assert_allclose(gradient[index], (oracle(*up) - oracle(*down)) / 2e-5, rtol=2e-4, atol=2e-5)


def _case(rows, size, dtype=jnp.float32, truncated=False, options=PLAIN, wanted=NUMBERS) -> contract.Case:
    """Silent rows hold garbage: a row that keeps nothing, targets that are no token or not kept."""
    heads, targets, kept = _arrays(rows, size)
    silent = np.zeros(rows, bool)
    silent[::5] = True
    kept[0], targets[5], kept[10, targets[10]] = False, -100, False
    support = pack_support(jnp.asarray(kept)) if truncated else None
    head, other = _heads(heads, options, dtype)

    def call(implementation, hidden, vocabulary, other_hidden, other_vocabulary, targets, support):
        second = other._replace(hidden=other_hidden, vocabulary=other_vocabulary) if "divergence" in wanted else None
        found = linear_statistics(head._replace(hidden=hidden, vocabulary=vocabulary), targets, wanted, other=second,
                                  support=support, implementation=implementation)
        return tuple(found[name] for name in ("logp", "entropy", *wanted))

    return contract.Case(
        op=functools.partial(call, "xla"), reference=functools.partial(call, "reference"),
        floats=(head.hidden, head.vocabulary, other.hidden, other.vocabulary), others=(jnp.asarray(targets), support),
        silent=silent, row_inputs=(True, False, True, False))


@pytest.mark.parametrize("rows, size, options", [
    (13, 64, {}), (24, 97, {"truncated": True, "options": CAPPED}),
    (24, 97, {"dtype": jnp.bfloat16, "truncated": True}), (12, 33, {"wanted": ("third_moment",)}),
    (12, 33, {"wanted": ("divergence",), "options": CAPPED})])
def test_contract(small_blocks, rows, size, options):
    contract.check(_case(rows, size, **options))


def test_contract_at_the_real_block_sizes():
    contract.check(_case(20, 2500, truncated=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_what_the_table_says_has_a_gradient_and_only_in_the_first_head(small_blocks, implementation):
    heads, targets, _ = _arrays(4, 45)
    head, other = _heads(heads, PLAIN)

    def total(weight, hidden, vocabulary, temperature, second):
        found = linear_statistics(head._replace(hidden=hidden, vocabulary=vocabulary, temperature=temperature),
                                  jnp.asarray(targets), NAMES, other=other._replace(hidden=second), top=3,
                                  implementation=implementation)
        sums = {**found, "top": found["top"].logp}
        return sum(w * sums[name].sum() for w, name in zip(weight, names, strict=True))

    names = "logp", "entropy", *NAMES
    slopes = jax.jit(jax.vmap(jax.grad(total, (1, 2, 3, 4)), (0, None, None, None, None)))(
        jnp.eye(len(names)), head.hidden, head.vocabulary, jnp.float32(0.8), other.hidden)
    for i, name in enumerate(names):
        hidden, vocabulary, temperature, second = (float(np.abs(x[i]).max()) for x in slopes)
        assert (min(hidden, vocabulary) > 1e-3) if name in DIFFERENTIABLE else (hidden == vocabulary == 0), name
        assert temperature == second == 0, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_heads_diverge_by_nothing_and_a_common_shift_of_logits_changes_nothing(small_blocks, implementation):
    (hidden, vocabulary), _ = _arrays(4, 75)[0]
    one = lambda x, last: np.concatenate([x, np.full((x.shape[0], 1), last, np.float32)], axis=1)
    head = Head(jnp.asarray(one(hidden, 1.0)), jnp.asarray(one(vocabulary, 0.0)))
    shifted = head._replace(vocabulary=jnp.asarray(one(vocabulary, 64.0)))
    call = jax.jit(lambda p, q: linear_statistics(Head(*p), jnp.zeros(4, jnp.int32), ("divergence", "second_moment"),
                                                  other=Head(*q), implementation=implementation))
    np.testing.assert_allclose(call(head[:2], head[:2])["divergence"], 0, atol=1e-6)
    # a logit near 64 is rounded to 64 * 2^-24
    np.testing.assert_allclose(call(head[:2], shifted[:2])["divergence"], 0, atol=3e-5)
    np.testing.assert_allclose(call(shifted[:2], head[:2])["second_moment"], call(head[:2], head[:2])["second_moment"],
                               rtol=3e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits_overflow_nothing(small_blocks, implementation):
    """p is 1 on the last of 75 tokens and q on the first: KL is the difference of their logits."""
    vocabulary = np.zeros((75, 1), np.float32)
    vocabulary[74] = 1000
    head, other = Head(jnp.ones((1, 1)), jnp.asarray(vocabulary)), Head(jnp.ones((1, 1)), jnp.asarray(vocabulary[::-1]))
    found = linear_statistics(head, jnp.array([74]), NAMES, other=other, top=2, implementation=implementation)
    assert {name: float(found[name][0]) for name in ("logp", "entropy", *NUMBERS)} == {
        "logp": 0, "entropy": 0, "log_normaliser": 1000, "second_moment": 1, "third_moment": 1, "divergence": 1000}
    assert found["top"].tokens.tolist() == [[74, 0]] and found["top"].logp.tolist() == [[0, -1000]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_that_keeps_nothing_is_zero_and_has_no_gradient(small_blocks, implementation):
    heads, targets, kept = _arrays(4, 75)
    kept[1] = False
    head, other = _heads(heads, CAPPED)

    def total(hidden):
        found = linear_statistics(head._replace(hidden=hidden), jnp.asarray(targets), NAMES, other=other, top=2,
                                  support=pack_support(jnp.asarray(kept)), implementation=implementation)
        return sum(found[name].sum() for name in DIFFERENTIABLE), found

    slope, found = jax.jit(jax.grad(total, has_aux=True))(head.hidden)
    assert np.isneginf(found["logp"][1]) and all(found[name][1] == 0 for name in ("entropy", *NUMBERS))
    assert np.isneginf(found["top"].logp[1]).all() and (found["top"].tokens[1] == -1).all()
    assert (slope[1] == 0).all() and np.isfinite(slope).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_of_equally_probable_tokens_the_smaller_id_comes_first(small_blocks, implementation):
    vocabulary = jnp.zeros((75, 1)).at[jnp.array([40, 70])].set(1.0)
    found = linear_statistics(Head(jnp.ones((2, 1)), vocabulary), jnp.array([0, 1]), ("top",), top=45,
                              implementation=implementation)["top"]
    assert found.tokens.tolist() == [[40, 70, *(v for v in range(45) if v != 40)][:45]] * 2


def test_logp_and_entropy_are_those_of_the_op():
    """Value and gradient, beside what is wanted."""
    heads, targets, kept = _arrays(6, 75)
    head, _ = _heads(heads, CAPPED)
    support, weight = pack_support(jnp.asarray(kept)), jnp.arange(12.0).reshape(2, 6)

    def total(call):
        def loss(hidden, vocabulary):
            return (weight * jnp.stack(call(head._replace(hidden=hidden, vocabulary=vocabulary)))).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(head.hidden, head.vocabulary)

    found = total(lambda head: tuple(linear_statistics(head, jnp.asarray(targets), ("second_moment",),
                                                       support=support)[name] for name in ("logp", "entropy")))
    expected = total(lambda head: linear_logprob(head.hidden, head.vocabulary, jnp.asarray(targets), support=support,
                                                 temperature=head.temperature, soft_cap=head.soft_cap))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_mixed_precision_keeps_each_dtype():
    heads, targets, _ = _arrays(4, 20)
    head, other = _heads(heads, PLAIN)
    loss = lambda h, w: linear_statistics(head._replace(hidden=h, vocabulary=w), jnp.asarray(targets), ("divergence",),
                                          other=other)["divergence"].sum()
    slopes = jax.jit(jax.grad(loss, (0, 1)))(head.hidden.astype(jnp.bfloat16), head.vocabulary)
    assert [x.dtype for x in slopes] == [jnp.bfloat16, jnp.float32]


def test_gradient_keeps_no_logits():
    """XLA's own analysis, all statistics: temporaries at most 5 % of the gradient with all logits in memory."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((512, 64), (32768, 64))] * 2
    targets = jax.ShapeDtypeStruct((512,), jnp.int32)

    def temporaries(implementation):
        def loss(hidden, vocabulary, other_hidden, other_vocabulary, targets):
            found = linear_statistics(Head(hidden, vocabulary), targets, NAMES, top=8, implementation=implementation,
                                      other=Head(other_hidden, other_vocabulary))
            return sum(found[name].sum() for name in DIFFERENTIABLE), found

        gradient = jax.grad(loss, (0, 1), has_aux=True)
        return jax.jit(gradient).lower(*shapes, targets).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("xla") <= 0.05 * temporaries("reference")


def test_a_statistic_that_nobody_wants_costs_nothing():
    """The program holds no second head's product, no sort and no powers."""
    heads, targets, _ = _arrays(4, 20)
    (head, other), targets = _heads(heads, PLAIN), jnp.asarray(targets)

    def counts(*wanted, **more):
        call = lambda hidden: linear_statistics(head._replace(hidden=hidden), targets, wanted, **more)
        program = str(jax.make_jaxpr(call)(head.hidden))
        return [program.count(f" {name}[") for name in ("dot_general", "top_k", "integer_pow")]

    assert counts() == [1, 0, 0]
    assert counts("divergence", other=other) == [2, 0, 0]
    products, sorts, powers = counts("second_moment", "top", top=2)
    assert products == 1 and sorts > 0 and powers > 0


def test_what_is_wrong_is_said():
    heads, targets, kept = _arrays(4, 40)
    (head, other), targets = _heads(heads, PLAIN), jnp.asarray(targets)
    short = other._replace(vocabulary=other.vocabulary[:39])
    for wanted, options, message in [
            (("logits",), {}, r"has no \['logits'\]; wanted may name .*log_normaliser.*divergence"),
            (("divergence",), {}, "compares two heads.*other is not given"),
            ((), {"other": other}, "compares two heads.*or neither"),
            (("divergence",), {"other": short}, "the same tokens, not 40 and 39"),
            (("top",), {}, "top from 1 to V = 40.*top is 0"), (("top",), {"top": 41}, "top from 1 to V = 40"),
            ((), {"top": 3}, "or neither; wanted is .* and top is 3"),
            ((), {"implementation": "pallas"}, "no implementation 'pallas'; allowed are None and .*reference.*xla"),
            (("divergence",), {"other": other._replace(soft_cap=-1.0)}, "soft_cap must be positive"),
            ((), {"support": pack_support(jnp.asarray(kept))[:, :1]}, r"ceil\(V / 32\)")]:
        with pytest.raises(ValueError, match=message):
            linear_statistics(head, targets, wanted, **options)
