"""Whole runs at toy size: phases, resuming, refusals, validation, dispatches of several steps and replicas."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax import experiment, sections
from rl_jax.recipe import replace
from rl_jax.tasks.toys import symbols
from rl_jax.train import checkpoint, metrics, session, trained
from tests.ends import tiny
from tests.ends.conftest import cache_directory, compiled_once  # noqa: F401  (fixtures)


def rows(workdir, name="loss/total"):
    return [row for row in metrics.rows(workdir / "metrics.jsonl") if name in row]


def whole_state(workdir):
    """Parameters and training state of the last checkpoint, as saved."""
    directory = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    with checkpoint.ocp.StandardCheckpointer() as saved:
        return tiny.bits([saved.restore(directory / item) for item in ("parameters", "training")])


@pytest.fixture(scope="module")
def two_phases(tmp_path_factory):
    """An uninterrupted run of a warm start and RL, with validation."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    finished, said = tiny.train(workdir, CONFIG)
    return workdir, finished, said


CONFIG = tiny.config(recipe="baselines.grpo", recipe_args={"group_size": 4}, warm_start=5, steps=7, task_args={
    "modulus": 3, "validation_size": 2, "held_out_size": 2}, run={
    "checkpoint_every": 3, "validate_every": 4, "validation_prompts": 6, "validation_samples": 2, "keep_last": 2})


def test_phases_follow_each_other(two_phases):
    workdir, finished, said = two_phases
    assert finished.step == 12 and not finished.interrupted
    assert finished.checkpoint == workdir / "checkpoints" / "12" and finished.checkpoint.is_dir()
    assert finished.report.read_text().startswith("<!")
    assert [(row["step"], row["phase"]) for row in rows(workdir)] == [
        *((k, "sft") for k in range(1, 6)), *((k, "grpo") for k in range(6, 13))]
    assert "sft: 5 steps, compiled in" in said and "grpo: 7 steps, compiled in" in said
    assert {row["run_phase"] for row in json.loads((workdir / "plan.json").read_text())} == {"sft", "grpo"}
    assert json.loads((workdir / "config.json").read_text()) == sections.plain(CONFIG)
    assert sum(row["gradient/norm"] > 1e-3 for row in rows(workdir)[5:]) >= 5, "there is something to learn"


def test_the_second_phase_starts_with_the_weights_of_the_first(two_phases, tmp_path):
    workdir, _, _ = two_phases
    with checkpoint.Checkpoints(workdir, keep_last=9, keep_best=9) as saved:
        found = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), two_phases[1].policy)
        end_of_first = saved.restore_parameters(5, {"policy": found})["policy"]
    first = rows(workdir)[5]
    assert first["step"] == 6 and abs(first["policy/kl_reference"]) < 1e-6, "the reference is the warm start"
    with checkpoint.ocp.StandardCheckpointer() as saved:
        assert tiny.bits(saved.restore(workdir / "frozen" / "1" / "reference")) == tiny.bits(end_of_first)
    assert not (workdir / "frozen" / "0").exists(), "the first phase has no reference"


def test_validation_is_written_and_the_best_is_kept(two_phases):
    workdir, _, said = two_phases
    scores = {row["step"]: row["validation/pass@1"] for row in rows(workdir, "validation/pass@1")}
    assert list(scores) == [4, 5, 8, 12], "every 4 steps of the run, and at the end of each phase"
    with checkpoint.Checkpoints(workdir, keep_last=2, keep_best=1, keep_steps=(5, 12)) as saved:
        assert scores[saved.best()] == max(scores.values())
        assert set(saved.steps()) == {5, 11 if 11 in saved.steps() else 9, 12, saved.best()}
    assert "step 4: validation pass@1" in said


def test_rollouts_are_written_for_every_drawn_step(two_phases):
    workdir, _, _ = two_phases
    table = list(metrics.rows(workdir / "rollouts.jsonl"))
    assert [row["step"] for row in table] == [k for k in range(6, 13) for _ in range(4)]
    assert all(row["prompt"].endswith("=") and row["tokens"] >= 1 for row in table)


