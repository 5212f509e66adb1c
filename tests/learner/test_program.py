"""Criterion 6: runs of 20 steps compile each program once, leave the device alone, and give their old state away."""
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax import recipe as recipes
from rl_jax.experiment import Phase, Scale
from rl_jax.learner.optimiser import Optimiser
from rl_jax.recipes.baselines import grpo, rloo
from rl_jax.recipes.loss import dapo_decoupled_clip
from rl_jax.tasks.toys import addmod
from rl_jax.train.loop import PhaseLoop
from tests.learner import tiny

TASK = addmod.addmod(4, validation_size=0, held_out_size=0)
HOST = tiny.on_host(TASK)
STEPS = 20
COMPILED: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def compilations():
    """Every compilation of this process is noted, whoever asks for it."""
    def note(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            COMPILED.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    jax.jit(lambda x: x + 1)(jnp.zeros(3))
    assert COMPILED


def run(recipe, task, **scale):
    """The compiled programs as text, after 20 steps of which all but the first dispatch were steady."""
    traces = []

    def counted(policy, x):
        traces.append(1)
        return recipe.loss(policy, x)

    scale = Scale(**{"steps": STEPS, "prompts_per_step": 2} | scale)
    phase = Phase(recipes.replace(recipe, loss=counted), Optimiser(learning_rate=1e-3), scale)
    loop = PhaseLoop(phase, task, tiny.network(task), workers=tiny.InProcess(lambda fields, text: float(len(text))))
    state, ticks = loop.initial_state(jax.random.key(0)), 0
    jax.block_until_ready(state)
    steady_traces = steady_compilations = None
    for tick in loop.ticks(state, loop.stream(0)):
        ticks += 1
        if ticks == 2:  # the first dispatch has compiled everything; from here on nothing may happen but work
            steady_traces, steady_compilations = len(traces), len(COMPILED)
            jax.config.update("jax_transfer_guard_host_to_device", "disallow")
        assert all(a.is_deleted() for a in jax.tree.leaves(state))
        state = tick.state
    jax.config.update("jax_transfer_guard_host_to_device", "allow")
    assert ticks == STEPS // scale.steps_per_call and np.asarray(state.step).max() == STEPS
    assert len(traces) == steady_traces > 0 and len(COMPILED) == steady_compilations
    return {name: program.as_text() for name, program in loop.compiled.items()}


@pytest.fixture(autouse=True)
def transfers_allowed_again():
    yield
    jax.config.update("jax_transfer_guard_host_to_device", "allow")


def talks_to_the_host(text):
    """Instructions of a compiled program that leave the device."""
    return re.findall(r"\b(?:infeed|outfeed|send|recv|send-done|recv-done)\(|custom_call_target=\"[^\"]*callback[^\"]*\"", text)


@pytest.mark.parametrize(("recipe", "scale"), [
    (grpo.grpo(2, epochs=2, minibatches=2), {"microbatches": 1}),
    (dapo_decoupled_clip.dapo_decoupled_clip(2, resample=1), {"microbatches": 2, "steps_per_call": 5}),
    (rloo.rloo(2), {"seeds": 2})], ids=["plain", "steps_per_call", "seeds"])
def test_one_program(recipe, scale):
    programs = run(recipe, TASK, **scale)
    assert list(programs) == ["step"]
    assert talks_to_the_host(programs["step"]) == []


def test_one_program_with_a_host_verifier_calls_it_and_nothing_else():
    programs = run(rloo.rloo(2), HOST)
    assert len(talks_to_the_host(programs["step"])) == 1  # which also shows that the search finds one


def test_two_programs_never_call_the_host():
    programs = run(rloo.rloo(2), HOST, program="split")
    assert sorted(programs) == ["draw", "learn"]
    assert not any(map(talks_to_the_host, programs.values()))


def test_the_guard_refuses_what_it_should():
    with jax.transfer_guard_host_to_device("disallow"), pytest.raises(Exception, match="Disallowed host-to-device"):
        jax.jit(lambda x: x + 1)(np.zeros(3, np.float32))
