"""The router against loops over Python floats, the layer against transformers' Qwen3MoeSparseMoeBlock.

golden_mixture.npz was made with transformers 5.24 and torch 2.13 on a CPU in float32: a Qwen3MoeSparseMoeBlock of
Qwen3MoeConfig(hidden_size=12, moe_intermediate_size=10, num_experts=6, num_experts_per_tok=2), its weights and the 16
rows drawn by numpy's default_rng(0); ids, outputs and gradients of (output * cotangent).sum(), with
norm_topk_prob=True (normalised_*) and False (plain_*).
"""
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rl_jax.models import experts, mixture
from rl_jax.models.mixture import Experts, Mixture
from tests import numeric

SIZES = Experts(experts=5, chosen=2, inner=4)
WIDTH = 3
both = pytest.mark.parametrize("normalised", [True, False])


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(pathlib.Path(__file__).parent / "golden_mixture.npz"))


def layer(sizes=SIZES, width=WIDTH, seed=0):
    return Mixture(sizes, width, 3, rngs=nnx.Rngs(seed))


def rows(m=11, seed=0):
    return jnp.asarray(numeric.normal(seed, m, WIDTH), jnp.float32)


def softmax(logits):
    parts = [math.exp(float(value)) for value in logits]
    return [part / sum(parts) for part in parts]


def routed(logits, k, normalised):
    """Ids and weights of one row."""
    p = softmax(logits)
    ids = sorted(range(len(p)), key=lambda e: (-logits[e], e))[:k]
    total = sum(p[e] for e in ids) if normalised else 1.0
    return ids, [p[e] / total for e in ids]


@both
def test_route_takes_the_most_probable(normalised):
    logits = numeric.normal(0, 20, 6)
    for k in (1, 3, 6):
        expert, weight = jax.jit(mixture.route, static_argnums=(1, 2))(jnp.asarray(logits, jnp.float32), k, normalised)
        for i, row in enumerate(logits):
            ids, expected = routed(row, k, normalised)
            assert expert[i].tolist() == ids
            np.testing.assert_allclose(weight[i], expected, rtol=1e-5)


@both
def test_of_equals_the_lowest_comes_first(normalised):
    logits = jnp.asarray([[0.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0], [0.0, -200.0, -150.0, -150.0]])
    expert, weight = mixture.route(logits, 3, normalised)
    assert expert.tolist() == [[1, 2, 3], [0, 1, 2], [0, 2, 3]]
    assert np.isfinite(np.asarray(weight)).all()


def test_worked_example():
    """p = (0.1, 0.2, 0.3, 0.4): of the best two 0.3 and 0.4, normalised 3/7 and 4/7; replayed (0, 2): 1/4 and 3/4."""
    logits, other = jnp.log(jnp.asarray([[0.1, 0.2, 0.3, 0.4]])) + 5, jnp.asarray([[0, 2]])
    for normalised, best, replayed in ((True, [4 / 7, 3 / 7], [1 / 4, 3 / 4]), (False, [0.4, 0.3], [0.1, 0.3])):
        expert, weight = mixture.route(logits, 2, normalised)
        assert expert.tolist() == [[3, 2]]
        np.testing.assert_allclose(weight[0], best, rtol=1e-5)
        np.testing.assert_allclose(mixture.weights_of(logits, other, normalised)[0], replayed, rtol=1e-5)


@both
def test_the_gradient_of_weights_is_that_of_central_differences(normalised):
    logits, expert = numeric.normal(0, 4, 5), jnp.asarray([[0, 3], [4, 1], [2, 0], [1, 2]])
    credit = numeric.normal(1, 4, 2)
    total = lambda a: mixture.weights_of(a, expert, normalised) * credit
    found = numeric.gradient(total, logits)
    np.testing.assert_allclose(found, numeric.central_difference(total, logits), atol=1e-8)
    outside = np.ones((4, 5), bool)
    outside[np.arange(4)[:, None], np.asarray(expert)] = False
    assert (found[outside] == 0).all() if normalised else (found[outside] != 0).all()


