import functools
import math

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex_core

from kernels_pallas.linear_logprob import blocks
from kernels_pallas.linear_logprob.op import linear_logprob
from kernels_pallas.linear_logprob.support import pack_support, unpack_support, words_for

IMPLEMENTATIONS = "reference", "xla", "pallas"
# jax 0.12 says so whenever it lowers for a GPU
triton_is_deprecated = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


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
    """Blocks small enough that little arrays have many: 2 or more row blocks, tiles of 32 tokens.

    A kernel's program takes 8 rows, one tile, and 4 or (bfloat16) 8 of D at a time; chunks of two tiles.
    """
    for name, value in {"ONE_TILE": 40, "TILE": 32, "LOGITS": 64, "GPU_SHAPES": ((8, 32),), "DEPTH_BYTES": 16,
                        "CHUNK_SHARE": 1.0, "CHUNK_TOKENS": 64, "CHUNK_BYTES": 3072}.items():
        monkeypatch.setattr(blocks, name, value)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("size, truncated, temperature, soft_cap", [
    (40, False, 1.0, None), (40, True, 1.7, 2.0), (75, False, 0.6, None), (75, True, 0.6, None), (75, False, 1.7, 2.0)])
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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_uniform_logits_have_the_entropy_of_what_is_kept(implementation):
    kept = np.arange(50) < 20
    logp, entropy = linear_logprob(jnp.zeros((1, 4)), jnp.ones((50, 4)), jnp.array([3]),
                                   support=pack_support(jnp.asarray(kept[None])), implementation=implementation)
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
@pytest.mark.parametrize("rows, size, options", [
    (12, 33, {"truncated": True}), (24, 64, {}),
    (13, 97, {"truncated": True, "soft_cap": 2.0}), (24, 97, {"truncated": True, "dtype": jnp.bfloat16})], ids=str)
def test_contract(small_blocks, rows, size, options, implementation):
    contract.check(_case(rows, size, implementation, **options))