@pytest.mark.parametrize("stop", [2, 5, 9])
def test_stopped_and_continued_is_as_if_never_stopped(two_phases, tmp_path, stop):
    """In the first phase, at its end, in the second; the metrics of step k are written while k + 1 runs."""
    with tiny.stopped_after(stop):
        finished, said = tiny.train(tmp_path / "run", CONFIG)
    assert finished.interrupted and stop <= finished.step <= stop + 1
    assert finished.checkpoint.is_dir() and finished.checkpoint.name == str(finished.step)
    assert f"stopped after step {finished.step}; the same command continues" in said
    finished, said = tiny.train(tmp_path / "run", CONFIG)
    assert "resuming" in said and finished.step == 12 and not finished.interrupted
    assert tiny.left_behind(tmp_path / "run") == tiny.left_behind(two_phases[0])
    assert whole_state(tmp_path / "run") == whole_state(two_phases[0])
    assert tiny.bits(finished.policy) == tiny.bits(two_phases[1].policy)


def test_a_finished_run_started_again_changes_nothing(two_phases):
    workdir, before, _ = two_phases
    behind, steps = tiny.left_behind(workdir), sorted(p.name for p in (workdir / "checkpoints").iterdir())
    finished, said = tiny.train(workdir, CONFIG)
    assert finished.step == 12 and not finished.interrupted and finished.report == before.report
    assert "compiled" not in said, "nothing is left to do"
    assert tiny.left_behind(workdir) == behind
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == steps
    assert tiny.bits(finished.policy) == tiny.bits(before.policy)


def test_another_config_is_refused_with_the_difference(two_phases):
    workdir, _, _ = two_phases
    behind = tiny.left_behind(workdir)
    other = sections.plain(CONFIG)
    other["before"][0]["scale"]["steps"], other["optimiser"]["weight_decay"] = 6, 0.5
    with pytest.raises(ValueError) as refusal:
        session.claim(workdir, other)
    said = str(refusal.value)
    assert "config.optimiser.weight_decay: there 0.0, now 0.5" in said
    assert "config.before[0].scale.steps: there 5, now 6" in said and "config.run" not in said
    assert "another --workdir" in said
    with pytest.raises(ValueError, match=r"config\.before: there 'absent', now \[\]|config\.before\[0\]"):
        session.claim(workdir, sections.plain(tiny.config(recipe="baselines.grpo")))
    assert tiny.left_behind(workdir) == behind


def test_the_same_config_is_accepted_in_another_order(tmp_path):
    values = sections.plain(CONFIG)
    session.claim(tmp_path / "run", values)
    session.claim(tmp_path / "run", dict(reversed(values.items())))
    assert not list((tmp_path / "run").glob("*.unfinished"))


def test_another_tokenizer_is_refused_on_resume(tmp_path):
    config = tiny.config(steps=6)
    with tiny.stopped_after(2):
        tiny.train(tmp_path, config)
    task = experiment.parse(config).task
    other = dataclasses.replace(task, tokenizer=symbols.Symbols(task.tokenizer.characters[::-1]))
    before = tiny.left_behind(tmp_path)
    with pytest.raises(ValueError, match="tokenizer: saved .* now .*start a new run"):
        tiny.train(tmp_path, config, task=other)
    assert tiny.left_behind(tmp_path) == before
    assert tiny.train(tmp_path, config)[0].step == 6


def test_several_steps_per_call_and_replicas(tmp_path):
    """R runs of K steps per dispatch, stopped and continued between dispatches."""
    config = tiny.config(warm_start=3, steps=8, steps_per_call=4, seeds=1, run={"checkpoint_every": 4})
    for section in (config.before[0], config):
        with section.unlocked():
            section.scale.seeds = 3
    finished, _ = tiny.train(tmp_path / "whole", config)
    assert finished.step == 11 and all(a.shape[0] == 3 for a in jax.tree.leaves(finished.policy))
    leaf = jax.tree.leaves(finished.policy)[0]
    assert not np.array_equal(leaf[0], leaf[1]), "replicas differ"
    first = jax.tree.map(lambda a: a[0], finished.policy)
    assert tiny.bits(trained.load(tmp_path / "whole", "latest").policy) == tiny.bits(first), "evaluated is the first"
    drawn = rows(tmp_path / "whole", "reward/mean")
    assert [row["step"] for row in drawn] == [*range(4, 12)]
    assert all(f"{name}_seed_std" in drawn[0] for name in ("reward/mean", "loss/total"))
    table = [row["step"] for row in metrics.rows(tmp_path / "whole" / "rollouts.jsonl")]
    assert table == [k for k in range(4, 12) for _ in range(2)]
    with checkpoint.Checkpoints(tmp_path / "whole", keep_last=9) as saved:
        assert saved.steps() == [3, 7, 11], "saved between dispatches although a phase began at step 3"

    with tiny.stopped_after(5):
        stopped, _ = tiny.train(tmp_path / "stopped", config)
    assert stopped.step in (7, 11)
    finished_again, _ = tiny.train(tmp_path / "stopped", config)
    assert tiny.bits(finished_again.policy) == tiny.bits(finished.policy)
    assert tiny.left_behind(tmp_path / "stopped") == tiny.left_behind(tmp_path / "whole")


