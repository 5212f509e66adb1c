"""Low-rank adapters beside peft: theirs read here, ours read there, and both merged."""
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from rl_jax.models import lora, pretrained
from rl_jax.models.lora import Adapters
from rl_jax.models.network import Network
from tests.parity import checkpoints
from tests.parity.checkpoints import golden

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")]
CLOSE = 2e-5  # of the largest logit
ATTENTION, INNER = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
TARGETS = {"qwen2": [*ATTENTION, *INNER], "qwen3_moe": ATTENTION, "llama, linear scaling": ["q_proj", "up_proj"],
           "gemma2": ["o_proj", *INNER], "gemma3_text": ["k_proj", "v_proj", "down_proj"]}
OURS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out", "gate_proj": "gate", "up_proj": "up",
        "down_proj": "down"}


@pytest.fixture(scope="module", params=TARGETS)
def case(request, tmp_path_factory):
    """(name, the base network as they and we have it)"""
    return request.param, checkpoints.make(request.param, tmp_path_factory.mktemp("checkpoint") / "base")


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=CLOSE * np.abs(wanted).max())


def adapted(pair, targets):
    """Their model of the folder with random adapters."""
    import peft

    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, lora_dropout=0.1, task_type="CAUSAL_LM")
    model = peft.get_peft_model(checkpoints.reread(pair.folder), settings).eval()
    golden.fill_adapter(model, 11)
    return model


def test_theirs_load_here(case, tmp_path):
    """Scanned or not; and as many numbers are written again as were read."""
    name, pair = case
    model = adapted(pair, TARGETS[name])
    model.save_pretrained(tmp_path / "theirs")
    logits = golden.logits_of(model, pair.tokens)
    assert np.abs(logits - pair.logits).max() > 0.1
    policy = pretrained.load(tmp_path / "theirs")
    assert_close(checkpoints.our_logits(policy, pair.tokens), logits)
    scanned = pretrained.load(tmp_path / "theirs", scan_layers=True)
    assert_close(checkpoints.our_logits(scanned, pair.tokens), logits)
    pretrained.save_adapters(scanned, tmp_path / "ours", str(pair.folder))
    theirs, ours = (safetensors.numpy.load_file(tmp_path / who / "adapter_model.safetensors")
                    for who in ("theirs", "ours"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["lora_alpha"] == 5


def test_ours_load_there(case, tmp_path):
    """Adapters that were begun and changed here, in peft, beside the base network and merged into it."""
    import peft

    name, pair = case
    adapters = Adapters(rank=2, alpha=7.0, targets="|".join(OURS[one] for one in TARGETS[name]))
    network = Network(pair.ours.network.shape, adapters)
    keys = iter(jax.random.split(jax.random.key(0), 1_000))
    parameters = jax.tree_util.tree_map_with_path(
        lambda path, a: 0.1 * jax.random.normal(next(keys), a.shape) if path[-1].key in lora.LEAVES else a,
        lora.fresh(pair.ours.parameters, network.initialise(jax.random.key(1))))
    policy = pretrained.Policy(network=network, parameters=parameters, config=pair.ours.config, tokenizer=None)
    logits = checkpoints.our_logits(policy, pair.tokens)
    assert np.abs(logits - pair.logits).max() > 0.1
    pretrained.save_adapters(policy, tmp_path / "ours", str(pair.folder))
    model = peft.PeftModel.from_pretrained(checkpoints.reread(pair.folder), tmp_path / "ours").eval()
    assert_close(logits, golden.logits_of(model, pair.tokens))

    pretrained.save(policy, tmp_path / "merged")
    ours, theirs = (checkpoints.reread(tmp_path / "merged").state_dict(), model.merge_and_unload().state_dict())
    assert ours.keys() == theirs.keys()
    for weight in ours:
        np.testing.assert_allclose(ours[weight].numpy(), theirs[weight].numpy(), atol=1e-6, err_msg=weight)


@pytest.mark.parametrize("setting", [{"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 8}},
                                     {"modules_to_save": ["lm_head"]}, {"bias": "all"}], ids=str)
def test_adapters_that_do_something_else_are_refused(setting, tmp_path):
    """What peft writes for them, by the name of the setting."""
    import peft

    pair = checkpoints.make("llama", tmp_path / "base")
    settings = peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM", **setting)
    peft.get_peft_model(checkpoints.reread(pair.folder), settings).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=next(iter(setting))):
        pretrained.load(tmp_path / "theirs")
