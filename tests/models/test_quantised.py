"""Copies of the weights in 8 bits: how far they are off, and what they leave alone."""
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.models import quantised
from rl_jax.models.lora import Adapters
from rl_jax.models.network import Network
from rl_jax.models.shape import Shape
from tests import numeric
from tests.models import oracle, published_shapes

KINDS = ("int8", "fp8")
every_kind = pytest.mark.parametrize("kind", KINDS)
# By kind: half a step of the scale, and half a step of 3 bits relative to the number itself.
ABSOLUTE = {"int8": 0.5 / 127.5, "fp8": 0.5 * 2.0 ** -9 / 448}
RELATIVE = {"int8": 0.0, "fp8": 2.0 ** -4}
SHAPE = Shape(vocabulary=32, width=32, layers=2, heads=4, key_heads=2, head_size=8, inner=64, query_norm=True)


def columns(seed, *shape):
    """Matrices [.., A, B] whose columns are of very different size."""
    return numeric.normal(seed, *shape) * 10.0 ** np.linspace(-3, 2, shape[-1])


def weight_of(copy):
    return np.float64(copy.qvalue.astype(jnp.float32)) * np.float64(copy.scale)


@every_kind
def test_every_number_is_within_half_a_step_of_its_column(kind):
    """No column is scaled by another's largest."""
    weight = columns(0, 24, 10).astype(np.float32)
    copy = quantised.copy({"up": {"weight": jnp.asarray(weight)}}, kind)["up"]["weight"]
    assert copy.qvalue.dtype == quantised.TYPES[kind] and copy.scale.shape == (1, 10)
    found, largest = weight_of(copy), np.abs(np.float64(weight)).max(axis=0)
    for i, j in np.ndindex(weight.shape):
        bound = ABSOLUTE[kind] * largest[j] + RELATIVE[kind] * abs(weight[i, j])
        assert abs(found[i, j] - weight[i, j]) <= bound * 1.001
    np.testing.assert_allclose(np.abs(found).max(axis=0), largest, rtol=1e-5 if kind == "fp8" else 0.5 / 127)


@every_kind
def test_products_are_off_by_what_their_weights_are(kind):
    """Rows of float32 stay float32: the copy is of the weights alone."""
    weight, x = columns(0, 24, 10).astype(np.float32), numeric.normal(1, 7, 24).astype(np.float32)
    copy = quantised.copy({"up": {"weight": jnp.asarray(weight)}}, kind)["up"]["weight"]
    found = np.asarray(jax.jit(quantised.product)(jnp.asarray(x), copy))
    np.testing.assert_allclose(found, np.float64(x) @ weight_of(copy), rtol=1e-4, atol=1e-5 * np.abs(weight).max())
    largest = np.abs(np.float64(weight)).max(axis=0)
    for m, j in np.ndindex(found.shape):
        exact = sum(float(a) * float(b) for a, b in zip(x[m], weight[:, j], strict=True))
        bound = sum(abs(float(a)) * (ABSOLUTE[kind] * largest[j] + RELATIVE[kind] * abs(float(b)))
                    for a, b in zip(x[m], weight[:, j], strict=True))
        assert abs(found[m, j] - exact) <= bound * 1.001 + 1e-6 * largest[j]
    assert 1e-4 < np.abs(found - x @ weight).max() / np.abs(x @ weight).max() < 0.1


def test_a_float_matrix_is_multiplied_in_x_s_dtype():
    x, weight = jnp.asarray(numeric.normal(0, 3, 4), jnp.bfloat16), jnp.asarray(numeric.normal(1, 4, 2), jnp.float32)
    found = quantised.product(x, weight)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, x @ weight.astype(jnp.bfloat16))
    copy = quantised.copy({"up": {"weight": weight}}, "int8")["up"]["weight"]
    assert quantised.product(x, copy).dtype == jnp.bfloat16


