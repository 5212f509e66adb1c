"""Recipes get the same start, prompts and keys; what is finished is kept; replicas in turn are those side by side."""
import dataclasses
import io
import json

import jax
import numpy as np
import pytest
import rich.console

from rl_jax import experiment, sections
from rl_jax.recipe import replace
from rl_jax.recipes.baselines.grpo import grpo
from rl_jax.recipes.baselines.reinforce import reinforce
from rl_jax.recipes.loss.dapo_decoupled_clip import dapo_decoupled_clip
from rl_jax.train import compare
from tests.ends import tiny, tiny_comparison
from tests.ends.conftest import cache_directory, compiled_once  # noqa: F401  (fixtures: one compilation cache)
from tests.test_comparison import warm_start
from tests.test_experiment import HOST

LEARNS = reinforce(group_size=2, baseline=0.5)  # from its first step on, whatever the answers are worth
RECIPES = {"reinforce": LEARNS, "again": replace(LEARNS, name="again"), "grpo": grpo(group_size=2, beta=0.0)}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    workdir, said = tmp_path_factory.mktemp("compared"), io.StringIO()
    console = rich.console.Console(file=said, width=200)
    found = compare.run(tiny_comparison.comparison(RECIPES), workdir, console=console)
    return workdir, found, said.getvalue()


def test_every_recipe_has_a_number_per_step_and_replica(compared):
    _, found, said = compared
    assert list(found) == list(RECIPES)
    for curve in found.values():
        assert {values.shape for values in curve.values.values()} == {(4, 2)} and curve.step_s.shape == (4,)
        assert (curve.answers == 8).all() and curve.updates == 1 and (curve.step_s > 0).all()
    assert "reinforce step 2/12" in said and "grpo step 12/12" in said


def test_the_first_step_is_the_same_for_all_and_replicas_differ(compared):
    """Same weights, prompts and keys: what is drawn before the first update does not depend on the recipe."""
    _, found, _ = compared
    for name in ("reward/score", "rollout/entropy", "rollout/length"):
        first = {recipe: curve.values[name][0].tolist() for recipe, curve in found.items()}
        assert first["grpo"] == first["again"] == first["reinforce"]
    entropy = found["grpo"].values["rollout/entropy"]
    assert entropy[0, 0] != entropy[0, 1]


def test_the_same_recipe_twice_gives_the_same_curve(compared):
    _, found, _ = compared
    for name, values in found["reinforce"].values.items():
        np.testing.assert_array_equal(values, found["again"].values[name])
    assert (found["grpo"].values["rollout/entropy"] != found["reinforce"].values["rollout/entropy"]).any()


def test_what_is_finished_is_not_run_again_and_recipes_can_be_added(compared, monkeypatch):
    workdir, found, _ = compared
    learned = []
    learn = compare.learn
    monkeypatch.setattr(compare, "learn", lambda comparison, name, *a, **k: learned.append(name) or learn(
        comparison, name, *a, **k))
    said = io.StringIO()
    more = {**RECIPES, "more": LEARNS}
    again = compare.run(tiny_comparison.comparison(more), workdir, console=rich.console.Console(file=said, width=200))
    assert learned == ["more"] and "again is finished" in said.getvalue()
    assert "more step 16/16" in said.getvalue()
    for name, values in found["reinforce"].values.items():
        np.testing.assert_array_equal(again["reinforce"].values[name], values)
        np.testing.assert_array_equal(again["more"].values[name], values)


def test_replicas_in_turn_are_those_side_by_side(compared, monkeypatch, tmp_path):
    """A host verifier's replicas are trained one after the other; here those of a pure one, to compare."""
    _, found, _ = compared
    comparison = tiny_comparison.comparison(RECIPES)
    monkeypatch.setattr(type(comparison), "side_by_side", False)
    assert comparison.phase("reinforce").scale.seeds == 1
    told = []
    weights = compare.first_weights(comparison, tmp_path)
    curve = compare.learn(comparison, "reinforce", weights, tell=lambda step, numbers: told.append(step))
    assert told == [2, 4, 6, 8]
    for name in ("reward/score", "rollout/entropy", "gradient/norm"):
        np.testing.assert_allclose(curve.values[name], found["reinforce"].values[name], rtol=1e-4, atol=1e-6)


def test_all_start_from_the_weights_that_were_made_once(tmp_path):
    comparison = dataclasses.replace(tiny_comparison.comparison(RECIPES), before=(experiment.phase(
        sections.plain(warm_start()), "config.before[0]"),))
    console = rich.console.Console(file=io.StringIO())
    weights = compare.first_weights(comparison, tmp_path, console)
    trained, _ = tiny.train(tmp_path / "alone", tiny.config(recipe="baselines.sft", steps=3))
    assert tiny.bits(jax.tree.map(lambda a: a[1], weights)) == tiny.bits(trained.policy)
    again = compare.first_weights(comparison, tmp_path, console)
    assert tiny.bits(again) == tiny.bits(weights)


def test_answers_that_were_asked_to_replace_others_are_counted(tmp_path):
    recipe = dapo_decoupled_clip(group_size=2, resample=2, limit=2, buffer=1)
    comparison = tiny_comparison.comparison({"dapo": recipe}, steps=2)
    curve = compare.learn(comparison, "dapo", compare.first_weights(comparison, tmp_path))
    np.testing.assert_array_equal(curve.answers, 8 * curve.values["rollout/waves"])
    assert (curve.answers > 8).any()  # a policy that knows nothing rarely has a group that disagrees


def test_another_config_is_refused_with_the_difference(tmp_path):
    plain = sections.plain(tiny_comparison.get_config())
    compare.claim(tmp_path, plain)
    compare.claim(tmp_path, {**plain, "baseline": "grpo"})
    compare.claim(tmp_path, sections.plain(tiny_comparison.get_config("baselines.reinforce,baselines.rloo")))
    with pytest.raises(ValueError, match=r"config\.scale\.seeds: there 2, now 3"):
        compare.claim(tmp_path, {**plain, "scale": {**plain["scale"], "seeds": 3}})
    other = json.loads(json.dumps(plain))
    other["recipes"]["grpo"]["args"]["clip"] = 0.3
    with pytest.raises(ValueError, match=r"config\.recipes\.grpo\.args\.clip: there 0\.2, now 0\.3"):
        compare.claim(tmp_path, other)



def test_a_host_verifier_scores_its_replicas_in_turn(tmp_path):
    comparison = tiny_comparison.comparison({"reinforce": LEARNS}, **HOST, program="split", steps=2, steps_per_call=1)
    said = io.StringIO()
    curve = compare.run(comparison, tmp_path, console=rich.console.Console(file=said, width=200))["reinforce"]
    assert curve.score.shape == (2, 2) and (curve.values["reward/failed"] == 0).all()
    entropy = curve.values["rollout/entropy"]
    assert entropy[0, 0] != entropy[0, 1], "replicas have weights and keys of their own"
    assert "reinforce step 4/4" in said.getvalue()
