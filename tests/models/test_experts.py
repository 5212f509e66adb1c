"""Every implementation against loops over Python floats, one row and one expert at a time."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import dispatch
from rl_jax.models import experts
from tests import numeric
from tests.kernels_pallas import contract

SHAPES = {"usual": (7, 5, 2), "one_row": (1, 4, 3), "one_choice, many_tiles": (70, 2, 1), "all_of_them": (6, 3, 3),
          "one_expert": (4, 1, 1)}
D, F = 3, 4
NAMES = ("dense", "tiles")
every_implementation = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(params=["cpu", "gpu", "tpu"])
def platform(request, monkeypatch):
    """Tiles as on that device, computed here."""
    monkeypatch.setattr(dispatch, "platform", lambda: request.param)


def arguments(m, x, k, seed=0):
    """(x, expert, weight, gate, up, down) in float64; expert 0 is in most rows."""
    random = np.random.default_rng(seed)
    score = random.normal(size=(m, x)) + 2 * (np.arange(x) == 0)
    expert = np.argsort(-score, axis=1)[:, :k].astype(np.int32)
    shapes = (m, D), (m, k), (x, D, F), (x, D, F), (x, F, D)
    rows, weight, *matrices = (random.normal(size=shape) for shape in shapes)
    return rows, expert, weight, *matrices


def loops(x, expert, weight, gate, up, down):
    result = np.zeros(x.shape)
    for i, (row, ids) in enumerate(zip(x, expert, strict=True)):
        for j, e in enumerate(ids):
            inner = []
            for f in range(gate.shape[2]):
                g = sum(float(row[d]) * float(gate[e, d, f]) for d in range(len(row)))
                u = sum(float(row[d]) * float(up[e, d, f]) for d in range(len(row)))
                inner.append(g / (1 + math.exp(-g)) * u)
            for d in range(len(row)):
                result[i, d] += float(weight[i, j]) * sum(h * float(down[e, f, d]) for f, h in enumerate(inner))
    return result


def run(name):
    return jax.jit(functools.partial(experts.mixed, implementation=name))


def as_float32(given):
    return tuple(jnp.asarray(a, jnp.int32 if a.dtype == np.int32 else jnp.float32) for a in given)


def gradient(name, given, cotangent):
    """Of the sum of cotangent * output, in all but the ids."""
    def total(x, weight, *matrices):
        return (run(name)(x, given[1], weight, *matrices) * cotangent).sum()

    return jax.jit(jax.grad(total, range(5)))(given[0], *given[2:])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@every_implementation
def test_is_the_formula(name, shape):
    given = arguments(*shape)
    np.testing.assert_allclose(run(name)(*as_float32(given)), loops(*given), rtol=2e-5, atol=2e-5)


def test_is_the_formula_with_the_tiles_of_every_device(platform):
    given = arguments(70, 3, 2)
    for name in (None, "tiles"):
        np.testing.assert_allclose(run(name)(*as_float32(given)), loops(*given), rtol=2e-5, atol=2e-5)


@every_implementation
def test_the_gradient_is_that_of_central_differences(name):
    given, cotangent = arguments(4, 3, 2), numeric.normal(1, 4, D)
    plain = run(name)
    for place in (0, 2, 3, 4, 5):
        def total(a, place=place):
            return plain(*[a if i == place else jnp.asarray(b) for i, b in enumerate(given)]) * cotangent

        found = numeric.gradient(total, given[place])
        expected = numeric.central_difference(total, given[place])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7, err_msg=f"argument {place}")


def test_the_gradient_is_the_same_with_the_tiles_of_every_device(platform):
    given, cotangent = as_float32(arguments(70, 3, 2)), jnp.asarray(numeric.normal(1, 70, D), jnp.float32)
    for found, expected in zip(gradient("tiles", given, cotangent), gradient("dense", given, cotangent), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@every_implementation
def test_an_expert_that_nobody_chose_gets_gradient_0(name):
    x, expert, *others = as_float32(arguments(7, 5, 2))
    for unused in (0, 2, 4):
        ids = jnp.where(expert == unused, (unused + 1) % 5, expert)
        slopes = gradient(name, (x, ids, *others), jnp.ones((7, D)))[2:]
        assert all((np.asarray(slope[unused]) == 0).all() and (np.asarray(slope) != 0).any() for slope in slopes)


@every_implementation
def test_rows_are_each_their_own(name):
    """Another order, or more rows behind them, change no row and, with no cotangent there, no gradient."""
    x, expert, weight, *matrices = as_float32(arguments(9, 4, 2))
    plain = run(name)(x, expert, weight, *matrices)
    order = np.random.default_rng(0).permutation(9)
    turned = run(name)(x[order], expert[order], weight[order], *matrices)
    np.testing.assert_allclose(turned, plain[order], rtol=1e-5, atol=1e-6)
    more = jnp.full((40, D), 50.0), jnp.zeros((40, 2), jnp.int32), jnp.ones((40, 2))
    padded = tuple(jnp.concatenate(pair) for pair in zip((x, expert, weight), more, strict=True))
    np.testing.assert_allclose(run(name)(*padded, *matrices)[:9], plain, rtol=1e-5, atol=1e-6)
    cotangent = jnp.concatenate([jnp.ones((9, D)), jnp.zeros((40, D))])
    slopes = gradient(name, (x, expert, weight, *matrices), cotangent[:9])
    for found, expected in zip(gradient(name, (*padded, *matrices), cotangent), slopes, strict=True):
        np.testing.assert_allclose(found[:len(expected)], expected, rtol=1e-4, atol=1e-5)


def groups(count, *shape):
    """A leading axis of `count` on every argument."""
    return tuple(jnp.stack(parts) for parts in zip(*(as_float32(arguments(*shape, seed=s)) for s in range(count)),
                                                   strict=True))


@every_implementation
def test_mapped_rows_are_flat_rows(name):
    x, expert, weight, *matrices = groups(3, 5, 4, 2)
    shared = tuple(a[0] for a in matrices)
    expected = run(name)(*(a.reshape(15, -1) for a in (x, expert, weight)), *shared).reshape(3, 5, D)
    axes = (0, 0, 0, None, None, None)
    np.testing.assert_allclose(jax.jit(jax.vmap(run(name), axes))(x, expert, weight, *shared), expected, rtol=1e-5,
                               atol=1e-6)
    one = jax.vmap(run(name), (0, None, None, None, None, None))(x, expert[0], weight[0], *shared)
    np.testing.assert_allclose(one[0], expected[0], rtol=1e-5, atol=1e-6)


def test_mapped_rows_are_rows_of_one_call():
    """The decode step's group axis: one sort of all choices, and no loop over the group."""
    x, expert, weight, *matrices = groups(3, 5, 4, 2)
    mapped = jax.vmap(run("tiles"), (0, 0, 0, None, None, None))
    text = str(jax.make_jaxpr(mapped)(x, expert, weight, *(a[0] for a in matrices)))
    assert text.count(" sort[") == 1 and "i32[30]" in text and " scan[" not in text


