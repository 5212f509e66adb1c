"""Every config under configs/: it says what it needs, builds, and at toy size runs, saves and resumes bit-equal.

Those under configs/compare/ list recipes: at toy size two of them are compared, and a second call runs nothing. Those under
configs/plans/ are for devices that are not here, and not run.
"""
import ast
import dataclasses
import importlib.util
import io
import pathlib

import pytest
import rich.console

from rl_jax import comparison, experiment, sections
from rl_jax.train import compare, compare_page
from tests.ends import published, tiny

FILES = sorted(path for path in (tiny.ROOT / "configs").rglob("*.py") if path.name != "__init__.py")
COMPARED = [path for path in FILES if path.parent.name == "compare"]
PLANNED = [path for path in FILES if path.parent.name == "plans"]  # for many devices; test_plans.py
TRAINED = [path for path in FILES if path not in COMPARED + PLANNED]
PARTS = ("Command:", "Hardware:", "Time:", "Result:")
SMALL = {"gsm8k": {"path": "tests/ends/gsm8k", "validation_size": 1, **published.LENGTHS}}


def name_of(path):
    return str(path.relative_to(tiny.ROOT))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """In the place of a published one."""
    return str(published.make(tmp_path_factory.mktemp("published") / "small"))


def loaded(path, *given):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*given)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_it_says_what_it_is_needs_and_gives(path):
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    first, *_ = docstring.splitlines()
    assert first and not first.startswith(PARTS), "the first line says what it is"
    lines = [line for line in docstring.splitlines() if line.startswith(PARTS)]
    assert [line.split(" ", 1)[0] for line in lines] == list(PARTS)
    assert all(len(line.split(" ", 1)) == 2 for line in lines)
    assert name_of(path) in lines[0] and ("--plan" if path in PLANNED else "--workdir=") in lines[0]


@pytest.mark.parametrize("path", TRAINED, ids=name_of)
def test_it_builds_and_is_locked(path, checkpoint, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    config = loaded(path)
    assert config.is_locked
    assert set(config) <= set(experiment.SECTIONS)
    for section in (config.model, config.optimiser, config.scale, config.run):
        assert len(section) <= 10
    if "train_size" in config.task.args:
        config.task.args.train_size = 256  # questions cost a millisecond each
    if "path" in config.model:
        shrink_what_learns(config, checkpoint)
    experiment.parse(config)


@pytest.mark.parametrize("path", COMPARED, ids=name_of)
def test_a_comparison_builds_and_is_locked(path):
    config = loaded(path)
    assert config.is_locked
    assert set(config) <= set(comparison.SECTIONS)
    for section in (config.model, config.optimiser, config.scale, config.run):
        assert len(section) <= 10
    found = comparison.parse(config)
    assert len(found.recipes) >= 3 and found.scale.seeds >= 3, "errors need replicas"


def shrunk(config, checkpoint):
    """Next to nothing of everything, the same task, recipes, schedules and programs."""
    for phase in (*config.get("before", ()), config):
        scale, args = phase.scale, phase.recipe.args
        scale.steps = 4 if phase is config else 2
        pieces = args.get("minibatches", 1)
        scale.prompts_per_step, scale.microbatches, scale.steps_per_call = 2 * pieces, 1, 1
        if "group_size" in args:
            args.group_size = 2
        phase.optimiser.warmup_steps = min(phase.optimiser.warmup_steps, 1)
    shrink_what_learns(config, checkpoint)
    run = config.run
    run.checkpoint_every, run.validation_prompts, run.validation_samples, run.workers = 3, 2, 2, 1
    run.validate_every = min(run.validate_every, 3)
    run.trackers = ()
    return config


def shrink_what_learns(config, checkpoint):
    model, args = config.model, config.task.args
    if "path" in model:
        model.path = args.tokenizer = checkpoint
    else:
        model.width, model.layers, model.heads, model.key_heads, model.head_size, model.inner = 16, 1, 2, 1, 8, 32
    for name, value in SMALL.get(config.task.name, {}).items():
        args[name] = value
    for name in ("train_size", "validation_size", "held_out_size"):
        if name in args and config.task.name not in SMALL:
            args[name] = min(args[name], 16)


@pytest.mark.parametrize("path", TRAINED, ids=name_of)
def test_at_toy_size_it_runs_saves_and_resumes_bit_equal(path, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    config = shrunk(loaded(path), checkpoint)
    whole, _ = tiny.train(tmp_path / "whole", config)
    assert whole.step >= 4 and whole.checkpoint.is_dir() and whole.report.is_file()
    with tiny.stopped_after(whole.step - 2):
        stopped, _ = tiny.train(tmp_path / "stopped", config)
    assert stopped.interrupted and 3 <= stopped.step < whole.step
    again, _ = tiny.train(tmp_path / "stopped", config)
    assert again.step == whole.step
    assert tiny.bits(again.policy) == tiny.bits(whole.policy)
    assert tiny.left_behind(tmp_path / "stopped") == tiny.left_behind(tmp_path / "whole")


@pytest.mark.parametrize("path", COMPARED, ids=name_of)
def test_at_toy_size_two_recipes_are_compared_once(path, checkpoint, tmp_path, monkeypatch):
    config = loaded(path, "baselines.grpo,baselines.rloo")
    scale = config.scale
    scale.steps, scale.answers_per_step, scale.seeds, scale.steps_per_call, scale.microbatches = 4, 16, 2, 2, 1
    config.recipes.grpo.args.group_size = 2  # of the baseline alone: the budget stays the same
    shrink_what_learns(config, checkpoint)
    for phase in config.get("before", ()):
        phase.scale.steps, phase.scale.prompts_per_step = 2, 2

    def compared():
        found = comparison.parse(config)
        compare.claim(tmp_path, sections.plain(config))
        return found, compare.run(found, tmp_path, console=rich.console.Console(file=io.StringIO()))

    found, first = compared()
    assert {name: curve.score.shape for name, curve in first.items()} == {"grpo": (4, 2), "rloo": (4, 2)}
    assert all((curve.answers == 16).all() for curve in first.values())
    assert compare_page.write(tmp_path, found, first).is_file() and (tmp_path / "compare.png").is_file()
    monkeypatch.setattr(compare, "learn", None)
    assert tiny.bits(dataclasses.asdict(compared()[1]["grpo"])) == tiny.bits(dataclasses.asdict(first["grpo"]))