@every_kind
def test_stacked_layers_have_scales_of_their_own(kind):
    weight = (columns(0, 3, 8, 5) * np.array([1e-3, 1.0, 1e3])[:, None, None]).astype(np.float32)
    copy = quantised.copy({"up": {"weight": jnp.asarray(weight)}}, kind)["up"]["weight"]
    assert copy.scale.shape == (3, 1, 5)
    for layer in range(3):
        alone = quantised.copy({"up": {"weight": jnp.asarray(weight[layer])}}, kind)["up"]["weight"]
        np.testing.assert_array_equal(copy.qvalue[layer].astype(jnp.float32), alone.qvalue.astype(jnp.float32))
        np.testing.assert_array_equal(copy.scale[layer], alone.scale)


@every_kind
def test_only_projections_are_copied(kind):
    """Embedding, head, norms, biases, routers, experts and adapters are the arrays themselves."""
    shape = dataclasses.replace(published_shapes.SHAPES["qwen3_moe"], query_bias=True, layers=2, dense_layers=(1,))
    parameters = published_shapes.drawn(Network(shape, Adapters(rank=2)))
    copy = quantised.copy(parameters, kind)
    found = jax.tree_util.tree_leaves_with_path(copy, is_leaf=lambda leaf: not isinstance(leaf, dict))
    before = jax.tree_util.tree_leaves_with_path(parameters)
    assert [path for path, _ in found] == [path for path, _ in before]
    copied = {path[-2].key for path, leaf in found if not isinstance(leaf, jax.Array)}
    assert copied == {"query", "key", "value", "out", "gate", "up", "down"}
    for (path, leaf), (_, original) in zip(found, before, strict=True):
        projection = path[-1].key == "weight" and "mixture" not in [key.key for key in path]
        assert isinstance(leaf, jax.Array) != projection, path
        assert projection or leaf is original


TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 32, (4, 12)), jnp.int32)


def says(network):
    """(parameters, tokens) -> log-probabilities of every token behind each of these."""
    def logp(parameters, tokens=TOKENS):
        hidden = network.hidden(parameters, tokens[:, :1], jnp.ones(len(tokens), jnp.int32), tokens)
        return jax.nn.log_softmax(network.logits(hidden.reshape(-1, 32), network.vocabulary(parameters)))

    return logp


@pytest.fixture(scope="module")
def parameters():
    return jax.jit(Network(SHAPE).initialise)(jax.random.key(0))


@pytest.fixture(scope="module")
def plain(parameters):
    return np.asarray(jax.jit(says(Network(SHAPE)))(parameters))


def copied(parameters, kind="int8"):
    return jax.jit(lambda p: quantised.copy(p, kind))(parameters)


@every_kind
@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_a_network_of_the_copy_differs_a_little(kind, scan_layers, parameters, plain):
    """In nats, of the mean log-probability; the copy leaves one program and enters another."""
    if scan_layers:
        parameters = oracle.scanned(parameters)
    logp = jax.jit(says(Network(dataclasses.replace(SHAPE, scan_layers=scan_layers))))
    off = np.abs(np.asarray(logp(copied(parameters, kind))) - plain).mean()
    assert 1e-3 < off < {"int8": 0.02, "fp8": 0.1}[kind]


def test_under_vmap_it_is_the_same(parameters):
    """Groups of answers are drawn so, and so are replicas, whose weights have an axis of their own."""
    logp, halved = says(Network(SHAPE)), jax.tree.map(lambda a: a / 2, parameters)
    single = [jax.jit(logp)(copied(p)) for p in (parameters, halved)]
    groups = jax.jit(jax.vmap(logp, (None, 0)))(copied(parameters), TOKENS[:, None])
    np.testing.assert_allclose(groups.reshape(48, 32), single[0], atol=1e-5)
    both = jax.tree.map(lambda *a: jnp.stack(a), parameters, halved)
    replicas = jax.jit(jax.vmap(lambda p: logp(quantised.copy(p, "int8"))))(both)
    np.testing.assert_allclose(replicas, jnp.stack(single), atol=1e-5)


def test_unknown_kinds_and_a_missing_library_are_refused(monkeypatch):
    quantised.check("int8")
    quantised.check("fp8")
    with pytest.raises(ValueError, match=r"quantised weights 'int4': allowed are \['fp8', 'int8'\], or \"\" for none"):
        quantised.check("int4")
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ImportError, match=r"need qwix .*pip install rl_jax\[quantised\]"):
        quantised.check("int8")
