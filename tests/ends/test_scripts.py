"""The scripts as processes: train, interrupt, continue, evaluate, sample, report, and their refusals."""
import json
import pathlib
import re
import signal

import pytest

from rl_jax.train import metrics
from tests.ends import tiny

CONFIG = pathlib.Path(__file__).with_name("tiny_config.py")
STEPS = 24


@pytest.fixture(scope="module")
def run(cache_directory):
    """run(script, *arguments) -> (exit status, what it printed)."""
    return lambda *given: tiny.Script(*given, cache=cache_directory).end()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_directory):
    """A run of a host verifier, stopped by Ctrl-C, then by SIGTERM, then left to its end; what each printed."""
    workdir, said = tmp_path_factory.mktemp("scripts") / "run", []
    for number, step in ((signal.SIGINT, 4), (signal.SIGTERM, 12), (None, STEPS)):
        process = tiny.Script("train.py", f"--config={CONFIG}:split", f"--workdir={workdir}", cache=cache_directory)
        if number is not None:
            process.until(lambda step=step: tiny.last_step(workdir) >= step)
            process.signal(number)  # to the workers too, as a terminal's Ctrl-C is
        status, printed = process.end()
        assert status == 0 and "Traceback" not in printed, printed
        said.append((printed, tiny.last_step(workdir)))
    return workdir, said


def test_ctrl_c_and_sigterm_save_and_exit_cleanly(trained):
    workdir, said = trained
    for printed, reached in said[:2]:
        assert f"stopped after step {reached}; the same command continues from there" in printed
        assert f"step {reached}, stopped early" in printed and f"checkpoint {workdir}/checkpoints/{reached}" in printed
        assert "failed in the verifier" not in printed
    assert said[0][1] < said[1][1] < STEPS


def test_the_same_command_continues(trained):
    workdir, said = trained
    for (printed, _), (_, reached) in zip(said[1:], said[:-1], strict=True):
        assert f"resuming {workdir} after step {reached}" in printed
    assert said[2][0].splitlines()[-3:] == [f"step {STEPS}", f"checkpoint {workdir}/checkpoints/{STEPS}",
                                            f"report {workdir}/report.html"]
    rows = list(metrics.rows(workdir / "metrics.jsonl"))
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1)] and all(row["reward/failed"] == 0 for row in rows)


def test_evaluate_prints_and_keeps_estimates(trained, run):
    workdir, _ = trained
    status, said = run("evaluate.py", f"--workdir={workdir}", "--problems=6", "--samples=4", "--ks=1,4")
    assert status == 0, said
    for name in ("pass@1", "pass@4", "avg@4", "maj@4"):
        assert re.search(rf"{name}\b.*\d\.\d", said), said
    assert f"step {STEPS}" in said and f"report {workdir}/report.html" in said
    kept = json.loads((workdir / "evaluation.json").read_text())
    assert "pass@4" in json.dumps(kept)


def test_sample_prints_completions_with_their_numbers(trained, run):
    workdir, _ = trained
    status, said = run("sample.py", f"--workdir={workdir}", "--prompt=3 + 4 =", "--samples=3", "--tokens",
                       "--checkpoint=latest")
    assert status == 0, said
    assert "'3 + 4 ='" in said and "log-probability" in said and "entropy" in said
    assert len(re.findall(r"^completion \d: ", said, flags=re.M)) == 3


def test_report_prints_its_path(trained, run):
    workdir, _ = trained
    run("evaluate.py", f"--workdir={workdir}", "--problems=6", "--samples=4", "--ks=1,4")  # whatever ran before
    (workdir / "report.html").unlink()
    status, said = run("report.py", f"--workdir={workdir}")
    assert status == 0 and said.strip() == str(workdir / "report.html"), said
    page = (workdir / "report.html").read_text()
    assert "chain_sum" in page and "pass@1" in page


REFUSED = {
    "unknown field": (["--config.optimiser.lr=1"], ["config.optimiser has no field 'lr'", "learning_rate"]),
    "unknown field, config apart": (["--config.optimizer.learning_rate=1"], ["config has no field 'optimizer'"]),
    "wrong type": (["--config.scale.steps=many"], ["config.scale.steps=many"]),
    "unknown phase": (["--config.before[1].scale.steps=1"], ["config.before has 1 entries, no [1]"]),
    "impossible": (["--config.recipe.args.group_size=1"], ["group_size=1", "group_size >= 2"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_train_refuses_before_it_writes(case, run, tmp_path):
    overrides, expected = REFUSED[case]
    config = ["--config", CONFIG] if "apart" in case else [f"--config={CONFIG}"]
    status, said = run("train.py", *config, f"--workdir={tmp_path / 'run'}", *overrides)
    assert status == 1 and "Traceback" not in said, said
    assert all(words in said for words in expected), said
    assert list(tmp_path.iterdir()) == []


def test_train_refuses_another_config_in_the_same_place(trained, run):
    workdir, _ = trained
    before = tiny.left_behind(workdir)
    status, said = run("train.py", f"--config={CONFIG}:split", f"--workdir={workdir}", "--config.run.seed=1")
    assert status == 1 and "config.run.seed: there 0, now 1" in said and "Traceback" not in said, said
    assert tiny.left_behind(workdir) == before


@pytest.mark.parametrize("script", ["evaluate.py", "sample.py", "report.py"])
def test_a_directory_without_a_run_is_refused(script, run, tmp_path):
    status, said = run(script, f"--workdir={tmp_path}")
    assert status == 1 and "Traceback" not in said and str(tmp_path) in said, said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments, expected", [
    (["evaluate.py", "--ks=1,9", "--samples=4"], "--ks=1,9: numbers from 1 to --samples=4"),
    (["evaluate.py", "--checkpoint=first"], "allowed are best, latest"),
    (["sample.py", "--prompt=" + "1 + " * 30], "Set prompt_length")], ids=["ks", "checkpoint", "prompt"])
def test_wrong_arguments_are_answered(arguments, expected, trained, run):
    script, *rest = arguments
    status, said = run(script, f"--workdir={trained[0]}", *rest)
    assert status == 1 and "Traceback" not in said and expected in said.replace("\n", " "), said
