"""From tensors to parameters and back: every number in its place, and exactly converted."""
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as library

from rl_jax import hub
from rl_jax.models import safetensors, weights
from rl_jax.models.families import published
from rl_jax.models.families.family import Tensor
from rl_jax.models.network import Network
from tests import numeric
from tests.models import folders, published_shapes

PLACES = {("embedding",): Tensor(("e",)),
          ("stack", "weight"): Tensor(("w.0", "w.1"), (2,), transposed=True),
          ("mixture", "gate"): Tensor(tuple(f"x.{i}.{e}" for i in range(2) for e in range(3)), (2, 3), transposed=True)}
LIKE = {"embedding": jax.ShapeDtypeStruct((6, 4), jnp.float32),
        "stack": {"weight": jax.ShapeDtypeStruct((2, 3, 5), jnp.float32)},
        "mixture": {"gate": jax.ShapeDtypeStruct((2, 3, 4, 2), jnp.float32)}}


@pytest.fixture(scope="module")
def tensors():
    """As a checkpoint has them: [outputs, inputs]."""
    sizes = {"e": (6, 4), **dict.fromkeys(("w.0", "w.1"), (5, 3)),
             **{f"x.{i}.{e}": (2, 4) for i in range(2) for e in range(3)}}
    return {name: numeric.normal(n, *size).astype(np.float32) for n, (name, size) in enumerate(sizes.items())}


def saved(folder, tensors, dtype=np.float32):
    library.save_file({name: array.astype(dtype) for name, array in tensors.items()}, folder / safetensors.SINGLE)
    return folder


def test_every_number_is_in_its_place(tensors, tmp_path):
    found = weights.load(saved(tmp_path, tensors), PLACES, LIKE)
    np.testing.assert_array_equal(found["embedding"], tensors["e"])
    for layer in range(2):
        np.testing.assert_array_equal(found["stack"]["weight"][layer], tensors[f"w.{layer}"].T)
        for expert in range(3):
            np.testing.assert_array_equal(found["mixture"]["gate"][layer, expert], tensors[f"x.{layer}.{expert}"].T)
    back = dict(weights.to_tensors(found, PLACES))
    assert list(back) == list(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize("wanted", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("held", [np.float32, jnp.bfloat16, np.float16], ids=["F32", "BF16", "F16"])
def test_conversion_is_numpy_s_rounding(held, wanted, tensors, tmp_path):
    """Widening is exact, narrowing to the nearest; None changes nothing. Stacked parameters are float32 no more."""
    found = weights.load(saved(tmp_path, tensors, held), PLACES, LIKE, dtype=wanted)
    kind = jnp.dtype(wanted or held)
    expected = {name: array.astype(held).astype(kind) for name, array in tensors.items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {kind}
    for name, array in weights.to_tensors(found, PLACES):
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    for name, array in weights.to_tensors(found, PLACES, "bfloat16"):
        assert array.dtype == jnp.bfloat16
        np.testing.assert_array_equal(array, expected[name].astype(jnp.bfloat16), err_msg=name)


def test_tensors_of_several_types_keep_theirs(tensors, tmp_path):
    given = {**tensors, "e": tensors["e"].astype(jnp.bfloat16)}
    library.save_file(given, tmp_path / safetensors.SINGLE)
    found = weights.load(tmp_path, PLACES, LIKE)
    assert (found["embedding"].dtype, found["stack"]["weight"].dtype) == (jnp.bfloat16, jnp.float32)


def test_constants_and_the_head_of_a_tied_network_are_not_read(tensors, tmp_path):
    """Old checkpoints hold the rotary frequencies, of whatever type; some hold the embedding twice."""
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2), "lm_head.weight": tensors["e"]}
    library.save_file({**tensors, **more}, tmp_path / safetensors.SINGLE)
    found = weights.load(tmp_path, PLACES, LIKE)
    assert found.keys() == LIKE.keys()
    untied = {**PLACES, ("head",): Tensor(("lm_head.weight",))}
    like = {**LIKE, "head": LIKE["embedding"]}
    np.testing.assert_array_equal(weights.load(tmp_path, untied, like)["head"], tensors["e"])


@pytest.mark.parametrize("name", ["x.1.2", "w.1", "e"])
def test_a_tensor_of_another_shape_is_named(name, tensors, tmp_path):
    """In the checkpoint's order of axes."""
    shape = tensors[name].shape
    folder = saved(tmp_path, {**tensors, name: np.zeros((shape[0] + 1, shape[1]), np.float32)})
    given, wanted = re.escape(str((shape[0] + 1, shape[1]))), re.escape(str(shape))
    message = f"model.safetensors: tensor '{name}' has the shape {given}.*asks for {wanted}"
    with pytest.raises(ValueError, match=message):
        weights.load(folder, PLACES, LIKE)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", published_shapes.SHAPES)
def test_every_parameter_is_somewhere_and_every_tensor_once(name, scan_layers):
    shape = dataclasses.replace(published_shapes.SHAPES[name], scan_layers=scan_layers)
    places = weights.layout(published.config_of(shape), shape)
    like = weights.shapes_of(Network(shape))
    leaves = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(like)}
    assert places.keys() == leaves.keys()
    names = [name for tensor in places.values() for name in tensor.names]
    assert len(set(names)) == len(names)
    for path, tensor in places.items():
        assert leaves[path].shape[:len(tensor.stacked)] == tensor.stacked
        assert len(tensor.names) == int(np.prod(tensor.stacked)), path


def test_paths_and_trees():
    tree = weights.nested({("a", 0, "b"): 1, ("a", 1): 2, ("c",): 3})
    assert tree == {"a": {0: {"b": 1}, 1: 2}, "c": 3}
    assert weights.at(tree, ("a", 0, "b")) == 1 and weights.at(tree, ("c",)) == 3


@pytest.mark.parametrize("text, message", [
    (None, "there is no .*config.json: give the folder of a checkpoint"), ("{", "config.json is not JSON"),
    ("[1]", "config.json holds a list: expected an object")])
def test_json_that_cannot_be_read_is_named(text, message, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        hub.read_json(tmp_path / "config.json")


def test_the_file_is_let_go(tmp_path):
    """Its folder can be taken away behind it, and nothing of the parameters goes."""
    folder = folders.copied("qwen2", tmp_path)
    config = hub.read_json(folder / "config.json")
    shape = published.shape_of(config)
    like = weights.shapes_of(Network(shape))
    found = weights.load(folder, weights.layout(config, shape), like)
    expected = folders.tensors(folder)["model.norm.weight"]
    (folder / "model.safetensors").write_bytes(b"")
    np.testing.assert_array_equal(found["final"]["scale"], expected)