def test_mapped_experts_are_calls_one_by_one():
    """A batched loop would select whole arrays in every step."""
    given = groups(2, 5, 4, 2)
    for function in (run("tiles"), lambda *a: gradient("tiles", a, 1.0)):
        inner = str(jax.make_jaxpr(jax.vmap(function))(*given))
        # Every loop over tiles is a plain one, inside a scan over the replicas.
        assert inner.count(" while[") == inner.count(" scan[") > 0 and "f32[2,5,16,4]" not in inner


@every_implementation
def test_mapped_experts_are_replicas(name):
    """Alone and around a group, values and gradients."""
    given = groups(2, 5, 4, 2)
    expected = [run(name)(*(a[i] for a in given)) for i in range(2)]
    np.testing.assert_allclose(jax.jit(jax.vmap(run(name)))(*given), jnp.stack(expected), rtol=1e-5, atol=1e-6)

    twice = tuple(jnp.stack([a, a[::-1]], axis=1) for a in given[:3])  # [replica, group, ...]
    inner = jax.vmap(run(name), (0, 0, 0, None, None, None))
    found = jax.jit(jax.vmap(inner))(*twice, *given[3:])
    for r, g in np.ndindex(2, 2):
        expected = run(name)(*(a[r, g] for a in twice), *(a[r] for a in given[3:]))
        np.testing.assert_allclose(found[r, g], expected, rtol=1e-5, atol=1e-6)

    slopes = jax.vmap(lambda *a: gradient(name, a, 1.0))(*given)
    for i in range(2):
        for slope, expected in zip(slopes, gradient(name, tuple(a[i] for a in given), 1.0), strict=True):
            np.testing.assert_allclose(slope[i], expected, rtol=1e-4, atol=1e-5)


