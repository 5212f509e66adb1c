"""Whole checkpoints: broken ones are refused by name, written ones are whole or not there, layers may be stacked."""
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rl_jax import hub
from rl_jax.models import lora, pretrained, safetensors, transformer, weights
from rl_jax.models.lora import Adapters
from rl_jax.models.network import Network
from tests.models import folders, published_shapes

INDEX = safetensors.INDEX
EMBEDDING, NORM = "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"


def cut_off(folder):
    file = folder / safetensors.SINGLE
    file.write_bytes(file.read_bytes()[:-1])
    return ["model.safetensors is cut off: tensor 'model.norm.weight'"]


def int8(folder):
    folders.rewritten(folder, lambda held: held.update({NORM: np.ones(32, np.int8)}))
    return [f"model.safetensors: tensor '{NORM}' is of type I8"]


def float64(folder):
    folders.rewritten(folder, lambda held: held.update({NORM: np.ones(32)}))
    return [f"model.safetensors: tensor '{NORM}' is of type F64"]


def lacking(folder):
    folders.rewritten(folder, lambda held: held.pop(NORM))
    return [f"lacks '{NORM}'"]


def one_too_many(folder):
    name = "model.layers.2.input_layernorm.weight"
    folders.rewritten(folder, lambda held: held.update({name: held[NORM]}))
    return [f"model.safetensors holds '{name}'", "another model"]


def turned(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    folders.rewritten(folder, lambda held: held.update({name: np.ascontiguousarray(held[name].T)}))
    return [f"model.safetensors: tensor '{name}' has the shape (32, 48)", "asks for (48, 32)"]


def another_vocabulary(folder):
    folders.edited(folder, vocab_size=161)
    return [f"model.safetensors: tensor '{EMBEDDING}' has the shape (160, 32)", "asks for (161, 32)"]


def another_depth(folder):
    folders.edited(folder, num_hidden_layers=1, layer_types=["full_attention"])
    return ["model.safetensors holds 'model.layers.1.input_layernorm.weight'", "more tensors"]


def no_config(folder):
    (folder / "config.json").unlink()
    return ["config.json: give the folder of a checkpoint"]


def another_family(folder):
    folders.edited(folder, model_type="mamba")
    return ["config.json model_type='mamba'", "'qwen3_moe'"]


def no_heads(folder):
    folders.edited(folder, num_attention_heads=...)
    return ["(model_type 'qwen2') has no field 'num_attention_heads'"]


BROKEN = (cut_off, int8, float64, lacking, one_too_many, turned, another_vocabulary, another_depth, no_config,
          another_family, no_heads)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_checkpoint_is_refused_with_file_and_tensor(broken, tmp_path):
    folder = folders.copied("qwen2", tmp_path)
    said = broken(folder)
    with pytest.raises(ValueError) as refused:
        pretrained.load(folder)
    assert all(words in str(refused.value) for words in said), refused.value


def test_broken_shards_are_refused_with_file_and_tensor(tmp_path):
    folder = folders.copied("qwen3", tmp_path)
    second = folder / "model-00002-of-00004.safetensors"
    name = next(name for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items()
                if file == second.name)
    shape = folders.tensors(folder)[name].shape
    folders.rewritten(folder, lambda held: held.update({name: np.zeros((*shape, 1), np.float32)}), second.name)
    with pytest.raises(ValueError, match=f"{second.name}: tensor '{name}' has the shape"):
        pretrained.load(folder)
    folders.rewritten(folder, lambda held: held.pop(name), second.name)
    with pytest.raises(ValueError, match=f"{second.name} lacks '{name}', which {INDEX} says it holds"):
        pretrained.load(folder)
    second.unlink()
    with pytest.raises(ValueError, match=f"the shard .*{second.name} is missing"):
        pretrained.load(folder)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "qwen3_moe", "qwen2, upper layers windowed"])
