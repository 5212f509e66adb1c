"""The whole way of a published model on GSM8K's real form: chat, SFT, GRPO with math-verify, export, load again."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from rl_jax import experiment
from rl_jax.models import lora, pretrained
from rl_jax.train import metrics, trained
from tests.ends import published, tiny

CHAT = {"system": "You solve problems.", "instruction": "Put the number behind ####.", "enable_thinking": False}


def phase(recipe, steps, rate, args={}, **scale):
    return {"recipe": experiment.recipe_section(recipe, **args),
            "optimiser": experiment.section(experiment.Optimiser, learning_rate=rate),
            "scale": experiment.section(experiment.Scale, **{"steps": steps, "prompts_per_step": 4} | scale)}


def config(checkpoint, *, grpo={}, **model):
    """SFT on worked solutions, then GRPO."""
    return ml_collections.ConfigDict({
        "task": experiment.task_section("gsm8k", path=str(tiny.ROOT / "tests/ends/gsm8k"), validation_size=1,
                                        tokenizer=str(checkpoint), chat=CHAT, **published.LENGTHS),
        "model": experiment.pretrained_section(str(checkpoint), **{"compute": "float32"} | model),
        "before": (ml_collections.ConfigDict(phase("baselines.sft", 4, 1e-2)),),
        **phase("baselines.grpo", 3, 3e-3, {"group_size": 4, "beta": 0.01}, **grpo),
        "run": experiment.section(experiment.Run, checkpoint_every=2, shown_groups=1, workers=1),
    }).lock()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return published.make(tmp_path_factory.mktemp("published") / "small")


@pytest.fixture(scope="module", params=["all", "lora"])
def run(request, checkpoint, tmp_path_factory):
    """(workdir, what the run returned, which weights its second phase trains)."""
    workdir = tmp_path_factory.mktemp(request.param)
    grpo = {} if request.param == "all" else {"train": "lora", "lora": {"rank": 2, "alpha": 4.0, "targets": "query|value"}}
    finished, said = tiny.train(workdir, config(checkpoint, grpo=grpo, scan_layers=request.param == "lora"))
    assert f"loading {checkpoint}" in said
    return workdir, finished, request.param


def test_it_learns_the_solutions_and_then_from_its_answers(run):
    workdir, finished, _ = run
    rows = list(metrics.rows(workdir / "metrics.jsonl"))
    supervised, reinforced = rows[:4], rows[4:]
    assert finished.step == len(rows) == 7
    assert supervised[-1]["loss/total"] < 0.9 * supervised[0]["loss/total"]
    assert abs(reinforced[0]["policy/kl_reference"]) < 1e-6 and all(row["reward/failed"] == 0 for row in reinforced)
    assert max(row["rollout/logp_gap_nats"] for row in reinforced) < 1e-4
    shown = [json.loads(line) for line in (workdir / "rollouts.jsonl").read_text().splitlines()]
    assert any("<|im_start|>user\n" in json.dumps(row, ensure_ascii=False).encode().decode("unicode_escape") for row in shown)


def test_what_is_exported_is_the_policy(run, tmp_path):
    workdir, finished, train = run
    found = trained.load(workdir, "latest")
    start = pretrained.load(found.experiment.pretrained.path)
    assert lora.there(found.policy) == (train == "lora")
    policy = dataclasses.replace(start, network=found.network, parameters=found.policy)
    pretrained.save(policy, tmp_path / "out")
    again = pretrained.load(tmp_path / "out")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 480, (2, 24)), jnp.int32)
    expected = jax.jit(lambda p: dataclasses.replace(policy, parameters=p).logits(tokens))(found.policy)
    np.testing.assert_allclose(jax.jit(again.logits)(tokens), expected, atol=2e-5 * np.abs(expected).max())
    assert np.abs(np.asarray(start.logits(tokens)) - expected).max() > 1e-2, "the run moved the weights"
    assert again.tokenizer.fingerprint == start.tokenizer.fingerprint
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_frozen_weights_are_written_once_per_phase(run):
    workdir, _, train = run
    there = {"policy"} if train == "lora" else {"reference"}
    assert {folder.name for folder in (workdir / "frozen" / "1").iterdir()} == there
    assert not list((workdir / "checkpoints").glob("*/frozen"))


def test_a_run_with_adapters_goes_on_where_it_stopped(checkpoint, tmp_path):
    """Also from the middle of the second phase: adapters, their optimiser state, and the weights that they stand beside."""
    grpo = {"train": "lora", "lora": {"rank": 2, "alpha": 4.0, "targets": "query|value"}}
    one = config(checkpoint, grpo=grpo)
    whole, _ = tiny.train(tmp_path / "whole", one)
    with tiny.stopped_after(5):
        stopped, _ = tiny.train(tmp_path / "stopped", one)
    assert stopped.interrupted and 5 <= stopped.step < 7
    again, _ = tiny.train(tmp_path / "stopped", one)
    assert tiny.bits(again.policy) == tiny.bits(whole.policy)
    assert tiny.left_behind(tmp_path / "stopped") == tiny.left_behind(tmp_path / "whole")


def test_the_tasks_tokenizer_must_be_the_checkpoints(checkpoint):
    wrong = config(checkpoint)
    with wrong.unlocked():
        wrong.task.args.tokenizer, wrong.task.args.chat = "", None
    with pytest.raises(ValueError, match=r"has the tokenizer \w+, and the task's is .*set task.args.tokenizer"):
        experiment.parse(wrong)


def test_a_checkpoint_without_tokenizer_is_refused(checkpoint, tmp_path):
    policy = pretrained.load(checkpoint)
    pretrained.save(dataclasses.replace(policy, folder=None), tmp_path / "bare")
    wrong = config(checkpoint)
    wrong.model.path = str(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        experiment.parse(wrong)