@every_implementation
def test_the_gradient_of_mapped_rows_is_that_of_flat_rows(name):
    x, expert, weight, *matrices = groups(3, 5, 4, 2)
    shared = tuple(a[0] for a in matrices)

    def total(x, weight, *shared):
        return (jax.vmap(run(name), (0, 0, 0, None, None, None))(x, expert, weight, *shared) ** 2).sum()

    def flat(x, weight, *shared):
        return (run(name)(x.reshape(15, D), expert.reshape(15, 2), weight.reshape(15, 2), *shared) ** 2).sum()

    for found, expected in zip(*(jax.grad(f, range(5))(x, weight, *shared) for f in (total, flat)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@every_implementation
def test_inside_scan_and_while_loop(name):
    x, *others = as_float32(arguments(7, 5, 2))
    step = lambda x: jnp.tanh(run(name)(x, *others))
    expected = step(step(x))
    scanned = jax.jit(lambda x: jax.lax.scan(lambda c, _: (step(c), None), x, length=2)[0])
    np.testing.assert_allclose(scanned(x), expected, rtol=1e-5, atol=1e-6)
    looped = jax.jit(lambda x, n: jax.lax.while_loop(lambda c: c[1] > 0, lambda c: (step(c[0]), c[1] - 1), (x, n))[0])
    np.testing.assert_allclose(looped(x, 2), expected, rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda x: step(step(x)).sum())(x)
    remat = jax.grad(lambda x: jax.lax.scan(lambda c, _: (jax.checkpoint(step)(c), None), x, length=2)[0].sum())(x)
    np.testing.assert_allclose(remat, slope, atol=1e-4 * np.abs(slope).max())


@every_implementation
def test_bfloat16_rows_meet_float32_experts(name):
    given = arguments(20, 4, 2)
    x, expert, weight, *matrices = as_float32(given)
    x = x.astype(jnp.bfloat16)
    found = run(name)(x, expert, weight, *matrices)
    assert found.dtype == jnp.bfloat16
    expected = loops(np.asarray(x, np.float64), *given[1:])
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=2**-6 * np.abs(expected).max())
    slopes = gradient(name, (x, expert, weight, *matrices), 1.0)
    assert [slope.dtype for slope in slopes] == [jnp.bfloat16] + [jnp.float32] * 4
    exact = gradient("dense", (x.astype(jnp.float32), expert, weight, *matrices), 1.0)
    for slope, other in zip(slopes, exact, strict=True):
        np.testing.assert_allclose(np.asarray(slope, np.float32), other, atol=2**-5 * np.abs(other).max())


def test_training_multiplies_by_every_matrix_three_times():
    """Once forward, and once for each of its two cotangents: nothing is computed again."""
    given = as_float32(arguments(7, 5, 2))
    text = str(jax.make_jaxpr(lambda *a: gradient("tiles", a, 1.0))(*given))
    assert text.count("dot_general[") == 9


def test_the_tile_follows_the_mean_share_of_an_expert():
    found = [experts.tile(choices, 8) for choices in (1, 128, 256, 257, 512, 10_000)]
    assert found == [16, 16, 16, 16, 32, 64]


def test_the_layout_keeps_every_choice_in_a_tile_of_its_expert(platform):
    for shape in SHAPES.values():
        expert = arguments(*shape)[1]
        where = jax.jit(lambda a, x=shape[1]: experts.layout(a, x))(expert)
        where, (tiles, size) = jax.device_get(where), where.choice.shape
        used = int(where.steps) * experts.TILES_AT_ONCE[dispatch.platform()]
        assert used <= tiles == len(where.owner)
        held = np.asarray(where.choice).reshape(-1)
        np.testing.assert_array_equal(np.sort(held[held < expert.size]), np.arange(expert.size))
        for number, e in enumerate(expert.reshape(-1)):
            place = where.place[number]
            assert held[place] == number and where.owner[place // size] == e and place // size < used


@pytest.mark.parametrize("device", contract.DEVICES)
@every_implementation
def test_it_lowers_for_accelerators(name, device):
    given = as_float32(arguments(300, 4, 2))
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in given]
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=contract.DEVICES[device])
    with jax.sharding.use_abstract_mesh(mesh):
        for function in (run(name), lambda *a: gradient(name, a, 1.0)):
            assert jax.jit(function).trace(*shapes).lower(lowering_platforms=(device,)).as_text()


def test_another_implementation_does_not_exist():
    with pytest.raises(ValueError, match="mixed has no implementation 'sparse'.*'dense', 'tiles'"):
        run("sparse")(*as_float32(arguments(2, 2, 1)))
