"""Every recipe of a comparison gets the same budget; what cannot be compared is refused before anything compiles."""
import dataclasses

import ml_collections
import pytest

from rl_jax import comparison, experiment, sections
from rl_jax.recipes.baselines.grpo import grpo
from rl_jax.recipes.baselines.ppo import ppo
from rl_jax.recipes.baselines.rloo import rloo
from rl_jax.recipes.baselines.sft import sft
from tests.ends import tiny_comparison
from tests.test_experiment import HOST


def test_every_recipe_draws_as_many_answers():
    found = tiny_comparison.comparison({"grpo": grpo(group_size=4), "rloo": rloo(group_size=2), "ppo": ppo(epochs=2)})
    asked = {name: found.phase(name).scale.prompts_per_step for name in found.recipes}
    assert asked == {"grpo": 2, "rloo": 4, "ppo": 8}
    for name in found.recipes:
        phase = found.phase(name)
        assert phase.scale.prompts_per_step * phase.recipe.group_size == found.scale.answers_per_step
        assert (phase.scale.steps, phase.scale.seeds, phase.optimiser) == (4, 2, found.optimiser)
    assert found.phase("ppo").updates == 8 and found.reference == "grpo"


def test_replicas_run_side_by_side_where_the_verifier_is_pure():
    assert tiny_comparison.comparison().side_by_side
    host = tiny_comparison.comparison(**HOST)
    assert not host.side_by_side and host.scale.seeds == 2 and host.phase("grpo").scale.seeds == 1
    split = tiny_comparison.comparison(**HOST, program="split", steps_per_call=1)
    assert split.phase("grpo").scale.program == "split"


def test_sections_are_filled_from_signatures_and_numbered():
    section = comparison.recipes_section("baselines.grpo, baselines.ppo,baselines.grpo", group_size=16, minibatches=2)
    assert sorted(section) == ["grpo", "grpo_2", "ppo"]
    assert section.grpo.args.group_size == section.grpo_2.args.group_size == 16
    assert section.ppo.args.minibatches == 2 and "group_size" not in section.ppo.args
    assert section.grpo_2.name == section.grpo_2.args_of == "baselines.grpo"
    assert comparison.first_of("baselines.rloo, baselines.ppo") == "rloo"


def test_the_baseline_comes_first_and_arguments_can_be_changed():
    config = tiny_comparison.get_config("baselines.reinforce,baselines.grpo")
    config.recipes.grpo.args.clip = 0.3
    parsed = comparison.parse(config)
    assert list(parsed.recipes) == ["reinforce", "grpo"] and parsed.reference == "reinforce"
    assert parsed.recipes["grpo"].hyperparameters["clip"] == 0.3
    assert sections.misnamed(config, ["--config.recipes.grpo.args.clipp=1"]).startswith(
        "config.recipes.grpo.args has no field 'clipp'; allowed are")


def test_a_start_is_one_run_for_all():
    warm = tiny_comparison.get_config(before=(warm_start(),))
    start = comparison.parse(warm).start
    assert [phase.recipe.name for phase in start.phases] == ["sft"] and start.phases[0].scale.steps == 3
    assert tiny_comparison.comparison().start is None


def warm_start(**scale):
    return ml_collections.ConfigDict({
        "recipe": experiment.recipe_section("baselines.sft"),
        "optimiser": experiment.section(experiment.Optimiser, learning_rate=1e-2),
        "scale": experiment.section(experiment.Scale, **{"steps": 3, "prompts_per_step": 4} | scale)})


def with_recipes(recipes, **given):
    return lambda: tiny_comparison.comparison(recipes, **given)


def changed(change, **given):
    def refused():
        config = tiny_comparison.get_config(**given)
        with config.unlocked():
            change(config)
        comparison.parse(config)

    return refused


REFUSED = {
    "no rollout": (with_recipes({"sft": sft()}), ["'sft'", "draws none"]),
    "teacher": (with_recipes({"grpo": dataclasses.replace(grpo(), models=("reference", "teacher"))}), ["teacher"]),
    "budget": (with_recipes({"grpo": grpo(group_size=3)}), ["answers_per_step=8", "multiple of 3"]),
    "minibatches": (with_recipes({"grpo": grpo(group_size=4, minibatches=4)}), ["multiple of 16", "4 minibatches"]),
    "seeds": (lambda: tiny_comparison.comparison(seeds=0), ["scale.seeds=0"]),
    "steps": (lambda: tiny_comparison.comparison(steps=3), ["steps=3", "steps_per_call=2"]),
    "none": (with_recipes({}), ["at least one recipe"]),
    "baseline": (changed(lambda config: config.update(baseline="rloo")), ["baseline='rloo'", "grpo"]),
    "section": (changed(lambda config: config.update(recipe=1)), ["no field 'recipe'", "recipes"]),
    "argument": (changed(lambda config: config.recipes.grpo.args.update(clop=1)), ["config.recipes.grpo.args", "clop"]),
    "unknown": (lambda: tiny_comparison.get_config("baselines.grpoo"), ["'baselines.grpoo'", "Did you mean"]),
    "seeds of the start": (changed(lambda config: None, before=(warm_start(seeds=2),)), ["before[0].scale.seeds=2"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused(case):
    build, expected = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        build()
    assert all(words in str(caught.value) for words in expected), caught.value
