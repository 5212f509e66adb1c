"""Every family beside transformers, live: other seeds, sizes and settings than the golden checkpoints.

The arithmetic differs in order only: logits agree to 2e-6 of the largest one in float32 (asserted: 2e-5). In bfloat16
they differ from the float32 ones by 1 to 3 % of the logits' spread (root mean square); ours do by 0.8 to 0.95 times as
much as theirs (asserted: 1.5 times).
"""
import copy
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.models import pretrained
from rl_jax.models.network import Network
from rl_jax.recipe import Rollout
from rl_jax.rollout import decode
from rl_jax.types import Prompts
from tests.models import older_config
from tests.parity import checkpoints
from tests.parity.checkpoints import golden

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")]
CLOSE = 2e-5  # of the largest logit
CHAT = pathlib.Path(__file__).parents[1] / "tasks" / "chatml"


@pytest.fixture(scope="module", params=checkpoints.CASES)
def pair(request, tmp_path_factory):
    return checkpoints.make(request.param, tmp_path_factory.mktemp("checkpoint") / "published")


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=CLOSE * np.abs(wanted).max())


def drawn(policy, prompts, rollout, length):
    """A rollout behind prompts [P, L]."""
    rows, width = prompts.shape
    asked = Prompts(tokens=jnp.asarray(prompts), lengths=jnp.full(rows, width), example=jnp.arange(rows),
                    domain=jnp.zeros(rows, jnp.int32), facts={})
    draw = jax.jit(decode.make_rollout(policy.network, rollout, completion_length=length, stop_ids=(), pad_id=0))
    uniforms = decode.make_uniforms(jax.random.key(1), rows, rollout.group_size, length)
    return jax.device_get(draw(policy.parameters, asked, uniforms, jnp.int32(0)))


def test_logits(pair):
    assert_close(checkpoints.our_logits(pair.ours, pair.tokens), pair.logits)


def test_bfloat16(pair, capsys):
    """Rounding of weights and activations alike on both sides; a router's choice may change with it."""
    import torch

    policy = pretrained.load(pair.folder, dtype="bfloat16", compute="bfloat16")
    ours = checkpoints.our_logits(policy, pair.tokens)
    theirs = golden.logits_of(copy.deepcopy(pair.theirs).to(torch.bfloat16), pair.tokens)
    error, usual = (np.sqrt(np.mean((a - pair.logits)**2)) / pair.logits.std() for a in (ours, theirs))
    with capsys.disabled():
        print(f"\n  bfloat16, of the logits' spread: ours {error:.4f}, theirs {usual:.4f}", end=" ")
    assert 0 < error < 1.5 * usual


def test_greedy_decoding_is_generate(pair):
    prompt = pair.tokens[:1, :9]
    samples = drawn(pair.ours, prompt, Rollout(group_size=1, temperature=0.0), 64)
    assert samples.tokens[0].tolist() == golden.greedy(pair.theirs, prompt[0], 64).tolist()


def test_what_is_drawn_has_the_distribution_that_they_give_it(pair):
    """Prefill and decoding against their forward pass over the whole text."""
    prompts = pair.tokens[:2, :17]
    samples = drawn(pair.ours, prompts, Rollout(group_size=2), 24)
    whole = np.concatenate([np.repeat(prompts, 2, axis=0), samples.tokens], axis=1)
    every = np.asarray(jax.nn.log_softmax(golden.logits_of(pair.theirs, whole)))[:, 16:-1]
    np.testing.assert_allclose(samples.rollout_logp, np.take_along_axis(every, samples.tokens[..., None], 2)[..., 0],
                               atol=1e-4)
    np.testing.assert_allclose(samples.rollout_entropy, -(np.exp(every) * every).sum(axis=2), atol=1e-4)


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 30_000], ids=["one file", "several"])
def test_what_we_save_they_load(pair, tmp_path, shard_bytes):
    pretrained.save(pair.ours, tmp_path / "ours", shard_bytes=shard_bytes)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == (shard_bytes == 30_000)
    found = checkpoints.reread(tmp_path / "ours")
    np.testing.assert_array_equal(golden.logits_of(found, pair.tokens), pair.logits)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "ours" / name).read_text()) == json.loads((pair.folder / name).read_text())


