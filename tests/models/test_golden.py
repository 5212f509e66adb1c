"""Checkpoints that transformers wrote, against what it and peft say about them (tests/models/golden/README.md)."""
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from rl_jax.models import pretrained
from rl_jax.recipe import Rollout
from rl_jax.rollout import decode
from rl_jax.types import Prompts
from tests.models import older_config

GOLDEN = pathlib.Path(__file__).parent / "golden"
FAMILIES = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
CLOSE = 5e-5  # of the largest logit; GELU's tanh form moves one by 3e-4 of it
every_family = pytest.mark.parametrize("family", FAMILIES)


def expected(name):
    with np.load(GOLDEN / name / "expected.npz") as arrays:
        return dict(arrays)


@functools.cache
def loaded(family):
    return pretrained.load(GOLDEN / family)


def logits(policy, tokens):
    return np.asarray(jax.jit(policy.logits)(jnp.asarray(tokens)))


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=CLOSE * np.abs(wanted).max())


def tensors(folder):
    """Every tensor of a checkpoint by name, and the files that hold them."""
    found, files = {}, sorted(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, "numpy") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
    return found, files


def drawn(policy, rows, rollout, length):
    """A rollout behind each of these prompts, which are padded on the right with what should not be read."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.full((len(rows), lengths.max() + 2), 9, np.int32)
    for row, padded in zip(rows, tokens, strict=True):
        padded[:len(row)] = row
    prompts = Prompts(tokens=jnp.asarray(tokens), lengths=jnp.asarray(lengths), example=jnp.arange(len(rows)),
                      domain=jnp.zeros(len(rows), jnp.int32), facts={})
    draw = jax.jit(decode.make_rollout(policy.network, rollout, completion_length=length, stop_ids=(), pad_id=0))
    uniforms = decode.make_uniforms(jax.random.key(0), len(rows), rollout.group_size, length)
    return jax.device_get(draw(policy.parameters, prompts, uniforms, jnp.int32(0)))


def test_every_golden_folder_is_tested():
    assert {path.name for path in GOLDEN.iterdir() if path.is_dir()} == {*FAMILIES, "lora", "qwen3_reward"}


@every_family
def test_the_logits_are_those_of_transformers(family):
    found = expected(family)
    assert_close(logits(loaded(family), found["tokens"]), found["logits"])


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "gemma3_text"])  # layers: alike, of two kinds, in periods
def test_scanned_layers_say_the_same(family):
    found = expected(family)
    policy = pretrained.load(GOLDEN / family, scan_layers=True)
    assert_close(logits(policy, found["tokens"]), found["logits"])


@every_family
def test_greedy_decoding_is_generate(family):
    found = expected(family)
    samples = drawn(loaded(family), [found["prompt"]], Rollout(group_size=1, temperature=0.0), len(found["greedy"]))
    assert samples.tokens[0].tolist() == found["greedy"].tolist()
    assert samples.mask.all()


@every_family
def test_prefill_and_decoding_are_the_forward_pass(family):
    """The distribution of every token that is drawn is that of the whole text; prompts of two lengths."""
    policy, tokens = loaded(family), expected(family)["tokens"]
    rows = [tokens[0, :11], tokens[1, :11], tokens[1, :3]]
    samples = drawn(policy, rows, Rollout(group_size=2), 20)
    whole = np.full((6, 31), 9, np.int32)
    for n, answer in enumerate(samples.tokens):
        whole[n, :len(rows[n // 2]) + 20] = np.concatenate([rows[n // 2], answer])
    logp = np.asarray(jax.nn.log_softmax(logits(policy, whole)))
    for n, answer in enumerate(samples.tokens):
        own = logp[n, len(rows[n // 2]) - 1:][:20]
        np.testing.assert_allclose(samples.rollout_logp[n], own[np.arange(20), answer], atol=1e-4)
        np.testing.assert_allclose(samples.rollout_entropy[n], -(np.exp(own) * own).sum(axis=1), atol=1e-4)


@every_family
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 40_000], ids=["one file", "several"])
def test_what_is_saved_is_what_was_loaded(family, shard_bytes, tmp_path):
    """Names, dtypes and values of every tensor, the config and its companions."""
    folder = tmp_path / "saved"
    pretrained.save(loaded(family), folder, shard_bytes=shard_bytes)
    (before, _), (after, files) = tensors(GOLDEN / family), tensors(folder)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    assert (len(files) > 1) == (shard_bytes == 40_000)
    assert (folder / "model.safetensors.index.json").exists() == (len(files) > 1)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text()) == json.loads((GOLDEN / family / name).read_text())
    again = pretrained.load(folder)
    assert again.network == loaded(family).network
    jax.tree.map(np.testing.assert_array_equal, again.parameters, loaded(family).parameters)


@every_family
def test_an_older_config_is_the_same_model(family, tmp_path):
    """tests/parity shows that transformers reads it so, too."""
    for file in (GOLDEN / family).iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(older_config.older(loaded(family).config)))
    assert pretrained.load(tmp_path).network == loaded(family).network


def test_a_reward_model_scores_the_last_token():
    found = expected("qwen3_reward")
    policy = pretrained.load(GOLDEN / "qwen3_reward")
    scores = jax.jit(policy.scores)(jnp.asarray(found["tokens"]), jnp.asarray(found["lengths"]))
    np.testing.assert_allclose(scores, found["scores"], atol=1e-5)


def test_adapters_of_peft_both_ways(tmp_path):
    """Beside the weights of the base network that they name; written again they are the same tensors."""
    found, policy = expected("lora"), pretrained.load(GOLDEN / "lora")
    assert_close(logits(policy, found["tokens"]), found["logits"])
    assert policy.network.adapters.rank == 4 and policy.network.adapters.alpha == 8
    pretrained.save_adapters(policy, tmp_path / "lora", "qwen3")
    (before, _), (after, _) = tensors(GOLDEN / "lora"), tensors(tmp_path / "lora")
    jax.tree.map(np.testing.assert_array_equal, after, before)
    pretrained.save(policy, tmp_path / "merged")
    merged = pretrained.load(tmp_path / "merged")
    assert merged.network == loaded("qwen3").network
    assert_close(logits(merged, found["tokens"]), found["logits"])


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_a_narrower_dtype_is_asked_for_by_name(family, tmp_path):
    """What is read or written as bfloat16 holds the nearest such number to each weight."""
    policy = pretrained.load(GOLDEN / family, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(policy.parameters)} == {jnp.bfloat16.dtype}
    pretrained.save(loaded(family), tmp_path / "saved", dtype="bfloat16")
    pretrained.save(policy, tmp_path / "twice")
    (one, _), (two, _), (exact, _) = (tensors(f) for f in (tmp_path / "saved", tmp_path / "twice", GOLDEN / family))
    for name, tensor in exact.items():
        np.testing.assert_array_equal(one[name], tensor.astype(jnp.bfloat16), err_msg=name)
        np.testing.assert_array_equal(two[name], one[name], err_msg=name)
