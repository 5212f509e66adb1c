"""Bad input to real, tiny runs: a clear error, or a failure that is counted while the run goes on."""
import dataclasses
import functools
import shutil

import pytest

from rl_jax import experiment, sections
from rl_jax.tasks import task as tasks
from rl_jax.tasks.toys import symbols
from rl_jax.train import metrics, trained
from tests.ends import tiny, verifiers

STEPS = 3
CONFIG = tiny.config(steps=STEPS, run={"checkpoint_every": 1, "keep_last": 3})


def with_verifier(score) -> tasks.Task:
    """The toy task scored on the host by something else."""
    return dataclasses.replace(experiment.parse(CONFIG).task, verifier=tasks.HostVerifier(score, time_limit_s=0.2))


def rows(workdir):
    return list(metrics.rows(workdir / "metrics.jsonl"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    tiny.train(workdir, CONFIG)
    return workdir


@pytest.mark.parametrize("program", ["one", "split"])
@pytest.mark.parametrize("fault", ["raises", "hangs", "gives_nan"])
def test_a_verifier_s_fault_is_a_counted_failure(tmp_path, fault, program):
    task = with_verifier(functools.partial(verifiers.score, fault))
    ended, _ = tiny.train(tmp_path, CONFIG, task=task, program=program)
    assert ended.step == STEPS and [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    failed = [row["reward/failed"] for row in rows(tmp_path)]
    assert all(0 < n <= 8 for n in failed) and sum(failed) < 8 * STEPS, "most answers begin with a digit, not all"
    assert all(row["gradient/skipped"] == 0 and isinstance(row["reward/score"], float) for row in rows(tmp_path))
    table = list(metrics.rows(tmp_path / "rollouts.jsonl"))
    assert all(row["failed"] == row["completion"][:1].isdigit() for row in table), "a failure is that answer's alone"


@pytest.mark.parametrize("program", ["one", "split"])
def test_when_every_answer_fails_nothing_is_learned(tmp_path, program):
    before = experiment.parse(CONFIG)
    ended, _ = tiny.train(tmp_path, CONFIG, task=with_verifier(verifiers.always_raises), program=program)
    assert [row["reward/failed"] for row in rows(tmp_path)] == [8, 8, 8]
    assert all(row["gradient/norm"] == 0 and row["reward/score"] == 0 for row in rows(tmp_path))
    assert ended.step == before.phases[0].scale.steps


def test_a_verifier_that_cannot_be_loaded_is_refused(tmp_path):
    with pytest.raises(ValueError, match="verifier cannot be loaded in a worker"):
        tiny.train(tmp_path, CONFIG, task=with_verifier(Unloadable()))
    assert not (tmp_path / "metrics.jsonl").exists()


class Unloadable:
    """Can be sent to a worker and not be made there."""

    def __reduce__(self):
        return int, ("no number",)

    def __call__(self, fields, text):
        return {"score": 0.0}


def test_an_unknown_field_and_a_group_of_one_are_refused(tmp_path):
    values = sections.plain(CONFIG)
    with pytest.raises(ValueError, match="config.scale has no field 'step'; allowed are .*steps"):
        experiment.parse(values | {"scale": values["scale"] | {"step": 1}})
    with pytest.raises(ValueError, match="group_size=1: .* needs group_size >= 2"):
        experiment.parse(tiny.config(recipe="baselines.grpo", recipe_args={"group_size": 1}))


def test_a_prompt_longer_than_the_limit_is_refused(tmp_path):
    task = experiment.parse(CONFIG).task
    with pytest.raises(ValueError, match="a prompt has 5 tokens and prompt_length allows 1 to 4.*Set prompt_length"):
        tasks.encoded_prompt(task.tokenizer, "12+3=", task.prompt_length)
    long = dataclasses.replace(task.splits["train"][0], prompt=task.tokenizer.encode("12+3="))
    with pytest.raises(ValueError, match="prompt_length is 4: set it to at least 5"):
        tiny.train(tmp_path, CONFIG, task=dataclasses.replace(task, splits=dict(task.splits) | {"train": (long,)}))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_empty_dataset_is_refused(split):
    task = experiment.parse(CONFIG).task
    with pytest.raises(ValueError, match=f"split '{split}' is empty"):
        dataclasses.replace(task, splits=dict(task.splits) | {split: ()})


def test_a_corrupt_checkpoint_is_refused_and_the_run_continues_without_it(tmp_path, cache_directory):
    """As processes: Orbax leaves the coroutines of failed restores behind."""
    workdir = tmp_path / "run"

    def script(name, *arguments):
        return tiny.Script(name, f"--workdir={workdir}", *arguments, cache=cache_directory).end()

    train = ("train.py", f"--config={tiny.ROOT}/tests/ends/tiny_config.py:short")
    assert script(*train)[0] == 0
    before = tiny.left_behind(workdir)
    largest = max((workdir / "checkpoints" / "4" / "parameters").rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:7])
    for command in (train, ("sample.py", "--checkpoint=latest")):
        status, said = script(*command)
        assert status == 1 and f"ValueError: the checkpoint {workdir}/checkpoints/4 cannot be read" in said, said
        assert "Move that directory away to continue from an earlier one (there are [2])" in said
    shutil.move(workdir / "checkpoints" / "4", tmp_path / "damaged")
    status, said = script(*train)
    assert status == 0 and f"resuming {workdir} after step 2" in said, said
    assert tiny.left_behind(workdir) == before


def test_another_tokenizer_is_refused(finished, tmp_path, monkeypatch):
    """On resume (tests/train/test_session.py), and for evaluation and sampling."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    monkeypatch.setattr(symbols.Symbols, "fingerprint", property(lambda self: "another"))
    with pytest.raises(ValueError, match="was trained with the tokenizer .* now another"):
        trained.load(workdir, "latest")
    shutil.rmtree(workdir / "checkpoints" / "3")
    with pytest.raises(ValueError, match="tokenizer: saved .* now 'another'"):
        tiny.train(workdir, CONFIG)


def test_a_metrics_file_that_something_else_wrote_is_refused(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "metrics.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match="metrics.jsonl, line 1 is not JSON"):
        tiny.train(workdir, CONFIG)