@pytest.mark.parametrize("implementation, size, token_axis", [("xla", 2500, 1), ("pallas", 600, 1), ("pallas", 600, 0)])
def test_value_and_gradient_at_the_real_block_sizes(monkeypatch, implementation, size, token_axis):
    """Kernels with rows down, as on a GPU, and with tokens down, as on a TPU."""
    monkeypatch.setitem(blocks.TOKEN_AXIS, "cpu", token_axis)
    case = _case(20, size, implementation, truncated=True, soft_cap=2.0)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(2, 20)), jnp.float32)
    weight, silent = weight * ~case.silent[None], case.silent[None]

    def gradient(op):
        total = lambda *floats: (weight * jnp.where(silent, 0, jnp.stack(op(*floats, *case.others)))).sum()
        return jax.jit(jax.value_and_grad(total, (0, 1)))(*case.floats)

    for x, y in zip(*map(jax.tree.leaves, map(gradient, case[:2])), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mixed_precision_keeps_each_dtype(implementation):
    hidden, vocabulary, targets, _ = _arrays(4, 40)
    args = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(vocabulary)
    loss = lambda h, w: linear_logprob(h, w, jnp.asarray(targets), implementation=implementation)[0].sum()
    assert [x.dtype for x in jax.jit(jax.grad(loss, (0, 1)))(*args)] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_target_that_is_not_kept_has_no_probability_and_no_gradient(small_blocks, implementation):
    hidden, vocabulary, targets, kept = _arrays(4, 64)
    kept[0, targets[0]] = False
    kept[1] = False
    targets[2] = 64
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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_temperature_may_be_traced_and_carries_no_gradient(implementation):
    hidden, vocabulary, targets, _ = map(jnp.asarray, _arrays(4, 40))
    call = lambda t: linear_logprob(hidden, vocabulary, targets, temperature=t, implementation=implementation)
    slope = jax.grad(lambda t: call(t)[1].sum())
    traced, constant, gradient = jax.jit(lambda t: (call(t), call(0.7), slope(t)))(jnp.float32(0.7))
    # the two compile to another order of rounding, and one of the values is nearly 0
    np.testing.assert_allclose(traced, constant, rtol=1e-6, atol=1e-6)
    assert gradient == 0


@pytest.mark.parametrize("implementation, check_vma", [
    ("xla", True), ("xla", False), ("pallas", False)])  # jax interprets no kernel under check_vma=True
def test_inside_shard_map_a_replicated_vocabulary_gets_the_whole_gradient(implementation, check_vma):
    hidden, vocabulary, targets, _ = map(jnp.asarray, _arrays(4, 40))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    loss = lambda h, w, t: linear_logprob(h, w, t, implementation=implementation)[0].sum()
    total = jax.shard_map(lambda *x: jax.lax.psum(loss(*x), "data"), mesh=mesh, in_specs=(rows, whole, rows),
                          out_specs=whole, check_vma=check_vma)
    found = jax.jit(jax.grad(total, (0, 1)))(hidden, vocabulary, targets)
    for x, y in zip(found, jax.jit(jax.grad(loss, (0, 1)))(hidden, vocabulary, targets), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


MODELS = {"Qwen3-0.6B": (151936, 1024), "Qwen3-4B": (151936, 2560), "Llama-3.1-8B": (128256, 4096),
          "Gemma-3-4B": (262208, 2560)}


def _gradient(implementation, soft_cap=None):
    """Of a loss that reads both results."""
    def loss(hidden, vocabulary, targets, temperature, support):
        logp, entropy = linear_logprob(hidden, vocabulary, targets, temperature=temperature, support=support,
                                       soft_cap=soft_cap, implementation=implementation)
        return logp.sum() + 0.1 * entropy.sum()

    return jax.grad(loss, (0, 1))


def _shapes(rows, size, width, dtype=jnp.bfloat16, truncated=False):
    like = jax.ShapeDtypeStruct
    return (like((rows, width), dtype), like((size, width), dtype), like((rows,), jnp.int32), like((), jnp.float32),
            like((rows, words_for(size)), jnp.uint32) if truncated else None)


@triton_is_deprecated
@pytest.mark.parametrize("platform", contract.DEVICES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rows, dtype, truncated", [
    (2048, jnp.bfloat16, True), (8192, jnp.bfloat16, False), (2048, jnp.float32, False), (8192, jnp.float32, True)])
def test_value_and_gradient_lower(platform, model, rows, dtype, truncated):
    """No implementation is named: the kernels are what a GPU and a TPU get by default."""
    gradient = _gradient(None, soft_cap=30.0 if model.startswith("Gemma") else None)
    contract.check_lowering(platform, gradient, *_shapes(rows, *MODELS[model], dtype, truncated))


@triton_is_deprecated
@pytest.mark.parametrize("platform", contract.DEVICES)
@pytest.mark.parametrize("rows, size, width", [(1, 32, 8), (17, 100, 24), (640, 5000, 896), (300, 32000, 8192)])
def test_odd_shapes_lower(platform, rows, size, width):
    contract.check_lowering(platform, _gradient("pallas"), *_shapes(rows, size, width, jnp.float32, truncated=True))


def test_value_and_gradient_run_a_kernel_each():
    shapes = _shapes(8, 64, 16)
    contract.check_runs_kernel(functools.partial(linear_logprob, implementation="pallas"), *shapes[:3])
    program = str(jax.make_jaxpr(_gradient("pallas"))(*shapes))
    assert "linear_logprob_forward" in program and "linear_logprob_backward" in program


def test_gradient_keeps_no_logits():
    """XLA's own analysis, of a real model: temporaries at most 2 % of the gradient's with all logits in memory."""
    shapes = _shapes(2048, *MODELS["Qwen3-0.6B"], jnp.float32)

    def temporaries(implementation):
        compiled = jax.jit(_gradient(implementation)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(None) <= 0.02 * temporaries("reference")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rows, dtype", [(2048, jnp.bfloat16), (8192, jnp.float32), (65536, jnp.bfloat16)])
def test_kernels_keep_no_logits(model, rows, dtype):
    """No value of the program on a GPU, but arrays like the vocabulary, has 2 % of the bytes of the float32 logits.

    Of many rows: arrays like the hidden states are not counted either.
    """
    size, width = MODELS[model]
    shapes = _shapes(rows, size, width, dtype)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=contract.DEVICES["cuda"])
    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.make_jaxpr(_gradient(None))(*shapes).jaxpr
    largest = max(_values(program), key=lambda x: 0 if x.shape[-1:] == (width,) else x.size * x.dtype.itemsize)
    assert largest.size * largest.dtype.itemsize <= 0.02 * rows * size * 4, largest


def _values(jaxpr):
    """Avals of all that a program makes, kernels' insides left out."""
    for equation in jaxpr.eqns:
        yield from (x.aval for x in equation.outvars)
        if equation.primitive.name != "pallas_call":
            for inner in jex_core.jaxprs_in_params(equation.params):
                yield from _values(inner)


@pytest.mark.parametrize("rows, size", [(16384, 64), (16384, 512), (16384, 2048), (2048, 151936), (17, 5000),
                                        (8191, 2048)])
def test_blocks_divide_the_rows_and_hold_whole_words(rows, size):
    chosen = blocks.choose(rows, size)
    assert rows % chosen.row_blocks == 0
    assert chosen.tile == size or chosen.tile % 32 == 0


@pytest.mark.parametrize("platform", contract.DEVICES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rows, size, width", [
    (2048, 151936, 1024), (8192, 262208, 2560), (1, 32, 8), (640, 5000, 896), (17, 33, 4096), (300, 32000, 8192)])
