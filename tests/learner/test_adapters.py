"""A part of the weights is trained: adapters beside frozen projections, or what a pattern names."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_jax.learner import assemble, evaluate, roles, step, update
from rl_jax.models import lora, trainable
from rl_jax.models.lora import Adapters
from rl_jax.recipe import Recipe, replace
from rl_jax.recipes.baselines import grpo, ppo, rloo
from rl_jax.tasks import judge
from rl_jax.tasks.toys import addmod
from tests.learner import tiny
from tests.models import oracle

TASK = addmod.addmod(4, validation_size=0, held_out_size=0)
ADAPTERS = Adapters(rank=2, alpha=6.0, targets="query|down")
BASE = tiny.network(TASK)
NETWORK = dataclasses.replace(BASE, adapters=ADAPTERS)
WEIGHTS = jax.tree.map(lambda a: a / 2, oracle.perturbed(BASE.initialise(jax.random.key(5))))
P, G = 4, 4


def by_lot(recipe):
    return replace(recipe, reward=lambda x: (x.seed % 7).astype(jnp.float32))


def begin(recipe, train, optimiser, network=NETWORK):
    """The compiled step and its first state; rewards are drawn by lot, so that there is something to learn."""
    recipe = by_lot(recipe)
    network = network if train == "lora" else dataclasses.replace(network, adapters=None)
    pieces = step.make_pieces(recipe, TASK, network, optimiser, judge.pure(TASK.verifier))
    state = step.initial_state(recipe, network, optimiser, jax.random.key(1), WEIGHTS, train=train)
    return jax.jit(step.composed(pieces)), state


def learnt(adapters):
    """Adapters that are not 0 any more."""
    return oracle.perturbed(adapters, seed=3)


def gradient_of(network, recipe, parameters, frozen, x):
    policy_of = roles.bound(evaluate.make_evaluate(network, 1.0), frozen)
    return jax.jit(update.make_gradient(recipe, policy_of))(parameters, x)[0]["policy"]


def drawn() -> tuple[Recipe, object]:
    """A batch with credit, drawn by the base network."""
    recipe = rloo.rloo(G)
    pieces = step.make_pieces(recipe, TASK, BASE, optax.sgd(0.0), judge.pure(TASK.verifier))
    state = step.initial_state(recipe, BASE, optax.sgd(0.0), jax.random.key(1), WEIGHTS)
    prompts = tiny.prompts(TASK, P)
    asked = jax.jit(pieces.ask)(state, prompts, pieces.uniforms(state.key, state.step, P), state.step)
    x = evaluate.unrouted(assemble.experience(*asked[:3]))
    x = dataclasses.replace(x, reward=jax.random.normal(jax.random.key(2), x.score.shape))
    return recipe, assemble.with_advantage(recipe, x)


@pytest.mark.parametrize("fresh", [True, False], ids=["first step", "learnt adapters"])
def test_the_gradient_is_the_chain_rule_from_the_full_one(fresh):
    """With W' = W + s A B and G = dL / dW': dL / dA = s G B^T and dL / dB = s A^T G, in float64 from the full G."""
    recipe, x = drawn()
    parameters, frozen = roles.begin(recipe, NETWORK, lora.fresh(WEIGHTS, NETWORK.initialise(jax.random.key(7))), None, "lora")
    if not fresh:
        parameters = {"policy": learnt(parameters["policy"])}
    found = gradient_of(NETWORK, recipe, parameters, frozen, x)
    whole = lora.merged(roles.whole(parameters, frozen)["policy"], ADAPTERS)
    full = gradient_of(BASE, recipe, {"policy": whole}, {}, x)
    for name in ("query", "down"):
        own = {leaf: np.asarray(parameters["policy"]["blocks"][0][name][leaf], np.float64) for leaf in lora.LEAVES}
        slope = np.asarray(full["blocks"][0][name]["weight"], np.float64)
        expected = {"adapter_in": 3.0 * slope @ own["adapter_out"].T, "adapter_out": 3.0 * own["adapter_in"].T @ slope}
        for leaf, values in expected.items():
            size = np.abs(values).max()
            assert (size > 1e-4) == (not fresh or leaf == "adapter_out"), "B starts at 0, and so does the gradient of A"
            np.testing.assert_allclose(found["blocks"][0][name][leaf], values, atol=2e-5 * max(size, 1.0))


def test_only_adapters_have_an_optimiser_state_and_only_they_change():
    run, state = begin(rloo.rloo(G), "lora", optax.adam(1e-2))
    names = set(trainable.names(state.parameters["policy"]))
    assert names == {f"blocks/0/{one}/{leaf}" for one in ("query", "down") for leaf in lora.LEAVES}
    moments = [a for a in jax.tree.leaves(state.optimiser) if a.ndim]
    assert len(moments) == 2 * len(names)
    before, adapters = jax.device_get((state.frozen, state.parameters))
    for i in range(4):
        state, metrics, _ = run(state, tiny.prompts(TASK, P, P * i))
    tiny.same(state.frozen, before)
    assert sorted(trainable.names(state.frozen["policy"])) == sorted(trainable.names(WEIGHTS))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.parameters["policy"], adapters["policy"])
    assert min(jax.tree.leaves(moved)) > 1e-4 and np.isfinite(float(metrics["loss/total"]))


def test_the_reference_is_the_base_network_bit_for_bit():
    """No copy of it is held, and its log-probabilities are those of the weights without adapters, also of learnt ones."""
    recipe = grpo.grpo(G, beta=0.1)
    parameters, frozen = roles.begin(recipe, NETWORK, lora.fresh(WEIGHTS, NETWORK.initialise(jax.random.key(7))), None, "lora")
    assert set(frozen) == {"policy"}
    _, x = drawn()
    policy_of = evaluate.make_evaluate(NETWORK, 1.0)

    @jax.jit
    def said(parameters, frozen, x):
        whole = roles.whole(parameters, frozen)
        given = evaluate.with_models(recipe, NETWORK, policy_of, whole, frozen, x).given["reference_logp"]
        return given, policy_of(whole, x).logp, policy_of({"policy": lora.without(whole["policy"])}, x).logp

    plain = jax.jit(evaluate.make_evaluate(BASE, 1.0))({"policy": WEIGHTS}, x).logp
    reference, fresh, without = said(parameters, frozen, x)
    np.testing.assert_array_equal(reference, plain)
    np.testing.assert_array_equal(fresh, plain)
    reference, moved, without = said({"policy": learnt(parameters["policy"])}, frozen, x)
    np.testing.assert_array_equal(reference, plain)
    np.testing.assert_array_equal(without, plain)
    assert np.abs(moved - plain).max() > 1e-2


def test_the_first_step_is_at_the_reference():
    run, state = begin(grpo.grpo(G, beta=0.1), "lora", optax.adam(1e-2))
    kl = []
    for i in range(2):
        state, metrics, _ = run(state, tiny.prompts(TASK, P, P * i))
        kl.append(float(metrics["policy/kl_reference"]))
    assert kl[0] == 0.0 and kl[1] > 0.0


def test_a_critic_has_adapters_of_its_own_on_the_shared_weights():
    run, state = begin(ppo.ppo(), "lora", optax.adam(1e-2))
    body = set(trainable.names(state.parameters["critic"]["body"]))
    assert body == set(trainable.names(state.parameters["policy"])) and state.parameters["critic"]["value"].shape == (16,)
    for i in range(3):
        state, metrics, _ = run(state, tiny.prompts(TASK, P, P * i))
    policy, critic = state.parameters["policy"], state.parameters["critic"]["body"]
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(policy), jax.tree.leaves(critic), strict=True))
    assert np.isfinite(float(metrics["loss/total"]))


def test_a_pattern_trains_what_it_names_and_the_reference_copies_no_more():
    run, state = begin(grpo.grpo(G, beta=0.1), r"blocks/0/(key|value)/|^final", optax.adam(1e-2))
    names = {"blocks/0/key/weight", "blocks/0/value/weight", "final/scale"}
    assert set(trainable.names(state.parameters["policy"])) == set(trainable.names(state.frozen["reference"])) == names
    before = jax.device_get(state.frozen)
    start = jax.device_get(state.parameters["policy"])
    kl = []
    for i in range(3):
        state, metrics, _ = run(state, tiny.prompts(TASK, P, P * i))
        kl.append(float(metrics["policy/kl_reference"]))
    tiny.same(state.frozen, before)
    assert abs(kl[0]) < 1e-6 < kl[2]
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(state.parameters["policy"]), jax.tree.leaves(start), strict=True))
    whole = roles.policy(state)
    assert jax.tree.structure(whole) == jax.tree.structure(jax.tree.map(jnp.asarray, WEIGHTS))


def test_training_all_of_a_network_by_a_pattern_is_training_it():
    ends = []
    for train in ("all", "."):
        run, state = begin(grpo.grpo(G, beta=0.1), train, optax.adam(1e-2))
        for i in range(2):
            state, metrics, _ = run(state, tiny.prompts(TASK, P, P * i))
        ends.append((roles.policy(state), metrics))
    tiny.same(*ends)


def test_replicas_have_adapters_of_their_own():
    recipe, optimiser = by_lot(rloo.rloo(G)), optax.adam(1e-2)
    pieces = step.make_pieces(recipe, TASK, NETWORK, optimiser, judge.pure(TASK.verifier), axis=step.SEED_AXIS)
    start = functools.partial(step.initial_state, recipe, NETWORK, optimiser, policy=WEIGHTS, train="lora")
    state = jax.vmap(start)(jax.random.split(jax.random.key(0), 2))
    state, _, _ = jax.jit(step.composed(pieces, seeds=2))(state, tiny.prompts(TASK, P))
    first, second = (jax.tree.map(lambda a, r=r: a[r], state.parameters["policy"]) for r in (0, 1))
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
