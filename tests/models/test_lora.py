"""Adapters: none at the start, W + alpha / r A B afterwards, single layers and stacked ones."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rl_jax.models import dense, lora
from rl_jax.models.lora import Adapters
from rl_jax.models.network import Network
from tests import numeric
from tests.models import published_shapes

NUMBERS = Adapters(rank=3, alpha=4.5, targets="query|value|down")
PLAIN = dataclasses.replace(published_shapes.PLAIN, query_bias=True)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 24, (2, 6)), jnp.int32)


def hidden(network, parameters):
    one = jnp.ones(2, jnp.int32)
    return jax.jit(network.hidden)(parameters, TOKENS[:, :1], one, TOKENS)


def leaves(tree):
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@functools.cache
def adapted(scan_layers):
    """A network and parameters in which adapters do something."""
    network = Network(dataclasses.replace(PLAIN, scan_layers=scan_layers), NUMBERS)
    return network, published_shapes.drawn(network)


every_depth = pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])


@every_depth
def test_merged_is_the_formula(scan_layers):
    """W + alpha / r A B in float64, one number at a time; all else is untouched and no adapter is left."""
    _, parameters = adapted(scan_layers)
    before, after = leaves(parameters), leaves(lora.merged(parameters, NUMBERS))
    assert after.keys() == {name for name in before if "adapter" not in name}
    changed = 0
    for name, weight in after.items():
        if (a := before.get(name.replace("/weight", "/adapter_in"))) is None or "weight" not in name:
            np.testing.assert_array_equal(weight, before[name], err_msg=name)
            continue
        b, w = before[name.replace("/weight", "/adapter_out")], before[name]
        layers = zip(*(np.float64(x).reshape(-1, *x.shape[-2:]) for x in (w, a, b, weight)), strict=True)
        for w_, a_, b_, found in layers:
            for i, j in np.ndindex(found.shape):
                expected = w_[i, j] + 4.5 / 3 * sum(a_[i, r] * b_[r, j] for r in range(3))
                np.testing.assert_allclose(found[i, j], expected, rtol=1e-5, atol=1e-6)
        changed += 1
    assert changed == (3 if scan_layers else 6)


@every_depth
def test_beside_and_merged_say_the_same_and_without_is_the_base(scan_layers):
    network, parameters = adapted(scan_layers)
    beside = hidden(network, parameters)
    np.testing.assert_allclose(hidden(network, lora.merged(parameters, NUMBERS)), beside, atol=1e-4)
    base = lora.without(parameters)
    assert lora.there(parameters) and not lora.there(base)
    alone = hidden(Network(network.shape), base)
    np.testing.assert_array_equal(hidden(network, base), alone)
    assert np.abs(np.asarray(alone - beside)).max() > 0.1


@every_depth
def test_fresh_ones_change_nothing(scan_layers):
    """A is drawn within 1 / sqrt(inputs), a layer at a time, and B is 0."""
    network = Network(dataclasses.replace(PLAIN, scan_layers=scan_layers), NUMBERS)
    parameters = jax.jit(network.initialise)(jax.random.key(0))
    np.testing.assert_array_equal(hidden(network, parameters), hidden(network, lora.without(parameters)))
    found = leaves(parameters)
    assert {name.split("/")[-2] for name in found if "adapter" in name} == {"query", "value", "down"}
    drawn = [row for name, leaf in found.items() if name.endswith("adapter_in")
             for row in np.asarray(leaf).reshape(-1, *leaf.shape[-2:])]
    assert len(drawn) == len({row.tobytes() for row in drawn}) == 6
    for row in drawn:
        assert 0.5 / np.sqrt(len(row)) < np.abs(row).max() <= 1 / np.sqrt(len(row))
    assert all(not np.asarray(leaf).any() for name, leaf in found.items() if name.endswith("adapter_out"))


def test_without_adapters_the_tree_is_the_base_network_s():
    def made(numbers):
        return jax.eval_shape(Network(PLAIN, numbers).initialise, jax.random.key(0))

    assert jax.tree.structure(lora.without(made(NUMBERS))) == jax.tree.structure(made(None))


def test_adapters_are_put_beside_other_weights():
    network, parameters = adapted(False)
    other = published_shapes.drawn(Network(PLAIN), seed=1)
    found = lora.fresh(other, parameters)
    jax.tree.map(np.testing.assert_array_equal, lora.without(found), other)
    expected = {name: leaf for name, leaf in leaves(parameters).items() if "adapter" in name}
    assert len(expected) == 12
    for name, leaf in expected.items():
        assert leaves(found)[name] is leaf
    assert jax.tree.structure(found) == jax.tree.structure(parameters)


def test_merging_keeps_the_weights_dtype():
    weight, inwards, outwards = jnp.ones((2, 3), jnp.bfloat16), jnp.full((2, 1), 0.5), jnp.ones((1, 3))
    found = lora.merged({"weight": weight, "adapter_in": inwards, "adapter_out": outwards}, Adapters(rank=1, alpha=1.0))
    assert list(found) == ["weight"] and found["weight"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["weight"].astype(jnp.float32), np.full((2, 3), 1.5))


def test_a_projection_with_an_adapter():
    """x W + b + alpha / r x A B, in x's dtype."""
    linear = dense.projection("query", NUMBERS, 4, 6, rngs=nnx.Rngs(0), bias=True)
    linear.bias[...], linear.adapter_out[...] = jnp.asarray(numeric.normal(0, 6)), jnp.asarray(numeric.normal(1, 3, 6))
    x = numeric.normal(2, 5, 4)
    weight, bias, inwards, outwards = (np.float64(p[...]) for p in (
        linear.weight, linear.bias, linear.adapter_in, linear.adapter_out))
    expected = x @ weight + bias + 1.5 * (x @ inwards) @ outwards
    np.testing.assert_allclose(linear(jnp.asarray(x, jnp.float32)), expected, atol=1e-5)
    assert linear(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    assert dense.projection("key", NUMBERS, 4, 6, rngs=nnx.Rngs(0)).adapter_in is None
    assert dense.projection("query", None, 4, 6, rngs=nnx.Rngs(0)).adapter_in is None


def test_experts_have_none():
    shape = published_shapes.SHAPES["qwen3_moe"]
    names = leaves(jax.eval_shape(Network(shape, Adapters(rank=2)).initialise, jax.random.key(0)))
    assert {name.split("/")[2] for name in names if "adapter" in name} == set(lora.PROJECTIONS)
    assert {name.split("/")[1] for name in names if "gate/adapter" in name} == {"1", "3"}  # the dense layers
    assert not any("mixture" in name and "adapter" in name for name in names)


@pytest.mark.parametrize("fields, message", [
    ({"rank": 0}, "rank=0, alpha=32.0: rank must be at least 1"), ({"alpha": 0.0}, "alpha=0.0: .*alpha positive"),
    ({"targets": "q_proj"}, "targets='q_proj' names no projection; there are .*'query'")])
def test_impossible_numbers_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Adapters(**fields)


def test_targets_are_searched_in_the_names():
    assert [name for name in lora.PROJECTIONS if Adapters(targets="^(out|up)$").on(name)] == ["out", "up"]
    assert all(Adapters().on(name) for name in lora.PROJECTIONS)
    assert Adapters(rank=8, alpha=4.0).scale == 0.5
