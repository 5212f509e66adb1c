"""scripts/compare.py as a process: runs, draws, keeps what is finished, and refuses."""
import pathlib
import signal

import pytest

from rl_jax.train import curves
from tests.ends import tiny

CONFIG = pathlib.Path(__file__).with_name("tiny_comparison.py")
WHOLE = ("baselines.reinforce", "baselines.grpo")


@pytest.fixture(scope="module")
def run(cache_directory):
    """run(*arguments) -> (exit status, what it printed)."""
    return lambda *given: tiny.Script("compare.py", *given, cache=cache_directory).end()


@pytest.fixture(scope="module")
def compared(tmp_path_factory, run):
    """A comparison begun with one recipe, to which the same command with two adds the other; what each printed."""
    workdir = tmp_path_factory.mktemp("compare") / "run"
    said = []
    for recipes in (WHOLE[:1], WHOLE):
        status, printed = run(f"--config={CONFIG}:{','.join(recipes)}", f"--workdir={workdir}")
        assert status == 0 and "Traceback" not in printed, printed
        said.append(printed)
    return workdir, said


def test_it_draws_and_tells_where(compared):
    workdir, said = compared
    assert said[-1].splitlines()[-2:] == [f"figure {workdir}/compare.png", f"report {workdir}/compare.html"]
    assert (workdir / "compare.png").is_file() and (workdir / "compare.html").is_file()
    assert {path.name for path in (workdir / "recipes").iterdir()} == {"reinforce", "grpo"}
    for name in ("reinforce", "grpo"):
        assert curves.read(workdir / "recipes" / name / "curve.jsonl").score.shape == (4, 2)
    table = said[-1][said[-1].index("recipe "):]
    assert [line.split()[0] for line in table.splitlines()[1:3]] in (["reinforce", "grpo"], ["grpo", "reinforce"])


def test_what_was_finished_is_kept(compared):
    _, said = compared
    assert "reinforce is finished" in said[1] and "grpo step 8/8" in said[1]
    assert "reinforce step 4/4" in said[0] and "reinforce step" not in said[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_stopped_between_steps_it_keeps_what_is_finished(number, cache_directory, tmp_path):
    process = tiny.Script("compare.py", f"--config={CONFIG}:{','.join(WHOLE)}", f"--workdir={tmp_path}",
                          "--config.scale.steps=600", cache=cache_directory)
    finished = tmp_path / "recipes" / WHOLE[0].rsplit(".", 1)[1] / "curve.jsonl"
    process.until(finished.exists)
    process.signal(number)
    status, said = process.end()
    assert status == 1 and "the same command goes on with the recipes that are not finished" in said, said
    assert "Traceback" not in said and "Fatal" not in said, said
    assert len(list(tmp_path.rglob("curve.jsonl"))) == 1 and not list(tmp_path.rglob("*.unfinished"))


REFUSED = {
    "unknown field": ["--config.recipes.grpo.args.clop=1", "config.recipes.grpo.args has no field 'clop'; allowed are"],
    "unknown recipe": ["--config.recipes.gspo.args.clip=1", "config.recipes has no field 'gspo'; allowed are"],
    "budget": ["--config.scale.answers_per_step=3", "scale.answers_per_step=3 must be a multiple of 2"],
    "another config": ["--config.run.seed=1", "config.run.seed: there 0, now 1"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_refuses_and_changes_nothing(case, run, compared):
    override, expected = REFUSED[case]
    before = sorted((path, path.stat().st_mtime_ns) for path in compared[0].rglob("*"))
    status, said = run(f"--config={CONFIG}:{','.join(WHOLE)}", f"--workdir={compared[0]}", override)
    assert status == 1 and "Traceback" not in said and expected in said, said
    assert sorted((path, path.stat().st_mtime_ns) for path in compared[0].rglob("*")) == before
