"""The scan against loops over Python floats; what the mask leaves out is NaN wherever that can be told."""
import functools
import inspect

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.discounted_scan import blocks
from kernels_pallas.discounted_scan.op import discounted_scan

IMPLEMENTATIONS = "reference", "xla", "pallas"


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks small enough that little arrays have many, and blocks of blocks."""
    monkeypatch.setattr(blocks, "ONE_BLOCK", 3)
    monkeypatch.setattr(blocks, "LONGEST_BLOCK", 4)
    monkeypatch.setattr(blocks, "STEPS_READ_TOGETHER", 2)
    monkeypatch.setattr(blocks, "LANES", 4)
    monkeypatch.setattr(blocks, "TPU_GROUPS", 2)


def _arrays(rows: int, time: int, seed: int = 0):
    """x, factor, last and a mask: row 0 is all chosen, row 1 not at all."""
    random = np.random.default_rng(seed)
    x, factor = random.normal(size=(rows, time)), random.uniform(-0.2, 1.1, size=(rows, time))
    factor[random.random((rows, time)) < 0.1] = 0
    mask = random.random((rows, time)) < 0.6
    mask[0], mask[1:2] = True, False
    return x, factor, random.normal(size=rows), mask


def _loops(x, factor, last, mask):
    """Oracle: the definition in loops over Python floats (float64)."""
    y = np.zeros(x.shape)
    for n in range(x.shape[0]):
        later = float(last[n])
        for t in reversed(range(x.shape[1])):
            later = float(x[n, t]) + float(factor[n, t]) * later if mask[n, t] else later
            y[n, t] = later
    return y


def _shrunk(rows, time, **options):
    """The op, of arrays whose unchosen entries are NaN, and the oracle's y."""
    x, factor, last, mask = _arrays(rows, time)
    expected = _loops(x, factor, last, mask)
    x, factor = np.where(mask, x, np.nan), np.where(mask, factor, np.nan)
    call = jax.jit(functools.partial(discounted_scan, **options))
    return call(jnp.asarray(x), jnp.asarray(factor), last=jnp.asarray(last), mask=jnp.asarray(mask)), expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows, time", [(1, 1), (2, 7), (5, 16), (9, 37), (17, 64)])
def test_value_is_that_of_loops_over_floats(small_blocks, implementation, rows, time):
    found, expected = _shrunk(rows, time, implementation=implementation)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("blocked", [True, False])
def test_float64_stays(request, implementation, blocked):
    if blocked:
        request.getfixturevalue("small_blocks")
    with jax.enable_x64():
        found, expected = _shrunk(5, 37, implementation=implementation)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows, time", [(1, 2048), (300, 40), (1100, 3), (4, 700)])
