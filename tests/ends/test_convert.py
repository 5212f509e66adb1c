"""scripts/convert_weights.py both ways: a run of ours and one of a published checkpoint, whole and as adapters."""
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from rl_jax import experiment
from rl_jax.models import lora, pretrained
from rl_jax.train import trained
from tests.ends import published, tiny
from tests.models import folders

LORA = {"train": "lora", "lora": {"rank": 2, "alpha": 3.0, "targets": "query|down"}}


@pytest.fixture(scope="module")
def convert(cache_directory):
    """convert(*arguments) -> (exit status, what it printed)."""
    return lambda *given: tiny.Script("convert_weights.py", *given, cache=cache_directory).end()


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A run of a small network in the shape of Qwen3: two steps of all weights, two of adapters."""
    workdir = tmp_path_factory.mktemp("ours") / "run"
    config = tiny.config(warm_start=2, steps=2, **LORA)
    config.model.features.query_norm = True
    tiny.train(workdir, config)
    return workdir


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A run that starts from a published checkpoint: twice two steps of adapters."""
    folder = tmp_path_factory.mktemp("theirs")
    checkpoint = published.make(folder / "published")

    def phase():
        return {"recipe": experiment.recipe_section("baselines.sft"),
                "optimiser": experiment.section(experiment.Optimiser, learning_rate=1e-2),
                "scale": experiment.section(experiment.Scale, steps=2, prompts_per_step=2, **LORA)}

    tiny.train(folder / "run", ml_collections.ConfigDict({
        "task": experiment.task_section("gsm8k", path=str(tiny.ROOT / "tests/ends/gsm8k"), validation_size=1,
                                        tokenizer=str(checkpoint), **published.LENGTHS),
        "model": experiment.pretrained_section(str(checkpoint), compute="float32", scan_layers=True),
        "before": (ml_collections.ConfigDict(phase()),), **phase(),
        "run": experiment.section(experiment.Run, checkpoint_every=2, shown_groups=1, workers=1)}).lock())
    return folder / "run", checkpoint


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def merged(found):
    return lora.merged(found.policy, found.network.adapters)


def test_a_run_of_ours_is_a_checkpoint_with_a_config_of_its_own(ours, convert, tmp_path):
    """Adapters merged, in shards, in bfloat16; imported again it is one file of float32 with the same numbers."""
    status, said = convert("export", f"--workdir={ours}", f"--target={tmp_path / 'out'}", "--checkpoint=latest",
                           "--dtype=bfloat16", "--shard_gb=2e-6")
    assert status == 0 and "Traceback" not in said, said
    found, policy = trained.load(ours, "latest"), pretrained.load(tmp_path / "out", dtype="float32")
    expected = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), merged(found))
    same(policy.parameters, expected)
    config, tokenizer = policy.config, found.experiment.task.tokenizer
    assert (config["model_type"], config["torch_dtype"]) == ("qwen3", "bfloat16")
    assert (config["eos_token_id"], config["pad_token_id"]) == (list(tokenizer.stop_ids), tokenizer.pad_id)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 4_000 for file in files)
    count = sum(leaf.size for leaf in jax.tree.leaves(expected))
    size = sum(file.stat().st_size for file in files)
    assert f"{ours}, step 4" in said and f"{count:,} parameters, bfloat16, {size:,} bytes" in said
    assert "is none that other libraries read" in said.replace("\n", " ")

    status, said = convert("import", f"--source={tmp_path / 'out'}", f"--target={tmp_path / 'wide'}", "--dtype=float32")
    assert status == 0 and f"{count:,} parameters, float32" in said, said
    again = pretrained.load(tmp_path / "wide")
    same(again.parameters, expected)
    assert again.config == {**config, "torch_dtype": "float32"}
    assert len(list((tmp_path / "wide").glob("*.safetensors"))) == 1


def test_a_published_model_goes_out_with_its_own_files(theirs, convert, tmp_path):
    run, checkpoint = theirs
    status, said = convert("export", f"--workdir={run}", f"--target={tmp_path / 'out'}", "--checkpoint=latest")
    assert status == 0, said
    found, policy = trained.load(run, "latest"), pretrained.load(tmp_path / "out", scan_layers=True)
    same(policy.parameters, merged(found))
    start = pretrained.load(checkpoint)
    assert policy.config == {**start.config, "torch_dtype": "float32"}
    assert policy.tokenizer.fingerprint == start.tokenizer.fingerprint
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in checkpoint.iterdir()}


def test_adapters_go_out_alone(theirs, convert, tmp_path):
    """Those of the first phase belong to the published weights; those of the second to what the first made of them."""
    run, checkpoint = theirs
    command = ("export", f"--workdir={run}", "--adapters", f"--target={tmp_path / 'out'}")
    status, said = convert(*command, "--checkpoint=sft_1")
    assert status == 0, said
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(checkpoint), 2, 3.0)
    found, policy = trained.load(run, "sft_1"), pretrained.load(tmp_path / "out", dtype="float32", scan_layers=True)
    same(policy.parameters, found.policy)
    count = sum(array.size for array in folders.tensors(tmp_path / "out").values())
    assert f"{count:,} parameters, float32" in said
    status, said = convert(*command[:-1], f"--target={tmp_path / 'second'}", "--checkpoint=latest")
    assert status == 1 and "phases before step 4 changed the weights that the adapters belong to" in said, said
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_adapters_of_fresh_weights_belong_to_nothing(ours, convert, tmp_path):
    status, said = convert("export", f"--workdir={ours}", f"--target={tmp_path / 'out'}", "--adapters",
                           "--checkpoint=latest")
    assert status == 1 and "did not start from a published checkpoint" in said and "Traceback" not in said, said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments, said", [
    ([], "usage: convert_weights.py {import,export}"), (["load"], "got ['load']"),
    (["import"], "ValueError: import needs --source"), (["export"], "ValueError: export needs --workdir"),
    (["import", "--source=a", "--workdir=b"], "import does not read ['--workdir']"),
    (["export", "--source=a", "--workdir=b"], "export does not read ['--source']"),
    (["export", "--workdir=a", "--adapters", "--dtype=bfloat16"], "leave --dtype away"),
    (["export", "--workdir=nowhere"], "nowhere holds no run"),
    (["import", "--source=nowhere"], "'nowhere' is neither a folder that exists nor a repository"),
    (["import", f"--source={folders.GOLDEN / 'qwen2'}"], "exists and is not empty")])
def test_wrong_arguments_are_answered(arguments, said, convert, tmp_path):
    (tmp_path / "kept").write_text("kept")
    target = tmp_path if said.startswith("exists") else tmp_path / "out"
    status, printed = convert(*arguments, f"--target={target}")
    assert status == 1 and "Traceback" not in printed and said in printed, printed
    assert [one.name for one in tmp_path.iterdir()] == ["kept"]