@both
def test_is_the_published_layer(golden, normalised):
    """Weights as published checkpoints hold them: a matrix per output, experts in front."""
    names = "normalised" if normalised else "plain"
    module = layer(Experts(experts=6, chosen=2, inner=10, normalised=normalised), 12)
    graph, state = nnx.split(module)
    turned = {name: jnp.asarray(np.swapaxes(golden[name], -1, -2)) for name in ("router", "gate", "up", "down")}
    assert {name: a.shape for name, a in nnx.to_pure_dict(state).items()} == {n: a.shape for n, a in turned.items()}

    def total(parameters, x):
        y, expert = nnx.merge(graph, parameters)(x)
        return (y * golden["cotangent"]).sum(), (y, expert)

    (_, (y, expert)), (slopes, d_x) = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(
        turned, jnp.asarray(golden["x"]))
    np.testing.assert_array_equal(expert, golden[f"{names}_expert"])
    np.testing.assert_allclose(y, golden[f"{names}_output"], atol=2e-6)
    np.testing.assert_allclose(d_x, golden[f"{names}_d_x"], atol=1e-5)
    np.testing.assert_allclose(slopes["router"].T, golden[f"{names}_d_router"], atol=1e-5)
    np.testing.assert_allclose(np.swapaxes(slopes["down"], 1, 2), golden[f"{names}_d_down"], atol=1e-5)


def value_and_gradient(sizes, x, chosen=None):
    graph, state = nnx.split(layer(sizes))

    def total(state, x):
        y, expert = nnx.merge(graph, state)(x, chosen)
        return (y**2).sum(), (y, expert)

    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(state, x)


@both
def test_replay_of_its_own_choices_changes_no_bit(normalised):
    sizes = Experts(experts=5, chosen=2, inner=4, normalised=normalised)
    free = value_and_gradient(sizes, rows())
    again = value_and_gradient(sizes, rows(), free[0][1][1].astype(jnp.uint8))
    jax.tree.map(np.testing.assert_array_equal, free, again)


@both
def test_replay_of_other_choices(normalised):
    """The given experts, with the weights that today's router gives them."""
    sizes = Experts(experts=5, chosen=2, inner=4, normalised=normalised)
    x, module = rows(), layer(sizes)
    given = jnp.asarray(np.random.default_rng(3).permuted(np.tile(np.arange(5), (11, 1)), axis=1)[:, :2], jnp.int32)
    y, expert = jax.jit(lambda x: module(x, given))(x)
    np.testing.assert_array_equal(expert, given)
    assert (np.asarray(given) != np.asarray(jax.jit(lambda x: module(x))(x)[1])).any()
    logits = np.asarray(x, np.float64) @ np.asarray(module.router[...], np.float64)
    weight = []
    for row, ids in zip(logits, given, strict=True):
        p = softmax(row)
        weight.append([p[e] / (sum(p[o] for o in ids) if normalised else 1.0) for e in ids])
    matrices = (module.gate[...], module.up[...], module.down[...])
    expected = experts.dense(x, given, jnp.asarray(weight, jnp.float32), *matrices)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)
    slope = value_and_gradient(sizes, x, given)[1][0]["router"][...]
    assert (np.asarray(slope) != 0).any()


def test_the_router_is_exact_in_bfloat16():
    """Rows and router may be kept in 8 bits of precision; logits and weights are not rounded to it."""
    module, x = layer(), rows(3000).astype(jnp.bfloat16)
    for router in (module.router[...], module.router[...].astype(jnp.bfloat16)):
        module.router = nnx.Param(router)
        y, expert = module(x)
        assert y.dtype == jnp.bfloat16 and expert.dtype == jnp.int32
        logits = np.asarray(x, np.float64) @ np.asarray(router, np.float64)
        np.testing.assert_array_equal(expert, np.argsort(-logits, axis=1, kind="stable")[:, :2])
        coarse = jnp.matmul(x, router.astype(jnp.bfloat16))
        assert (np.asarray(jax.lax.top_k(coarse, 2)[1]) != np.asarray(expert)).any()