def test_an_older_config_is_the_same_model_to_them_and_to_us(pair, tmp_path):
    folder = shutil.copytree(pair.folder, tmp_path / "older")
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "gemma3_text":  # its layers are in no pattern that an older config could name
        config = older_config.older(config)
    if config.get("max_window_layers") == 1:
        config["sliding_window"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(golden.logits_of(checkpoints.reread(folder), pair.tokens), pair.logits)
    assert pretrained.load(folder).network == pair.ours.network


def test_a_fresh_network_is_a_checkpoint_to_them(pair, tmp_path):
    """Without any config of theirs: the one that is written is made from the network's shape."""
    network = Network(pair.ours.network.shape)
    policy = pretrained.Policy(network=network, parameters=network.initialise(jax.random.key(3)), config=None,
                               tokenizer=None)
    pretrained.save(policy, tmp_path / "fresh")
    found = golden.logits_of(checkpoints.reread(tmp_path / "fresh"), pair.tokens)
    assert_close(checkpoints.our_logits(policy, pair.tokens), found)
    assert_close(checkpoints.our_logits(pretrained.load(tmp_path / "fresh"), pair.tokens), found)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_files_of_half_precision(dtype, tmp_path):
    """float16 has weights that bfloat16 has not; what is computed is float32 either way."""
    model_type, settings = checkpoints.CASES["qwen2"]
    theirs = golden.build(model_type, {**checkpoints.SIZES, **settings}, 5, dtype)
    golden.save(theirs, tmp_path / "half", dtype)
    tokens = golden.texts(0, 2, 30)
    logits, policy = golden.logits_of(theirs, tokens), pretrained.load(tmp_path / "half")
    assert_close(checkpoints.our_logits(policy, tokens), logits)
    pretrained.save(policy, tmp_path / "saved")
    np.testing.assert_array_equal(golden.logits_of(checkpoints.reread(tmp_path / "saved"), tokens), logits)


def test_what_accompanies_a_checkpoint_is_kept(tmp_path):
    """Tokenizer, chat template, end tokens and config, to transformers as before."""
    import transformers

    model_type, settings = checkpoints.CASES["qwen3"]
    theirs = golden.build(model_type, {**checkpoints.SIZES, **settings, "vocab_size": 500}, 2)
    golden.save(theirs, tmp_path / "published")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(CHAT / name, tmp_path / "published" / name)
    pretrained.save(pretrained.load(tmp_path / "published"), tmp_path / "ours")
    before, after = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("published", "ours"))
    chat = [{"role": "user", "content": "What is 12 times 12?"}]
    text = after.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == before.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert after(text).input_ids == before(text).input_ids
    ends = transformers.GenerationConfig.from_pretrained(tmp_path / "ours").eos_token_id
    assert ends == json.loads((CHAT / "generation_config.json").read_text())["eos_token_id"]
    written = {path.name for path in (tmp_path / "ours").iterdir()}
    assert written == {path.name for path in (tmp_path / "published").iterdir()}


def test_a_reward_model_both_ways(tmp_path):
    """Scores of texts of three lengths, and the folder that we write as their sequence classifier."""
    import torch
    import transformers

    settings = {**golden.SIZES, **checkpoints.SIZES, "head_dim": 12, "num_labels": 1, "tie_word_embeddings": True}
    config = transformers.AutoConfig.for_model("qwen3", **settings)
    make = transformers.AutoModelForSequenceClassification
    theirs = golden.fill(make.from_config(config, attn_implementation="eager"), 4)
    golden.save(theirs, tmp_path / "published")
    lengths = np.array([20, 1, 13], np.int32)
    mask = np.arange(20)[None, :] < lengths[:, None]
    tokens = np.where(mask, golden.texts(1, 3, 20), 0).astype(np.int32)
    asked = {"attention_mask": torch.from_numpy(mask.astype(np.int64))}
    wanted = golden.logits_of(theirs, tokens, **asked)
    policy = pretrained.load(tmp_path / "published")
    scores = jax.jit(policy.scores)(jnp.asarray(tokens), jnp.asarray(lengths))
    np.testing.assert_allclose(scores, wanted[:, 0], atol=1e-5)
    pretrained.save(policy, tmp_path / "ours")
    again = make.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    np.testing.assert_array_equal(golden.logits_of(again, tokens, **asked), wanted)


def test_the_golden_checkpoints_are_what_the_script_writes(tmp_path):
    """The same bytes, but for expected numbers, which another processor rounds otherwise."""
    golden.make(tmp_path)
    folder = checkpoints.SCRIPTS.parent / "tests" / "models" / "golden"
    files = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert files | {pathlib.Path("README.md")} == {
        path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    for file in sorted(files):
        if file.name != "expected.npz":
            assert (tmp_path / file).read_bytes() == (folder / file).read_bytes(), file
            continue
        with np.load(tmp_path / file) as made, np.load(folder / file) as kept:
            assert made.keys() == kept.keys()
            for name in made:
                np.testing.assert_allclose(made[name], kept[name], rtol=0, atol=1e-4, err_msg=str(file))
