"""Criterion 4: before the update the trainer gives a drawn token the probability that it was drawn with."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax import recipe as recipes
from rl_jax.learner import assemble, evaluate, step
from rl_jax.recipe import Recipe, Rollout
from rl_jax.recipes.baselines import rloo
from rl_jax.rollout import decode
from rl_jax.tasks.toys import addmod
from rl_jax.types import Verdict
from tests.learner import tiny
from tests.models import oracle

TASK = addmod.addmod(100, validation_size=0, held_out_size=0)  # two digits: prompts of 4 to 6 tokens
NETWORK = tiny.network(TASK)
PARAMETERS = oracle.perturbed(NETWORK.initialise(jax.random.key(0)))
PROMPTS, G, T, NATS = 8, 4, 6, 1e-4
SETTINGS = [{}, {"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1},
            {"temperature": 0.7, "top_p": 0.9, "top_k": 5}]


def rolled_out(rollout):
    """(samples as experience, what the trainer says of them)."""
    draw = decode.make_rollout(NETWORK, rollout, completion_length=T, stop_ids=TASK.tokenizer.stop_ids,
                               pad_id=TASK.tokenizer.pad_id)
    policy_of = evaluate.make_evaluate(NETWORK, rollout.temperature)

    @jax.jit
    def both(parameters, prompts, numbers):
        samples = draw(parameters, prompts, numbers, jnp.int32(0))
        rows = samples.finished.shape
        verdict = Verdict(score=jnp.zeros(rows), parts={}, failed=jnp.zeros(rows, bool))
        x = assemble.experience(prompts, samples, verdict)
        return x, policy_of({"policy": parameters}, x)

    return both(PARAMETERS, tiny.prompts(TASK, PROMPTS), decode.make_uniforms(jax.random.key(4), PROMPTS, G, T))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_log_probability_and_entropy_agree(setting):
    rollout = Rollout(G, **setting)
    x, policy = rolled_out(rollout)
    mask = np.asarray(x.mask)
    assert len(set(mask.sum(axis=1))) > 2 and (x.support is not None) == rollout.truncated
    assert np.abs(x.rollout_logp - policy.logp)[mask].max() < NATS
    assert np.abs(x.rollout_entropy - policy.entropy)[mask].max() < NATS
    assert np.abs(np.asarray(x.rollout_logp)[mask]).mean() > 0.1


def test_without_the_support_a_truncated_draw_looks_less_probable_than_it_was():
    """What the lesson is about: the plain log-probability differs by the mass that was cut."""
    x, _ = rolled_out(Rollout(G, top_k=3))
    policy_of = jax.jit(evaluate.make_evaluate(NETWORK, 1.0))
    plain = policy_of({"policy": PARAMETERS}, dataclasses.replace(x, support=None))
    assert (np.asarray(x.rollout_logp) - np.asarray(plain.logp))[np.asarray(x.mask)].max() > 0.05


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.7, "top_p": 0.9}], ids=str)
def test_every_step_reports_the_gap(setting):
    recipe = recipes.replace(rloo.rloo(group_size=G), rollout=Rollout(G, **setting))
    optimiser = tiny.recorder()
    run = jax.jit(step.composed(tiny.pieces(recipe, TASK, optimiser)))
    _, metrics, _ = run(tiny.state(recipe, TASK, optimiser, policy=PARAMETERS), tiny.prompts(TASK, PROMPTS))
    assert 0 < metrics["rollout/logp_gap_nats"] < NATS
    assert abs(float(metrics["policy/ratio_max"]) - 1) < NATS and abs(float(metrics["policy/ratio_min"]) - 1) < NATS


def test_a_rollout_that_leaves_nothing_to_learn_is_refused():
    recipe = Recipe(rollout=Rollout(2, temperature=0.0), loss=lambda policy, x: policy.logp, weighting=lambda x: x.mask)
    with pytest.raises(ValueError, match="temperature=0 draws the same answer every time"):
        tiny.pieces(recipe, TASK, tiny.recorder())