def test_a_vmap_over_rows_routes_as_flat_rows_do():
    module, x = layer(), rows(12)
    y, expert = jax.jit(jax.vmap(lambda x: module(x)))(x.reshape(3, 4, WIDTH))
    flat, flat_expert = jax.jit(lambda x: module(x))(x)
    np.testing.assert_array_equal(expert.reshape(12, 2), flat_expert)
    np.testing.assert_allclose(y.reshape(12, WIDTH), flat, rtol=1e-5, atol=1e-6)


def test_every_expert_starts_as_a_layer_of_its_own():
    """Variance 1 / inputs, however many experts there are; that of `down` divided by twice the depth."""
    module = Mixture(Experts(experts=16, chosen=2, inner=64), 128, 3, rngs=nnx.Rngs(0))
    for name, inputs in (("router", 128), ("gate", 128), ("up", 128), ("down", 64 * 6)):
        spread = np.asarray(vars(module)[name][...]).std(axis=(-2, -1)) * math.sqrt(inputs)
        np.testing.assert_allclose(spread, 1, atol=0.1, err_msg=name)
    assert np.abs(np.asarray(module.gate[0] - module.gate[1])).max() > 0.1


@pytest.mark.parametrize(("fields", "message"), [
    ({"experts": 0, "chosen": 1, "inner": 4}, "mixture experts=0: must be at least 1"),
    ({"experts": 4, "chosen": 0, "inner": 4}, "mixture chosen=0: must be at least 1"),
    ({"experts": 4, "chosen": 2, "inner": 0}, "mixture inner=0: must be at least 1"),
    ({"experts": 4, "chosen": 5, "inner": 4}, "chosen=5, experts=4: no more can be chosen than there are")])
def test_impossible_sizes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Experts(**fields)


load = jax.jit(mixture.load, static_argnums=2)


def choices(n=3, t=4, layers=2, k=2, count=5):
    random = np.random.default_rng(0)
    score = random.normal(size=(n, t, layers, count))
    return np.argsort(score, axis=-1)[..., :k].astype(np.uint8), random.random((n, t)) < 0.6


def loops_of_load(expert, mask, count):
    largest, idle, entropy = [], [], []
    for number in range(expert.shape[2]):
        seen = [int(e) for i, t in np.argwhere(mask) for e in expert[i, t, number]]
        share = [seen.count(e) / len(seen) for e in range(count)]
        largest.append(count * max(share))
        idle.append(share.count(0.0) / count)
        entropy.append(-sum(s * math.log(s) for s in share if s) / math.log(count))
    mean = lambda values: sum(values) / len(values)
    return {"routing/load": mean(largest), "routing/load_max": max(largest), "routing/idle": mean(idle),
            "routing/load_entropy": mean(entropy)}


def test_load_against_loops():
    expert, mask = choices()
    found = load(jnp.asarray(expert), jnp.asarray(mask), 5)
    expected = loops_of_load(expert, mask, 5)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_load_worked_example():
    """Two layers of four experts, two tokens, k = 2: one even, one that always takes experts 0 and 1."""
    expert = jnp.asarray([[[[0, 1], [0, 1]], [[2, 3], [1, 0]]]])
    found = load(expert, jnp.ones((1, 2), bool), 4)
    assert {name: float(value) for name, value in found.items()} == {
        "routing/load": 1.5, "routing/load_max": 2.0, "routing/idle": 0.25, "routing/load_entropy": 0.75}


def test_load_never_reads_what_is_masked():
    expert, mask = choices()
    garbage = np.where(mask[:, :, None, None], expert, 255).astype(np.uint8)
    one, other = (load(jnp.asarray(a), jnp.asarray(mask), 5) for a in (expert, garbage))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    nothing = load(jnp.asarray(expert), jnp.zeros(mask.shape, bool), 5)
    assert {name: float(value) for name, value in nothing.items()} == {
        "routing/load": 0.0, "routing/load_max": 0.0, "routing/idle": 1.0, "routing/load_entropy": 0.0}
