import functools
import math

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.linear_logprob import blocks
from kernels_pallas.linear_logprob.op import linear_logprob
from kernels_pallas.linear_logprob.support import pack_support, unpack_support, words_for

IMPLEMENTATIONS = "reference", "xla"


@pytest.fixture(autouse=True)
def _no_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


def _arrays(rows: int, size: int, width: int = 8, seed: int = 0):
    """Hidden, vocabulary, targets and kept tokens: every target is kept, a third of the others."""
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(rows, width)).astype(np.float32)
    vocabulary = random.normal(size=(size, width)).astype(np.float32)
    targets = random.integers(0, size, rows).astype(np.int32)
    kept = random.random((rows, size)) < 1 / 3
    kept[np.arange(rows), targets] = True
    return hidden, vocabulary, targets, kept


def _loops(hidden, vocabulary, targets, kept, temperature, soft_cap):
    """Oracle: the definition in loops over Python floats (float64), from the formula alone."""
    logps, entropies = [], []
    for h, target, row in zip(hidden.astype(float), targets, kept, strict=True):
        logits = []
        for w, keep in zip(vocabulary.astype(float), row, strict=True):
            z = math.fsum(float(a) * float(b) for a, b in zip(h, w, strict=True))
            if soft_cap is not None:
                z = soft_cap * math.tanh(z / soft_cap)
            logits.append(z / temperature if keep else -math.inf)
        top = max(logits)
        normaliser = top + math.log(math.fsum(math.exp(u - top) for u in logits))
        logps.append(logits[target] - normaliser)
        probabilities = [math.exp(u - normaliser) for u in logits]
        entropies.append(-math.fsum(p * math.log(p) for p in probabilities if p > 0))
    return np.array(logps), np.array(entropies)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks small enough that little arrays have many: 2 or more row blocks, tiles of 32 tokens."""
    monkeypatch.setattr(blocks, "ONE_TILE", 40)
    monkeypatch.setattr(blocks, "TILE", 32)
    monkeypatch.setattr(blocks, "LOGITS", 64)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("size, truncated, temperature, soft_cap", [
    (7, False, 1.0, None), (7, True, 1.7, 2.0), (75, False, 0.6, None), (75, True, 0.6, None), (75, False, 1.7, 2.0)])
def test_value_is_that_of_loops_over_floats(small_blocks, implementation, size, truncated, temperature, soft_cap):
    hidden, vocabulary, targets, kept = _arrays(6, size)
    kept = kept if truncated else np.ones_like(kept)
    support = pack_support(jnp.asarray(kept)) if truncated else None
    call = jax.jit(functools.partial(linear_logprob, temperature=temperature, soft_cap=soft_cap, support=support,
                                     implementation=implementation))
    found = call(*map(jnp.asarray, (hidden, vocabulary, targets)))
    expected = _loops(hidden, vocabulary, targets, kept, temperature, soft_cap)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_uniform_logits_have_the_entropy_of_what_is_kept():
    kept = np.arange(50) < 20
    logp, entropy = linear_logprob(jnp.zeros((1, 4)), jnp.ones((50, 4)), jnp.array([3]),
                                   support=pack_support(jnp.asarray(kept[None])))
    np.testing.assert_allclose([logp[0], entropy[0]], [-math.log(20), math.log(20)], rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("soft_cap, truncated", [(None, False), (3.0, True)])
def test_gradient_is_the_central_difference_in_float64(small_blocks, implementation, soft_cap, truncated):
    hidden, vocabulary, targets, kept = _arrays(4, 45, width=3)
    kept = kept if truncated else np.ones_like(kept)
    support = pack_support(jnp.asarray(kept))
    weight = np.array([[0.7, -1.1, 0.2, 0.9], [0.4, 1.3, -0.6, 0.8]])

    def oracle(hidden, vocabulary):
        return (weight * np.stack(_loops(hidden, vocabulary, targets, kept, 0.8, soft_cap))).sum()

    def loss(hidden, vocabulary):
        results = linear_logprob(hidden, vocabulary, jnp.asarray(targets), temperature=0.8, soft_cap=soft_cap,
                                 support=support, implementation=implementation)
        return (jnp.asarray(weight, jnp.float32) * jnp.stack(results)).sum()

    found = jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(hidden), jnp.asarray(vocabulary))
    point = [hidden.astype(np.float64), vocabulary.astype(np.float64)]
    for which, gradient in enumerate(found):
        for index in list(np.ndindex(point[which].shape))[::5]:
            step = np.zeros_like(point[which])
            step[index] = 1e-5
            up, down = ([x + sign * step if i == which else x for i, x in enumerate(point)] for sign in (1, -1))
            difference = (oracle(*up) - oracle(*down)) / 2e-5
            np.testing.assert_allclose(gradient[index], difference, rtol=1e-4, atol=1e-5)


def _case(rows, size, implementation, dtype=jnp.float32, truncated=False, soft_cap=None) -> contract.Case:
    hidden, vocabulary, targets, kept = _arrays(rows, size)
    silent = np.zeros(rows, bool)
    silent[::5] = True
    kept[0] = False
    if rows > 10:
        targets[5], kept[10, targets[10]] = -100, False
    call = functools.partial(linear_logprob, temperature=0.9, soft_cap=soft_cap)
    support = pack_support(jnp.asarray(kept)) if truncated else None
    with_support = lambda name: lambda h, w, t, s: call(h, w, t, support=s, implementation=name)
    return contract.Case(
        op=with_support(implementation), reference=with_support("reference"),
        floats=(jnp.asarray(hidden, dtype), jnp.asarray(vocabulary, dtype)),
        others=(jnp.asarray(targets), support), silent=silent, row_inputs=(True, False))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("rows, size, truncated", [(12, 33, True), (12, 64, False), (13, 97, True), (24, 127, False)])
def test_contract(small_blocks, rows, size, truncated, implementation):
    contract.check(_case(rows, size, implementation, truncated=truncated))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("options", [{"soft_cap": 2.0}, {"soft_cap": 2.0, "truncated": True},
                                     {"dtype": jnp.bfloat16}, {"dtype": jnp.bfloat16, "truncated": True}])
def test_contract_with(small_blocks, options, implementation):
    contract.check(_case(24, 97, implementation, **options))


def test_contract_at_the_real_block_sizes():
    contract.check(_case(20, 2500, "xla", truncated=True))


def test_mixed_precision_keeps_each_dtype():
    hidden, vocabulary, targets, _ = _arrays(4, 20)
    args = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(vocabulary)
    loss = lambda h, w: linear_logprob(h, w, jnp.asarray(targets))[0].sum()
    assert [x.dtype for x in jax.jit(jax.grad(loss, (0, 1)))(*args)] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_target_that_is_not_kept_has_no_probability_and_no_gradient(small_blocks, implementation):
    hidden, vocabulary, targets, kept = _arrays(4, 75)
    kept[0, targets[0]] = False
    kept[1] = False
    targets[2] = 75
    support = pack_support(jnp.asarray(kept))
    call = lambda h: linear_logprob(h, jnp.asarray(vocabulary), jnp.asarray(targets), support=support,
                                    implementation=implementation)
    (logp, entropy), pull = jax.vjp(jax.jit(call), jnp.asarray(hidden))
    assert (np.isneginf(logp) == [True, True, True, False]).all()
    assert np.isfinite(entropy).all() and entropy[1] == 0
    gradient, = pull((jnp.ones(4), jnp.zeros(4)))
    assert (gradient[:3] == 0).all() and np.isfinite(gradient).all() and (gradient[3] != 0).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits_neither_overflow_nor_lose_the_entropy(small_blocks, implementation):
    vocabulary = jnp.full((75, 1), 1000.0).at[0].set(1001.0)
    logp, entropy = linear_logprob(jnp.ones((1, 1)), vocabulary, jnp.array([0]), implementation=implementation)
    expected = _loops(np.ones((1, 1)), np.asarray(vocabulary), [0], np.ones((1, 75), bool), 1.0, None)
    np.testing.assert_allclose([logp[0], entropy[0]], np.concatenate(expected), rtol=1e-6)


def test_temperature_may_be_traced_and_carries_no_gradient():
    hidden, vocabulary, targets, _ = map(jnp.asarray, _arrays(4, 20))
    for implementation in IMPLEMENTATIONS:
        call = lambda t: linear_logprob(hidden, vocabulary, targets, temperature=t, implementation=implementation)
        # the two compile to another order of rounding, and one of the values is nearly 0
        np.testing.assert_allclose(jax.jit(call)(jnp.float32(0.7)), call(0.7), rtol=1e-6, atol=1e-6)
        assert jax.grad(lambda t: call(t)[1].sum())(0.7) == 0


def test_inside_shard_map_a_replicated_vocabulary_gets_the_whole_gradient():
    hidden, vocabulary, targets, _ = map(jnp.asarray, _arrays(4, 20))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    loss = lambda h, w, t: linear_logprob(h, w, t)[0].sum()
    for check_vma in True, False:
        total = jax.shard_map(lambda *x: jax.lax.psum(loss(*x), "data"), mesh=mesh, in_specs=(rows, whole, rows),
                              out_specs=whole, check_vma=check_vma)
        found = jax.jit(jax.grad(total, (0, 1)))(hidden, vocabulary, targets)
        for x, y in zip(found, jax.jit(jax.grad(loss, (0, 1)))(hidden, vocabulary, targets), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_gradient_keeps_no_logits():
    """XLA's own analysis: temporaries at most 5 % of the gradient with all logits in memory."""
    shapes = (jax.ShapeDtypeStruct((512, 64), jnp.float32), jax.ShapeDtypeStruct((32768, 64), jnp.float32),
              jax.ShapeDtypeStruct((512,), jnp.int32))

    def temporaries(implementation):
        def loss(hidden, vocabulary, targets):
            logp, entropy = linear_logprob(hidden, vocabulary, targets, implementation=implementation)
            return logp.sum() + 0.1 * entropy.sum()

        return jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("xla") <= 0.05 * temporaries("reference")