def test_value_at_the_real_block_sizes(implementation, rows, time):
    found, expected = _shrunk(rows, time, implementation=implementation)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_is_the_central_difference_in_float64(small_blocks, implementation):
    x, factor, last, mask = _arrays(3, 11)
    weight = np.random.default_rng(1).normal(size=x.shape)
    point = [x, factor, last]

    def loss(x, factor, last):
        y = discounted_scan(x, factor, last=last, mask=jnp.asarray(mask), implementation=implementation)
        return (jnp.asarray(weight) * y).sum()

    with jax.enable_x64():
        found = jax.jit(jax.grad(loss, (0, 1, 2)))(*map(jnp.asarray, point))
        for which, gradient in enumerate(found):
            for index in np.ndindex(point[which].shape):
                step = np.zeros_like(point[which])
                step[index] = 1e-5
                up, down = ([a + sign * step if i == which else a for i, a in enumerate(point)] for sign in (1, -1))
                difference = ((weight * _loops(*up, mask)).sum() - (weight * _loops(*down, mask)).sum()) / 2e-5
                np.testing.assert_allclose(gradient[index], difference, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_the_mask_leaves_out_gets_no_gradient_whatever_it_holds(small_blocks, implementation):
    x, factor, last, mask = _arrays(6, 13)
    scan = functools.partial(discounted_scan, last=jnp.asarray(last, jnp.float32), mask=jnp.asarray(mask),
                             implementation=implementation)
    pull = jax.jit(jax.grad(lambda x, factor: (scan(x, factor) ** 2).sum(), (0, 1)))
    for garbage in (np.nan, np.inf, -1e30):
        given = np.where(mask, x, garbage), np.where(mask, factor, garbage)
        for gradient in pull(*(jnp.asarray(a, jnp.float32) for a in given)):
            assert np.isfinite(gradient).all()
            assert (np.asarray(gradient)[~mask] == 0).all() and (np.asarray(gradient[0]) != 0).any()


def _case(rows, time, implementation, dtype=jnp.float32) -> contract.Case:
    x, factor, last, mask = _arrays(rows, time)
    silent = ~mask.any(axis=1)
    silent[2:3] = True
    x[1:2], factor[1:2] = 1e30, np.nan
    run = lambda name: lambda x, factor, last, mask: (
        discounted_scan(x, factor, last=last, mask=mask, implementation=name),)
    return contract.Case(
        op=run(implementation), reference=run("reference"),
        floats=tuple(jnp.asarray(a, dtype) for a in (x, factor, last)), others=(jnp.asarray(mask),), silent=silent,
        row_inputs=(True, True, True))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("rows, time", [(4, 3), (9, 11)])
def test_contract(small_blocks, rows, time, implementation, dtype):
    contract.check(_case(rows, time, implementation, dtype))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sums_discounts_and_what_comes_next(small_blocks, implementation):
    x, mask = jnp.arange(1.0, 7.0)[None], jnp.array([[True, False, True, False, False, True]])
    scan = functools.partial(discounted_scan, x, mask=mask, implementation=implementation)
    np.testing.assert_allclose(scan(1), [[10, 9, 9, 6, 6, 6]])
    np.testing.assert_allclose(scan(0.5), [[4, 6, 6, 6, 6, 6]])
    np.testing.assert_allclose(scan(0, last=jnp.array([9.0])), [[1, 3, 3, 6, 6, 6]])
    np.testing.assert_allclose(scan(1, last=jnp.array([9.0])), [[19, 18, 18, 15, 15, 15]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_scalar_factor_may_be_traced_and_gets_the_sum_of_the_gradients(small_blocks, implementation):
    x = jnp.asarray(_arrays(3, 10)[0], jnp.float32)
    scan = lambda factor: (discounted_scan(x, factor, implementation=implementation) ** 2).sum()
    each = jax.grad(scan)(jnp.full_like(x, 0.7))
    np.testing.assert_allclose(jax.jit(jax.grad(scan))(0.7), each.sum(), rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_steps_underflow_and_overflow_nothing(implementation):
    x = jnp.zeros((2, 4096)).at[:, 0].set(1.0)
    np.testing.assert_array_equal(discounted_scan(x, 1.0, implementation=implementation), x)


def test_the_default_on_a_cpu_is_the_recursion_and_pallas_is_a_kernel():
    arrays = [jnp.ones((3, 300))] * 2
    loss = lambda x, factor, name=None: discounted_scan(x, factor, implementation=name).sum()
    contract.check_runs_kernel(functools.partial(loss, name="pallas"), *arrays)
    assert str(jax.make_jaxpr(jax.grad(functools.partial(loss, name="pallas")))(*arrays)).count("pallas_call[") == 6
    assert "pallas_call" not in str(jax.make_jaxpr(loss)(*arrays))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # jax 0.12 says so
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("rows, time", [(512, 4096), (512, 64), (8, 32768), (1, 1), (1536, 1000), (100, 100000)])
def test_lowers_and_is_the_default_there(platform, rows, time):
    x, last = jax.ShapeDtypeStruct((rows, time), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.float32)
    mask = jax.ShapeDtypeStruct((rows, time), bool)
    scan = lambda x, factor, last, mask: discounted_scan(x, factor, last=last, mask=mask)
    contract.check_lowering(platform, scan, x, x, last, mask)
    gradient = jax.grad(lambda *given: scan(*given).sum(), (0, 1, 2))
    contract.check_lowering(platform, gradient, x, x, last, mask)


def test_inside_shard_map():
    x, factor, last, mask = (jnp.asarray(a) for a in _arrays(4, 9))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    loss = lambda x, factor, discount, mask: (
        discounted_scan(x, factor, mask=mask) + discounted_scan(x, discount)).sum()
    for check_vma in True, False:
        total = jax.shard_map(lambda *given: jax.lax.psum(loss(*given), "data"), mesh=mesh,
                              in_specs=(rows, rows, whole, rows), out_specs=whole, check_vma=check_vma)
        given = x, factor, jnp.float32(0.9), mask
        found = jax.jit(jax.grad(total, (0, 1, 2)))(*given)
        for a, b in zip(found, jax.jit(jax.grad(loss, (0, 1, 2)))(*given), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("time, block", [(1, 1), (128, 128), (129, 16), (4096, 64), (8192, 64), (10**6, 256)])
def test_long_times_are_cut_at_their_square_root(time, block):
    assert blocks.steps(time) == block


def test_what_is_wrong_is_said():
    x = jnp.ones((3, 4))
    for options, message in [({"implementation": "fast"}, "allowed are None and .*pallas.*reference.*xla"),
                             ({"factor": jnp.ones((4, 3))}, r"factor must have shape \(\) or \(3, 4\)"),
                             ({"last": jnp.ones(4)}, r"last must have shape \(3,\)"),
                             ({"mask": jnp.ones((3, 5), bool)}, r"mask must have shape \(3, 4\)"),
                             ({"x": jnp.ones((0, 4))}, "must have a row and a step")]:
        given = {"x": x, "factor": 1.0, **options}
        with pytest.raises(ValueError, match=message):  # what a user gets, who has no type checker
            inspect.unwrap(discounted_scan)(given.pop("x"), given.pop("factor"), **given)
