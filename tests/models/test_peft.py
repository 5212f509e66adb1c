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


def written(name, adapters, folder):
    """A base and adapters of ours, in folders of these names."""
    network = Network(published_shapes.SHAPES[name], adapters)
    policy = pretrained.Policy(network, published_shapes.drawn(network))
    pretrained.save(pretrained.Policy(Network(network.shape), lora.without(policy.parameters)), folder / "base")
    pretrained.save_adapters(policy, folder / "adapters", str(folder / "base"))
    return policy, json.loads((folder / "adapters" / peft.CONFIG).read_text())


@pytest.mark.parametrize("name, targets, modules", [
    ("gemma3_text", "query|up", ["q_proj", "up_proj"]), ("qwen3_moe", "key|out", ["k_proj", "o_proj"]),
    ("qwen3_moe, windowed", "query|gate", ["q_proj"])])
def test_adapters_of_ours_come_back(name, targets, modules, tmp_path):
    """peft is told of those that there are: experts have none, and it would make some."""
    policy, config = written(name, Adapters(rank=2, alpha=3.0, targets=targets), tmp_path)
    found = pretrained.load(tmp_path / "adapters")
    jax.tree.map(np.testing.assert_array_equal, found.parameters, policy.parameters)
    assert (found.network.adapters.rank, found.network.adapters.alpha) == (2, 3.0)
    assert config["target_modules"] == modules and config["lora_alpha"] == 3.0


def test_what_peft_would_misunderstand_is_not_written(tmp_path):
    """It takes down_proj of a dense layer for the experts' where others are mixed."""
    with pytest.raises(ValueError, match=r"adapters on \['down'\] of the dense layers .* cannot be written: .*Merge"):
        written("qwen3_moe", Adapters(rank=2, targets="query|down"), tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["base"]


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
             rf"{peft.FILE}: tensor '{DOWN}' has the shape \(5, 48\), and adapter_config.json asks for \(4, 48\)"),
    "size": (lambda held: held.update({DOWN: np.ones((4, 47), np.float32)}),
             rf"{peft.FILE}: tensor '{DOWN}' .*\(4, 48\)"),
    "missing": (lambda held: held.pop(DOWN), f"lacks '{DOWN}'"),
    "half of them": (renamed("layers.1.mlp", "layers.7.mlp"), r"lacks 'base_model.model.model.layers.1.mlp.down_proj"),
    "more": (lambda held: held.update({"base_model.model.lm_head.lora_A.weight": np.ones((4, 32), np.float32)}),
             rf"{peft.FILE} holds 'base_model.model.lm_head.lora_A.weight'"),
    "none of ours": (renamed("_proj", "_other"), f"{peft.FILE} holds adapters of none of .*self_attn.q_proj"),
    "type": (lambda held: held.update({DOWN: np.ones((4, 48), np.int8)}),
             f"{peft.FILE}: tensor '{DOWN}' is of type I8")}


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