@pytest.mark.parametrize("rows, size", [(16384, 64), (16384, 512), (16384, 2048), (2048, 151936), (17, 5000),
                                        (8191, 2048)])
def test_blocks_divide_the_rows_and_hold_whole_words(rows, size):
    chosen = blocks.choose(rows, size)
    assert rows % chosen.row_blocks == 0
    assert chosen.tile == size or chosen.tile % 32 == 0


@pytest.mark.parametrize("size", [1, 31, 32, 33, 100])
def test_support_is_a_bit_per_token(size):
    kept = np.random.default_rng(size).random((2, 3, size)) < 0.5
    words = pack_support(jnp.asarray(kept))
    assert words.shape == (2, 3, words_for(size)) and words.dtype == jnp.uint32
    for index in np.ndindex(2, 3):
        expected = [0] * words_for(size)
        for v in range(size):
            expected[v // 32] |= int(kept[(*index, v)]) << (v % 32)
        assert words[index].tolist() == expected
    assert (unpack_support(words, size) == kept).all()


def test_what_is_wrong_is_said():
    hidden, vocabulary, targets, kept = map(jnp.asarray, _arrays(4, 40))
    for options, message in [({"implementation": "fast"}, "allowed are None and .*reference.*xla"),
                             ({"temperature": 0.0}, "temperature must be positive"),
                             ({"soft_cap": -1.0}, "soft_cap must be positive"),
                             ({"support": pack_support(kept)[:, :1]}, r"ceil\(V / 32\)")]:
        with pytest.raises(ValueError, match=message):
            linear_logprob(hidden, vocabulary, targets, **options)
