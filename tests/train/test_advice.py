"""Which knob is named, where what a run needs is a formula."""
import io

import pytest
import rich.console

from rl_jax import experiment
from rl_jax.train import advice, planning
from tests.ends import tiny

CONFIG = tiny.config(recipe="baselines.grpo", recipe_args={"beta": 0.01}, prompts_per_step=32, mesh={"data": 2, "fsdp": 2})


def needed(one):
    """Weights over fsdp, activations over microbatches, less with recomputing; a floor of 1."""
    weights = 64 / one.mesh.fsdp / (8 if one.phases[-1].scale.train == "lora" else 1)
    kept = (128 if one.shape.remat else 256) / one.phases[-1].scale.microbatches
    return int(1 + weights + kept)


def tried(limit):
    return {one.command: one.bytes for one in advice.advise(experiment.parse(CONFIG), limit, needed)}


def test_the_gentlest_turn_that_fits_is_found():
    found = tried(170)
    assert found["--config.scale.microbatches=2"] == 1 + 32 + 128, "not more pieces than are needed"
    assert found["--config.model.remat=True"] == 1 + 32 + 128
    assert found["--config.mesh.data=1 --config.mesh.fsdp=4"] == 1 + 16 + 256
    assert not any(" --config.scale" in command for command in found), "one knob is enough"


def test_knobs_are_turned_together_where_none_is_enough():
    found = advice.advise(experiment.parse(CONFIG), 50, needed)
    assert all(one.bytes > 50 for one in found[:-1]) and found[-1].bytes <= 50
    assert found[-1].command == "--config.scale.microbatches=8 --config.model.remat=True"
    assert found[-1].bytes == needed(found[-1].experiment)
    experiment.check(found[-1].experiment)


def test_what_nothing_brings_under_the_limit_is_tried_all_the_same():
    found = advice.advise(experiment.parse(CONFIG), 1, needed)
    assert min(one.bytes for one in found) == found[-1].bytes > 1


def test_what_helps_nothing_is_not_kept():
    found = advice.advise(experiment.parse(CONFIG), 1, lambda one: 7)
    assert all(one.bytes == 7 for one in found) and all(one.command.count("--") <= 2 for one in found)


def test_commands_are_those_of_the_command_line():
    parsed = experiment.parse(CONFIG)
    for one in advice.advise(parsed, 1, needed):
        changed = CONFIG.copy_and_resolve_references()
        for part in one.command.split(" --"):
            name, _, value = part.removeprefix("--config.").removeprefix("config.").partition("=")
            changed.update_from_flattened_dict({name: value if name.startswith(("scale.train", "scale.draw")) else eval(value.strip('"'))})
        again = experiment.parse(changed)
        assert (again.mesh, again.phases[-1].scale, again.shape) == (
            one.experiment.mesh, one.experiment.phases[-1].scale, one.experiment.shape)


@pytest.mark.parametrize(("gib", "expected"), ((300, "it fits"), (170, "│ yes"), (1, "Nothing that was tried brings it under 1 GiB")))
def test_what_is_said_of_a_limit(gib, expected):
    said, parsed = io.StringIO(), experiment.parse(CONFIG)
    fits = planning.advised(parsed, needed(parsed) * 2**30, gib, rich.console.Console(file=said, width=160),
                            lambda one: needed(one) * 2**30)
    assert expected in said.getvalue() and fits == (gib > 1)
    assert ("│ yes" in said.getvalue()) == (gib == 170)