def test_steps_per_call_changes_no_number(tmp_path):
    one, _ = tiny.train(tmp_path / "one", tiny.config(steps=6, run={"checkpoint_every": 3}))
    three, _ = tiny.train(tmp_path / "three", tiny.config(steps=6, steps_per_call=3, run={"checkpoint_every": 3}))
    for row, other in zip(rows(tmp_path / "one"), rows(tmp_path / "three"), strict=True):
        assert row.keys() == other.keys() and row["reward/mean"] == other["reward/mean"]
        np.testing.assert_allclose(row["gradient/norm"], other["gradient/norm"], rtol=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one.policy, three.policy)


def test_two_seeds_are_two_runs(tmp_path):
    policies = [tiny.train(tmp_path / str(seed), tiny.config(steps=2, run={"seed": seed}))[0].policy for seed in (0, 1)]
    assert tiny.bits(policies[0]) != tiny.bits(policies[1])


def test_replacing_rejected_groups_runs(tmp_path):
    finished, said = tiny.train(tmp_path, tiny.config(recipe="loss.dapo_decoupled_clip", recipe_args={"resample": 2}))
    assert finished.step == 4 and "decode" in said
    assert all(1 <= row["rollout/waves"] <= 3 and row["rollout/groups_discarded"] >= 0 for row in rows(tmp_path))


def not_finite(parsed, when):
    """The experiment with a loss that is not a number from update `when` of each replica's run on."""
    phase = parsed.phases[-1]

    def loss(policy, x):
        wrong = jnp.where(x.version[:, None] >= when, jnp.nan, 1.0)
        return phase.recipe.loss(policy, x) * wrong

    recipe = replace(phase.recipe, loss=loss)
    return dataclasses.replace(parsed, phases=(dataclasses.replace(phase, recipe=recipe),))


def test_a_run_without_a_finite_gradient_stops(tmp_path):
    """After so many steps in a row, counted per replica; the weights are those before them."""
    parsed = not_finite(experiment.parse(tiny.config(steps=20, optimiser={"stop_after_skips": 4}, steps_per_call=2, seeds=3)), when=4)
    console = session.rich.console.Console(file=open(tmp_path / "said", "w"))
    with console.file, pytest.raises(FloatingPointError, match="4 steps in a row had no finite gradient.*learning rate"):
        session.Session(parsed, tmp_path, console=console).go()
    skipped = [row["gradient/skipped"] for row in rows(tmp_path)]
    assert skipped[:8] == [0, 0, 0, 0, 1, 1, 1, 1] and len(skipped) <= 10
    with checkpoint.Checkpoints(tmp_path, keep_last=9) as saved:
        found = tmp_path / "checkpoints" / str(saved.latest()) / "parameters"
    with checkpoint.ocp.StandardCheckpointer() as saved:
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(saved.restore(found)))


def test_skips_are_counted_across_a_resume(tmp_path):
    parsed = not_finite(experiment.parse(tiny.config(steps=20, optimiser={"stop_after_skips": 6}, run={"checkpoint_every": 1})), when=2)
    console = session.rich.console.Console(file=open(tmp_path / "said", "w"))
    with console.file:
        with tiny.stopped_after(4):
            assert session.Session(parsed, tmp_path, console=console).go().interrupted
        with pytest.raises(FloatingPointError):
            session.Session(parsed, tmp_path, console=console).go()
    assert [row["step"] for row in rows(tmp_path)][-1] == 8


def test_a_step_that_cannot_fit_is_refused_with_advice(tmp_path):
    with pytest.raises(ValueError, match=r"needs .* GiB .* are allowed.*scale.microbatches \(now 1\).*remat"):
        tiny.train(tmp_path, tiny.config(memory_limit_gib=1e-6))


def test_a_killed_plan_file_does_not_stop_the_next_start(tmp_path):
    tiny.train(tmp_path, tiny.config(steps=2))
    assert not list(tmp_path.glob("*.unfinished"))
