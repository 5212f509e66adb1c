"""A recipe's loss slot as a gate: what it reads, how far it looks, and that every way to run it is the same."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.policy_gate import trace
from kernels_pallas.policy_gate.op import policy_gate
from rl_jax import sections
from rl_jax import recipe as recipes
from rl_jax.learner import assemble, evaluate, gate, update
from rl_jax.recipes.baselines import grpo, ppo, sft
from rl_jax.recipes.loss import gspo
from rl_jax.tasks.toys import addmod
from rl_jax.types import Samples, Verdict
from tests.learner import tiny
from tests.models import oracle
from tests.recipes import toy

# Beyond one token: sequence-level ratios, answers or groups that are compared. All others look at one token at a time.
OF_ROWS = {"loss.dhpo", "loss.dhpo_entropy", "loss.fiberpo", "loss.gmpo", "loss.gspo", "loss.gspo_token", "loss.llds",
           "schedule.seeupo", "weighting.luspo"}
OF_BATCHES = {"loss.apc_obj", "loss.etr", "loss.fiberpo_domain", "loss.trpa"}


def found_in(recipe):
    """What is known of a recipe's slot, and a batch for it."""
    x = assemble.with_advantage(recipe, toy.experience(recipe))
    policy = assemble.policy_rows(toy.policy(x), x)
    slot = gate.of_recipe(recipe, policy, x)
    return slot, trace.function(slot.gate, "loss", gate.said(policy), {**slot.given, "mask": x.mask}), x, policy


@pytest.mark.parametrize("name", sections.names("rl_jax.recipes"))
def test_how_far_a_loss_looks_is_read_from_it(name):
    slot, traced, _, _ = found_in(sections.find("recipe", "rl_jax.recipes", name)())
    assert slot.closed
    assert traced.level == ("row" if name in OF_ROWS | OF_BATCHES else "token")
    assert (traced.obstacle is None) == (name not in OF_BATCHES)  # else no kernel can have it


@pytest.mark.parametrize("name", ["loss.gspo", "baselines.ppo", "loss.r2vpo", "loss.trpa"])
def test_the_kernel_has_the_loss_of_whole_arrays(name):
    """Or refuses to run, where it would see a part of what is compared."""
    recipe = sections.find("recipe", "rl_jax.recipes", name)()
    slot, _, x, policy = found_in(recipe)
    weight, share = recipe.weighting(x), update.token_share(x)
    run = lambda name: lambda said: policy_gate(slot.gate, said, slot.given, x.mask, weight, share, level=None,
                                                implementation=name).loss
    if name in OF_BATCHES:
        with pytest.raises(ValueError, match="different blocks"):
            run("pallas")(gate.said(policy))
        return
    (found, gradient), (expected, other) = (
        jax.jit(jax.value_and_grad(run(name)))(gate.said(policy)) for name in ("pallas", "reference"))
    tiny.same(found, expected, rtol=1e-5, atol=1e-6)
    tiny.same(gradient, other, rtol=1e-5, atol=1e-6)


TASK = addmod.addmod()
NETWORK = tiny.network(TASK)
POLICY = oracle.perturbed(NETWORK.initialise(jax.random.key(0)), 0)
P, G, T = 2, 4, 3


def batch(recipe):
    rng = np.random.default_rng(0)
    shape, group = (P * G, T), recipe.group_size
    normal = lambda: jnp.asarray(-np.abs(rng.normal(size=shape)), jnp.float32)
    mask = jnp.asarray(rng.random(shape) < 0.8)
    samples = Samples(tokens=jnp.asarray(rng.integers(0, TASK.tokenizer.size, shape), jnp.int32), mask=mask,
                      rollout_logp=normal(), rollout_entropy=normal(), finished=jnp.ones(P * G, bool),
                      version=jnp.zeros(P * G, jnp.int32))
    verdict = Verdict(score=jnp.asarray(rng.random(P * G), jnp.float32), parts={}, failed=jnp.zeros(P * G, bool))
    x = assemble.experience(tiny.prompts(TASK, P * G // group), samples, verdict)
    given = {name: normal() for model in recipe.models for name in toy.GIVEN[model]}
    return assemble.with_advantage(recipe, dataclasses.replace(x, given=given))


def owned(policy, x):
    """Closes over an array of its author's."""
    return -policy.logp * x.advantage * jnp.linspace(0.5, 1.0, T)[None]


def closing(array):
    return lambda policy, x: -policy.logp * x.advantage * array


@pytest.mark.parametrize("recipe", [
    grpo.grpo(G), ppo.ppo(epochs=1), gspo.gspo(G), sft.sft(), recipes.replace(grpo.grpo(G), loss=owned, name="positions"),
    recipes.replace(grpo.grpo(G), loss=closing(jnp.full((1, T), 0.5)), name="closing")], ids=lambda r: r.name)
def test_from_hidden_states_it_is_the_same_loss_gradient_and_metrics(recipe):
    x = batch(recipe)
    parameters = {"policy": POLICY}
    if "critic" in recipe.models:
        parameters["critic"] = {"body": oracle.perturbed(POLICY, 1), "value": jnp.linspace(-1, 1, NETWORK.shape.width)}
    weight, share = recipe.weighting(x), update.token_share(x)
    plain = update.make_objective(recipe, evaluate.make_evaluate(NETWORK, 0.8))
    fused = evaluate.make_objective(recipe, NETWORK, 0.8)
    (found, gradient), (expected, other) = (
        jax.jit(jax.value_and_grad(run, has_aux=True))(parameters, x, weight, share) for run in (fused, plain))
    tiny.same(found, expected, rtol=1e-5, atol=1e-6)
    tiny.same(gradient, other, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(expected[0])) > 0 and set(expected[1]) >= {"loss/total", "policy/entropy"}
