"""Folders of safetensors files, against what the safetensors library reads and writes, and with everything wrong."""
import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as library

from rl_jax.models import safetensors
from tests.models import folders

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def numbers(dtype=np.float32, seed=0):
    """Three tensors whose float32 numbers `dtype` rounds."""
    rng = np.random.default_rng(seed)
    return {"a.weight": rng.normal(size=(7, 5)).astype(dtype), "b.weight": rng.normal(size=(4,)).astype(dtype),
            "c.weight": rng.normal(size=(3, 2, 4)).astype(dtype)}


def folder_of(path, tensors=None):
    library.save_file(numbers() if tensors is None else tensors, path / FILE)
    return path


def sharded(path):
    """Two shards with an index."""
    tensors = numbers()
    shards = {"one.safetensors": ["a.weight", "b.weight"], "two.safetensors": ["c.weight"]}
    for file, names in shards.items():
        library.save_file({name: tensors[name] for name in names}, path / file)
    where = {name: file for file, names in shards.items() for name in names}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


@pytest.mark.parametrize("wanted", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("name", DTYPES)
def test_parts_are_those_of_the_library_converted_by_numpy(name, wanted, tmp_path, monkeypatch):
    """In pieces of one row, too."""
    monkeypatch.setattr(safetensors, "CHUNK_BYTES", 8)
    expected = numbers(DTYPES[name])
    opened = safetensors.Folder(folder_of(tmp_path, expected))
    assert {entry.dtype for entry in opened.entries.values()} == {name}
    for tensor, where in (("a.weight", (slice(None), slice(None))), ("a.weight", (slice(2, 6), slice(1, 3))),
                          ("b.weight", (slice(1, None),)), ("c.weight", (slice(1, 3), slice(None), slice(0, 2))),
                          ("c.weight", (slice(2, 2), slice(None), slice(None)))):
        found = opened.read(tensor, where, np.dtype(wanted))
        assert found.dtype == wanted
        np.testing.assert_array_equal(found, expected[tensor][where].astype(wanted))


def test_shards_are_one_folder(tmp_path):
    opened, expected = safetensors.Folder(sharded(tmp_path)), numbers()
    opened.check({name: array.shape for name, array in expected.items()})
    for name in ("c.weight", "a.weight", "b.weight", "c.weight"):
        found = opened.read(name, (slice(None),) * expected[name].ndim, np.dtype(np.float32))
        np.testing.assert_array_equal(found, expected[name])
    assert opened.entries["c.weight"].file == tmp_path / "two.safetensors"


def cut_off(path):
    data = (folder_of(path) / FILE).read_bytes()
    (path / FILE).write_bytes(data[:-10])  # c.weight comes last
    return [FILE, "cut off", "'c.weight'"]


def cut_off_in_the_header(path):
    (folder_of(path) / FILE).write_bytes((path / FILE).read_bytes()[:40])
    return [FILE, "header should have", "the whole file has 40"]


def empty(path):
    (path / FILE).write_bytes(b"")
    return [FILE, "header is damaged"]


def no_json(path):
    folders.with_header(path / FILE, b"{'a': 1}", b"")
    return [FILE, "header is damaged"]


def no_object(path):
    folders.with_header(path / FILE, ["a"], b"")
    return [FILE, "header is damaged"]


def no_dtype(path):
    header, data = folders.header_of(folder_of(path) / FILE)
    del header["b.weight"]["dtype"]
    folders.with_header(path / FILE, header, data)
    return [FILE, "header is damaged", "dtype"]


def too_few_bytes(path):
    header, data = folders.header_of(folder_of(path) / FILE)
    header["a.weight"]["shape"] = [7, 6]
    folders.with_header(path / FILE, header, data)
    return [FILE, "'a.weight' 140 bytes", "(7, 6) takes 168"]


def lost_shard(path):
    (sharded(path) / "two.safetensors").unlink()
    return ["the shard", "two.safetensors is missing", "'c.weight'"]


def shard_without_a_tensor(path):
    library.save_file({"a.weight": numbers()["a.weight"]}, sharded(path) / "one.safetensors")
    return ["one.safetensors lacks 'b.weight'", INDEX]


def cut_off_shard(path):
    file = sharded(path) / "two.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return ["two.safetensors is cut off", "'c.weight'"]


def damaged_index(path):
    (sharded(path) / INDEX).write_text('{"weight_map": {')
    return [INDEX, "cannot be read"]


def index_without_a_map(path):
    (sharded(path) / INDEX).write_text('{"metadata": {}}')
    return [INDEX, "weight_map"]


def index_with_a_list(path):
    (sharded(path) / INDEX).write_text('{"weight_map": ["a.weight"]}')
    return [INDEX, "cannot be read"]


def index_with_numbers(path):
    (sharded(path) / INDEX).write_text('{"weight_map": {"a.weight": 1}}')
    return [INDEX, "cannot be read"]


def pickled(path):
    (path / "pytorch_model.bin").write_bytes(b"")
    return ["has neither", FILE, "pytorch_model.bin", "must be in safetensors files"]


def nowhere(path):
    return ["has neither", "[]"]


BROKEN = (cut_off, cut_off_in_the_header, empty, no_json, no_object, no_dtype, too_few_bytes, lost_shard,
          shard_without_a_tensor, cut_off_shard, damaged_index, index_without_a_map, index_with_a_list,
          index_with_numbers, pickled, nowhere)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda f: f.__name__)