def test_kernel_blocks_fit_the_chip(platform, rows, size, width, itemsize):
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=contract.DEVICES[platform])):
        assert blocks.best(size, width, itemsize) == "pallas"
        chosen = blocks.kernel(rows, size, width, itemsize)
    assert chosen.tile <= size and chosen.tile % 32 == 0
    assert -(-rows // chosen.rows) * chosen.rows <= 9 / 8 * -(-rows // 128) * 128
    if platform == "tpu":
        in_flight = 2 * (chosen.rows + chosen.tile) * width * itemsize
        assert chosen.depth == width and in_flight + 4 * chosen.rows * chosen.tile < 16 * 2**20
    else:
        in_flight = chosen.stages * (chosen.rows + chosen.tile) * chosen.depth * itemsize
        assert chosen.depth >= 16 and in_flight <= 163 * 2**10
    cut = blocks.chunks(rows, size, chosen.tile, itemsize)
    assert cut.tile % chosen.tile == 0 and cut.tile <= max(chosen.tile, 0.015 * size * 4 / itemsize)


@pytest.mark.parametrize("platform, size, width", [("tpu", 31, 8), ("cuda", 31, 8), ("tpu", 50000, 20000)])
def test_what_fits_no_kernel_gets_none_by_default(platform, size, width):
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=contract.DEVICES[platform])):
        assert blocks.best(size, width, 4) == "xla"
        with pytest.raises(ValueError, match="No kernel of linear_logprob fits"):
            jax.eval_shape(_gradient("pallas"), *_shapes(8, size, width, jnp.float32))


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
    for options, message in [({"implementation": "fast"}, "allowed are None and .*pallas.*reference.*xla"),
                             ({"temperature": 0.0}, "temperature must be positive"),
                             ({"soft_cap": -1.0}, "soft_cap must be positive"),
                             ({"support": pack_support(kept)[:, :1]}, r"ceil\(V / 32\)")]:
        with pytest.raises(ValueError, match=message):
            linear_logprob(hidden, vocabulary, targets, **options)