def test_scanned_layers_hold_the_numbers_of_the_unrolled(name, tmp_path):
    """Two whole periods, and layers behind them; saved again, it is the same checkpoint."""
    shape = published_shapes.SHAPES[name]
    pretrained.save(published_shapes.policy(shape), tmp_path / "one")
    plain, deep = (pretrained.load(tmp_path / "one", scan_layers=scan) for scan in (False, True))
    scanned = deep.network.shape.period * deep.network.shape.repeats
    assert deep.parameters.keys() == plain.parameters.keys() | ({"tail"} if scanned < shape.layers else set())
    for layer, block in plain.parameters["blocks"].items():
        place, turn = layer % shape.period, layer // shape.period
        at = (deep.parameters["blocks"][place] if layer < scanned else deep.parameters["tail"][layer - scanned])
        jax.tree.map(lambda a, b, n=turn, in_turn=layer < scanned: np.testing.assert_array_equal(
            a, b[n] if in_turn else b), block, at)
    pretrained.save(deep, tmp_path / "two")
    one, two = (folders.tensors(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    jax.tree.map(np.testing.assert_array_equal, one, two)


@functools.cache
def made():
    """A policy of our own making: no folder, no config."""
    return published_shapes.policy(published_shapes.SHAPES["qwen3"])


def test_what_was_made_here_is_a_checkpoint_too(tmp_path):
    (tmp_path / "empty").mkdir()
    pretrained.save(made(), tmp_path / "empty", dtype="bfloat16", shard_bytes=300)
    assert not list(tmp_path.glob("*.unfinished"))
    config = json.loads((tmp_path / "empty" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["architectures"] == ["Qwen3ForCausalLM"]
    index = json.loads((tmp_path / "empty" / INDEX).read_text())
    count = sum(leaf.size for leaf in jax.tree.leaves(made().parameters))
    assert index["metadata"]["total_size"] == 2 * count
    files = sorted(file.name for file in (tmp_path / "empty").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    found = pretrained.load(tmp_path / "empty", dtype="float32")
    assert found.network == made().network and found.tokenizer is None and found.score is None
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16).astype(jnp.float32)),
                 found.parameters, made().parameters)


def test_what_is_there_is_not_written_over(tmp_path):
    for name in ("folder/kept.txt", "file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("kept")
        target = tmp_path / name.split("/")[0]
        with pytest.raises(ValueError, match=f"{target} exists and is not empty"):
            pretrained.save(made(), target)
        assert (tmp_path / name).read_text() == "kept"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "folder"]


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    """The fourth tensor cannot be made, two shards are on the disk by then; the same folder can be written later."""
    whole = weights.to_tensors

    def breaks(*given):
        for number, one in enumerate(whole(*given)):
            if number == 3:
                assert len(list((tmp_path / "new.unfinished").iterdir())) == 2
                raise OSError("no memory")
            yield one

    monkeypatch.setattr(weights, "to_tensors", breaks)
    with pytest.raises(OSError, match="no memory"):
        pretrained.save(made(), tmp_path / "new", shard_bytes=1)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "new.unfinished").mkdir()  # of a process that was killed
    (tmp_path / "new.unfinished" / "model.safetensors").write_text("half")
    pretrained.save(made(), tmp_path / "new")
    assert [one.name for one in tmp_path.iterdir()] == ["new"]
    assert pretrained.load(tmp_path / "new").network == made().network


def test_what_accompanies_a_checkpoint_goes_along(tmp_path):
    folder = folders.copied("llama", tmp_path)
    for name in (*pretrained.ACCOMPANYING, "README.md", "optimizer.pt"):
        if name not in ("generation_config.json", "tokenizer.json"):
            (folder / name).write_text(f"of {name}")
    policy = pretrained.load(folder)
    pretrained.save(policy, tmp_path / "saved")
    found = {one.name for one in (tmp_path / "saved").iterdir()}
    assert found == {"config.json", safetensors.SINGLE, *pretrained.ACCOMPANYING} - {"tokenizer.json"}
    for name in found - {"config.json", safetensors.SINGLE}:
        assert (tmp_path / "saved" / name).read_text() == (folder / name).read_text()


def test_adapters_are_merged_into_what_is_written(tmp_path):
    numbers = Adapters(rank=2, alpha=3.0, targets="query|down")
    network = Network(made().network.shape, numbers)
    policy = pretrained.Policy(network, published_shapes.drawn(network))
    pretrained.save(policy, tmp_path / "whole")
    found = pretrained.load(tmp_path / "whole").parameters
    block = policy.parameters["blocks"][1]["down"]
    sum_ = np.float64(block["weight"]) + 1.5 * np.float64(block["adapter_in"]) @ np.float64(block["adapter_out"])
    np.testing.assert_allclose(found["blocks"][1]["down"]["weight"], sum_, rtol=1e-6, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, found, lora.merged(policy.parameters, numbers))


def test_a_reward_model_is_saved_as_one(tmp_path):
    policy = pretrained.load(folders.GOLDEN / "qwen3_reward")
    assert policy.score.shape == (1, 32) and "head" not in policy.parameters
    pretrained.save(policy, tmp_path / "saved")
    one, two = folders.tensors(tmp_path / "saved"), folders.tensors(folders.GOLDEN / "qwen3_reward")
    assert one.keys() == two.keys() and "score.weight" in one
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_policy_scores_nothing_and_a_reward_model_one_number(tmp_path):
    with pytest.raises(ValueError, match="has no score head: load a ...ForSequenceClassification with num_labels=1"):
        made().scores(jnp.ones((1, 2), jnp.int32), jnp.ones(1, jnp.int32))
    folder = folders.copied("qwen3_reward", tmp_path)
    folders.edited(folder, id2label=..., label2id=..., num_labels=3)
    with pytest.raises(ValueError, match="gives each text 3 numbers; a reward model gives 1"):
        pretrained.load(folder)
    folders.edited(folder, num_labels=...)  # transformers' default is 2
    with pytest.raises(ValueError, match="gives each text 2 numbers"):
        pretrained.load(folder)
    folders.edited(folder, id2label={"0": "a"})
    assert pretrained.is_reward_model(hub.read_json(folder / "config.json"))
    assert not pretrained.is_reward_model({})
    assert not pretrained.is_reward_model({"architectures": ["LlamaForCausalLM"]})


@pytest.mark.parametrize("call", [lambda **how: pretrained.load(folders.GOLDEN / "qwen2", **how),
                                  lambda **how: pretrained.save(made(), "nowhere", **how)], ids=["load", "save"])
def test_another_dtype_is_refused(call):
    with pytest.raises(ValueError, match=r"dtype='bf16': allowed are \['bfloat16', 'float32'\]"):
        call(dtype="bf16")


def test_features_that_no_family_has_are_not_written(tmp_path):
    shape = dataclasses.replace(made().network.shape, logit_cap=3.0)
    with pytest.raises(ValueError, match="no published family has this combination"):
        pretrained.save(published_shapes.policy(shape), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_the_module_is_nnx_s():
    module = nnx.merge(made().graphdef, made().parameters)
    assert isinstance(module, transformer.Transformer)
    np.testing.assert_array_equal(module.blocks[1].down.weight[...], made().parameters["blocks"][1]["down"]["weight"])
