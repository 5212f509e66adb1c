"""Adapters in peft's format: what it wrote, what we write, and what we refuse."""
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as library

from rl_jax.models import lora, peft, pretrained, weights
from rl_jax.models.lora import Adapters
from rl_jax.models.network import Network
from tests.models import folders, published_shapes

DOWN = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"


@functools.cache
def golden():
    return pretrained.load(folders.GOLDEN / "lora")


def logits(policy, tokens):
    return np.asarray(jax.jit(policy.logits)(jnp.asarray(tokens)))


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_the_logits_are_those_of_peft(scan_layers):
    """Beside the weights and merged; its base is found beside its own folder."""
    with np.load(folders.GOLDEN / "lora" / "expected.npz") as expected:
        tokens, wanted = expected["tokens"], expected["logits"]
    policy = pretrained.load(folders.GOLDEN / "lora", scan_layers=True) if scan_layers else golden()
    assert policy.network.adapters.scale == 2.0 and policy.folder.name == "qwen3"
    np.testing.assert_allclose(logits(policy, tokens), wanted, rtol=0, atol=5e-5 * np.abs(wanted).max())
    if not scan_layers:
        merged = pretrained.Policy(policy.network, lora.merged(policy.parameters, policy.network.adapters))
        np.testing.assert_allclose(logits(merged, tokens), wanted, rtol=0, atol=5e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_what_is_saved_is_what_peft_wrote(scan_layers, tmp_path):
    """Names, types and values of the tensors, and every field of its config that says something."""
    policy = pretrained.load(folders.GOLDEN / "lora", scan_layers=scan_layers)
    pretrained.save_adapters(policy, tmp_path / "lora", "qwen3")
    assert sorted(one.name for one in (tmp_path / "lora").iterdir()) == [peft.CONFIG, peft.FILE]
    found, wanted = folders.tensors(tmp_path / "lora"), folders.tensors(folders.GOLDEN / "lora")
    assert found.keys() == wanted.keys() and len(found) == 12
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    given = json.loads((folders.GOLDEN / "lora" / peft.CONFIG).read_text())
    written = json.loads((tmp_path / "lora" / peft.CONFIG).read_text())
    assert {name: given[name] for name in written} == written
    assert written["base_model_name_or_path"] == "qwen3" and written["r"] == 4


def test_adapters_of_ours_come_back(tmp_path):
    """A mixture's dense layer has adapters in its inner layer, its experts have none: peft is told no more."""
    shape = published_shapes.SHAPES["qwen3_moe"]
    network = Network(shape, Adapters(rank=2, alpha=3.0))
    policy = pretrained.Policy(network, published_shapes.drawn(network))
    pretrained.save(pretrained.Policy(Network(shape), lora.without(policy.parameters)), tmp_path / "base")
    pretrained.save_adapters(policy, tmp_path / "adapters", str(tmp_path / "base"))
    found = pretrained.load(tmp_path / "adapters")
    jax.tree.map(np.testing.assert_array_equal, found.parameters, policy.parameters)
    assert (found.network.adapters.rank, found.network.adapters.alpha) == (2, 3.0)
    names = folders.tensors(tmp_path / "adapters")
    assert {name.split(".")[4] for name in names if "gate_proj" in name} == {"1", "3"}
    assert json.loads((tmp_path / "adapters" / peft.CONFIG).read_text())["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    every = Network(published_shapes.SHAPES["qwen3_moe, windowed"], Adapters(rank=2, targets="query|gate"))
    pretrained.save_adapters(pretrained.Policy(every, published_shapes.drawn(every)), tmp_path / "few", "base")
    assert json.loads((tmp_path / "few" / peft.CONFIG).read_text())["target_modules"] == ["q_proj"]


def test_adapters_narrower_than_float32_are_read_exactly(tmp_path):
    folder = folders.copied("lora", tmp_path)
    folders.copied("qwen3", tmp_path)
    narrow = {name: array.astype(jnp.bfloat16) for name, array in folders.tensors(folder).items()}
    library.save_file(narrow, folder / peft.FILE)
    found = pretrained.load(folder).parameters["blocks"][1]["down"]["adapter_in"]
    np.testing.assert_array_equal(found, narrow[DOWN].T.astype(np.float32))


def test_a_policy_without_adapters_writes_none(tmp_path):
    policy = pretrained.Policy(Network(published_shapes.PLAIN), published_shapes.drawn(Network(published_shapes.PLAIN)))
    with pytest.raises(ValueError, match="has no adapters to write: it was trained whole"):
        pretrained.save_adapters(policy, tmp_path / "new", "base")
    assert list(tmp_path.iterdir()) == []


OTHER_KINDS = {"use_dora": True, "use_rslora": True, "fan_in_fan_out": True, "bias": "all", "lora_bias": True,
               "peft_type": "IA3", "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 8},
               "modules_to_save": ["lm_head"], "target_parameters": ["experts.gate_up_proj"],
               "trainable_token_indices": [3], "layer_replication": [[0, 2]], "use_qalora": True}


@pytest.mark.parametrize("field", OTHER_KINDS)
def test_another_kind_of_adapter_is_refused(field, tmp_path):
    folder = folders.edited(folders.copied("lora", tmp_path), peft.CONFIG, **{field: OTHER_KINDS[field]})
    with pytest.raises(ValueError, match=f"{peft.CONFIG}: {field}=.*: allowed is {peft.PLAIN[field]!r}"):
        peft.load(folder, golden().parameters, {})


def renamed(old, new):
    def change(held):
        for name in list(held):
            held[name.replace(old, new)] = held.pop(name)

    return change


WRONG = {
    "rank": (lambda held: held.update({DOWN: np.ones((5, 48), np.float32)}),
             rf"{peft.FILE}: tensor '{DOWN}' has the shape \(5, 48\), and config.json asks for \(4, 48\)"),
    "size": (lambda held: held.update({DOWN: np.ones((4, 47), np.float32)}), rf"{peft.FILE}: tensor '{DOWN}' .*\(4, 48\)"),
    "missing": (lambda held: held.pop(DOWN), f"lacks '{DOWN}'"),
    "half of them": (renamed("layers.1.mlp", "layers.7.mlp"), r"lacks 'base_model.model.model.layers.1.mlp.down_proj"),
    "more": (lambda held: held.update({"base_model.model.lm_head.lora_A.weight": np.ones((4, 32), np.float32)}),
             rf"{peft.FILE} holds 'base_model.model.lm_head.lora_A.weight'"),
    "none of ours": (renamed("_proj", "_other"), f"{peft.FILE} holds adapters of none of .*self_attn.q_proj"),
    "type": (lambda held: held.update({DOWN: np.ones((4, 48), np.int8)}), f"{peft.FILE}: tensor '{DOWN}' is of type I8")}


@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_do_not_fit_are_named(case, tmp_path):
    change, message = WRONG[case]
    folder = folders.rewritten(folders.copied("lora", tmp_path), change, peft.FILE)
    base, config = golden(), golden().config
    with pytest.raises(ValueError, match=message):
        peft.load(folder, base.parameters, weights.layout(config, base.network.shape))


@pytest.mark.parametrize("fields, message", [
    ({"base_model_name_or_path": None}, f"{peft.CONFIG} names no base_model_name_or_path"),
    ({"base_model_name_or_path": "nowhere"}, "'nowhere' is neither a folder that exists nor a repository"),
    ({"base_model_name_or_path": str(folders.GOLDEN / "qwen2")}, "tensor .* has the shape|lacks"),
    ({"base_model_name_or_path": str(folders.GOLDEN / "qwen3"), "r": ...}, f"{peft.CONFIG} has no field 'r'"),
    ({"base_model_name_or_path": str(folders.GOLDEN / "qwen3"), "lora_alpha": ...}, "has no field 'lora_alpha'")])
def test_a_config_that_cannot_be_followed_is_refused(fields, message, tmp_path):
    folder = folders.edited(folders.copied("lora", tmp_path), peft.CONFIG, **fields)
    with pytest.raises(ValueError, match=message):
        pretrained.load(folder)