def test_what_is_broken_is_named(broken, tmp_path):
    said = broken(tmp_path)
    with pytest.raises(ValueError) as refused:
        safetensors.Folder(tmp_path)
    assert all(words in str(refused.value) for words in said), refused.value
    assert str(tmp_path) in str(refused.value)


def test_no_folder_is_said():
    with pytest.raises(ValueError, match="no such folder"):
        safetensors.Folder(pathlib.Path("nowhere/at/all"))


def test_what_only_the_library_sees_is_said_with_the_file(tmp_path):
    file = folder_of(tmp_path) / FILE
    file.write_bytes(file.read_bytes() + b"more")
    opened = safetensors.Folder(tmp_path)
    with pytest.raises(ValueError, match=re.escape(str(file)) + " cannot be read"):
        opened.read("b.weight", (slice(None),), np.dtype(np.float32))


SHAPES = {name: array.shape for name, array in numbers().items()}
UNLIKE = {
    "missing": ({**SHAPES, "d.weight": (1,)}, {}, "lacks 'd.weight', which its config.json asks for"),
    "several missing": ({**SHAPES, **{f"d.{i}": (1,) for i in range(5)}}, {},
                        "lacks 'd.0', 'd.1', 'd.2' and 2 more tensors"),
    "extra": (SHAPES, {"d.weight": np.ones(1)}, FILE + " holds 'd.weight', which its config.json does not ask for"),
    "shape": ({**SHAPES, "a.weight": (5, 7)}, {},
              FILE + r": tensor 'a.weight' has the shape \(7, 5\), and config.json asks for \(5, 7\)"),
    "int8": (SHAPES, {"a.weight": np.ones((7, 5), np.int8)}, FILE + ": tensor 'a.weight' is of type I8: allowed are"),
    "float64": (SHAPES, {"b.weight": np.ones(4)}, FILE + ": tensor 'b.weight' is of type F64: allowed are"),
    "float8": (SHAPES, {"b.weight": np.ones(4, jnp.float8_e4m3fn)},
               FILE + r": tensor 'b.weight' is of type F8_E4M3: allowed are .* must be converted"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_other_tensors_than_wanted_are_named(case, tmp_path):
    wanted, changed, message = UNLIKE[case]
    opened = safetensors.Folder(folder_of(tmp_path, {**numbers(), **changed}))
    with pytest.raises(ValueError, match=message) as refused:
        opened.check(wanted)
    assert str(tmp_path) in str(refused.value)


def test_some_extra_tensors_are_not_read(tmp_path):
    opened = safetensors.Folder(folder_of(tmp_path, {**numbers(), "layers.3.inv_freq": np.ones(2, np.int64)}))
    opened.check(SHAPES, ignored=("inv_freq",))
    with pytest.raises(ValueError, match=r"layers\.3\.inv_freq"):
        opened.check(SHAPES, ignored=("freq_inv",))


def test_a_single_file_is_what_the_library_writes(tmp_path):
    safetensors.write(tmp_path, iter(numbers(jnp.bfloat16).items()), 1_000)
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
    header, _ = folders.header_of(tmp_path / FILE)
    assert header.pop("__metadata__") == {"format": "pt"}  # transformers refuses files without
    assert {name: (one["dtype"], tuple(one["shape"])) for name, one in header.items()} == {
        name: ("BF16", shape) for name, shape in SHAPES.items()}
    for name, array in numbers(jnp.bfloat16).items():
        np.testing.assert_array_equal(folders.tensors(tmp_path)[name], array)


def test_shards_stay_below_their_size_and_the_index_says_where_all_is(tmp_path):
    """140, 16, 96 and again 140 bytes: a shard is closed before it would exceed 150; larger tensors have their own."""
    tensors = {**numbers(), "d.weight": numbers(seed=1)["a.weight"]}
    safetensors.write(tmp_path, iter(tensors.items()), 150)
    files = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index == {"metadata": {"total_size": 140 + 16 + 96 + 140}, "weight_map": {
        "a.weight": files[0], "b.weight": files[1], "c.weight": files[1], "d.weight": files[2]}}
    assert sorted(file.name for file in tmp_path.iterdir()) == [*files, INDEX]
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(library.load_file(tmp_path / file)[name], tensors[name])
    safetensors.write(tmp_path, iter(tensors.items()), 15)
    assert json.loads((tmp_path / INDEX).read_text())["weight_map"]["d.weight"] == "model-00004-of-00004.safetensors"


def test_what_is_no_block_of_memory_is_written_as_it_reads(tmp_path):
    turned = numbers()["a.weight"].T
    safetensors.write(tmp_path, iter([("a", turned)]), 1_000)
    np.testing.assert_array_equal(folders.tensors(tmp_path)["a"], turned)
