"""Experts that were chosen when answers were drawn, and what replaying them in the update means."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_jax.learner import assemble, evaluate, step, update
from rl_jax.models.mixture import Experts
from rl_jax.models.network import Network
from rl_jax.models.routes import Routes
from rl_jax.models.shape import Shape
from rl_jax.recipe import replace
from rl_jax.recipes.baselines import grpo, ppo
from rl_jax.recipes.rollout import t_ppo
from rl_jax.recipes.weighting import minirl_routing_replay as minirl
from rl_jax.tasks import judge
from rl_jax.tasks.toys import addmod
from tests.learner import tiny
from tests.models import oracle

TASK = addmod.addmod(4, validation_size=0, held_out_size=0)
SHAPE = Shape(vocabulary=TASK.tokenizer.size, width=16, layers=3, heads=2, key_heads=1, head_size=8, inner=16,
              mixture=Experts(experts=6, chosen=2, inner=8, normalised=True), dense_layers=(1,))
NETWORK = Network(SHAPE)
WEIGHTS = jax.tree.map(lambda a: a / 2, oracle.perturbed(NETWORK.initialise(jax.random.key(5))))
OTHER = jax.tree.map(lambda a, b: a + 0.2 * b, WEIGHTS, oracle.perturbed(WEIGHTS, seed=9))
P, G, T = 4, 4, TASK.completion_length


def by_lot(recipe):
    return replace(recipe, reward=lambda x: (x.seed % 7).astype(jnp.float32))


def drawn(recipe, network=NETWORK, weights=WEIGHTS):
    """(experience as the learner gets it, the samples) of one batch."""
    pieces = step.make_pieces(recipe, TASK, network, optax.sgd(0.0), judge.pure(TASK.verifier))
    state = step.initial_state(recipe, network, optax.sgd(0.0), jax.random.key(1), weights)
    prompts = tiny.prompts(TASK, P)
    asked = jax.jit(pieces.ask)(state, prompts, pieces.uniforms(state.key, state.step, P), state.step)
    return assemble.experience(*asked[:3]), asked[1]


def logp_of(weights, x, network=NETWORK):
    return jax.jit(evaluate.make_evaluate(network, 1.0))({"policy": weights}, x).logp


def shown(x, values):
    return np.where(x.mask, values, 0.0)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_rollout_records_what_the_training_pass_would_choose(scan_layers):
    """On the same weights: for every token of prompts and answers, in both mixing layers."""
    network = Network(dataclasses.replace(SHAPE, scan_layers=scan_layers, layers=4, dense_layers=(1, 3)))
    weights = jax.tree.map(lambda a: a / 2, oracle.perturbed(network.initialise(jax.random.key(5))))
    x, samples = drawn(minirl.minirl_routing_replay(G), network, weights)
    assert samples.routes.shape == (P * G, T, 2, 2) and samples.routes.dtype == jnp.uint8
    assert samples.prompt_routes.shape == (P, x.prompts.tokens.shape[1], 2, 2)
    found = jax.jit(network.routes)(weights, x.prompts.tokens, x.prompts.lengths, x.tokens)
    np.testing.assert_array_equal(np.where(x.mask[:, :, None, None], found.completion, 0),
                                  np.where(x.mask[:, :, None, None], samples.routes, 0))
    seen = np.arange(x.prompts.tokens.shape[1])[None] < np.asarray(x.prompts.lengths)[:, None]
    np.testing.assert_array_equal(found.prompt[seen], samples.prompt_routes[seen])
    assert len(np.unique(found.completion)) > 2, "routers choose"


def test_replaying_a_networks_own_choices_changes_nothing():
    x, samples = drawn(minirl.minirl_routing_replay(G))
    free = logp_of(WEIGHTS, evaluate.unrouted(x))
    np.testing.assert_array_equal(shown(x, logp_of(WEIGHTS, x)), shown(x, free))
    np.testing.assert_allclose(shown(x, free), shown(x, samples.rollout_logp), atol=1e-5)


def test_other_weights_go_through_the_recorded_experts():
    """Their own routers choose otherwise; with replay the sets are the recorded ones, the weights of the sets their own."""
    x, samples = drawn(minirl.minirl_routing_replay(G))
    own = jax.jit(NETWORK.routes)(OTHER, x.prompts.tokens, x.prompts.lengths, x.tokens)
    told = Routes(x.prompts.routes, x.routes)

    def through(routes):
        module = NETWORK.module(OTHER)
        return module.hidden(x.prompts.tokens, x.prompts.lengths, x.tokens, routes)[1]

    replayed = jax.jit(lambda: through(told))()
    np.testing.assert_array_equal(replayed.completion, told.completion)
    np.testing.assert_array_equal(replayed.prompt, told.prompt)
    changed = (np.sort(own.completion, axis=-1) != np.sort(told.completion, axis=-1)).any(axis=-1)[x.mask]
    assert 0.02 < changed.mean() < 0.9
    apart = np.abs(shown(x, logp_of(OTHER, x)) - shown(x, logp_of(OTHER, evaluate.unrouted(x))))
    assert apart.max() > 1e-3


@pytest.mark.parametrize(("routing", "equal"), [("rollout", True), ("old", True), ("free", False)])
def test_before_the_first_update_the_ratio_is_one_and_stays_routed(routing, equal):
    """The ratio of a moved policy to the one before it, both through the same experts or each through its own."""
    recipe = minirl.minirl_routing_replay(G, routing=routing)
    x, _ = drawn(recipe)
    whole = {"policy": WEIGHTS}
    policy_of = evaluate.make_evaluate(NETWORK, 1.0)
    x = jax.jit(lambda x: evaluate.with_models(recipe, NETWORK, policy_of, whole, {}, x))(x)
    np.testing.assert_allclose(shown(x, logp_of(WEIGHTS, x)), shown(x, x.old_logp), atol=1e-6)
    assert (x.routes is not None) == equal
    if equal:
        chosen = jax.jit(NETWORK.routes)(WEIGHTS, x.prompts.tokens, x.prompts.lengths, x.tokens)
        np.testing.assert_array_equal(np.asarray(x.routes)[x.mask], np.asarray(chosen.completion)[x.mask])


def test_a_drawing_engine_that_routes_otherwise_is_followed_by_r3_and_not_by_r2():
    """Answers drawn by other weights: R3 goes through their experts, R2 through those of the policy that is trained."""
    x, _ = drawn(minirl.minirl_routing_replay(G), weights=OTHER)
    policy_of = evaluate.make_evaluate(NETWORK, 1.0)
    own = jax.jit(NETWORK.routes)(WEIGHTS, x.prompts.tokens, x.prompts.lengths, x.tokens).completion
    found = {}
    for routing in ("rollout", "old"):
        recipe = minirl.minirl_routing_replay(G, routing=routing)
        found[routing] = jax.jit(lambda x, r=recipe: evaluate.with_models(r, NETWORK, policy_of, {"policy": WEIGHTS}, {}, x))(x)
    np.testing.assert_array_equal(found["rollout"].routes, x.routes)
    np.testing.assert_array_equal(np.asarray(found["old"].routes)[x.mask], np.asarray(own)[x.mask])
    assert (np.asarray(own)[x.mask] != np.asarray(x.routes)[x.mask]).any()
    assert np.abs(shown(x, found["rollout"].old_logp) - shown(x, found["old"].old_logp)).max() > 1e-3


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_with_replay_learns_and_reports_the_load(microbatches):
    recipe = by_lot(minirl.minirl_routing_replay(G, routing="rollout", minibatches=2))
    optimiser = optax.adam(1e-2)
    pieces = step.make_pieces(recipe, TASK, NETWORK, optimiser, judge.pure(TASK.verifier), microbatches=microbatches)
    state = step.initial_state(recipe, NETWORK, optimiser, jax.random.key(1), WEIGHTS)
    before = jax.device_get(state.parameters["policy"])
    run = jax.jit(step.composed(pieces))
    for i in range(2):
        state, metrics, x = run(state, tiny.prompts(TASK, P, P * i))
    assert x.routes is None and x.prompts.routes is None, "what a person looks at has no routes"
    load = {name: float(value) for name, value in metrics.items() if name.startswith("routing/")}
    assert load and all(np.isfinite(value) for value in load.values())
    moved = state.parameters["policy"]["blocks"][0]["mixture"]
    assert all((np.asarray(leaf) != before["blocks"][0]["mixture"][name]).any() for name, leaf in moved.items())


def test_microbatches_add_up_with_replay():
    x, _ = drawn(minirl.minirl_routing_replay(G))
    recipe = by_lot(minirl.minirl_routing_replay(G, routing="rollout"))
    policy_of = evaluate.make_evaluate(NETWORK, 1.0)
    found = []
    for pieces in (1, 2):
        def gradient(parameters, x, pieces=pieces):
            full = evaluate.with_models(recipe, NETWORK, policy_of, {"policy": WEIGHTS}, {}, x, pieces)
            return update.make_gradient(recipe, policy_of, pieces)(parameters, assemble.with_advantage(recipe, full))[0]

        found.append(jax.jit(gradient)({"policy": OTHER}, x))
    tiny.same(*found, rtol=1e-3, atol=2e-6)


def test_the_reference_routes_by_itself():
    recipe = replace(grpo.grpo(G, beta=0.1), routing="rollout")
    x, _ = drawn(recipe)
    policy_of = evaluate.make_evaluate(NETWORK, 1.0)
    frozen = {"reference": OTHER}
    full = jax.jit(lambda x: evaluate.with_models(recipe, NETWORK, policy_of, {"policy": WEIGHTS}, frozen, x))(x)
    free, routed = logp_of(OTHER, evaluate.unrouted(x)), logp_of(OTHER, x)
    np.testing.assert_allclose(shown(x, full.reference_logp), shown(x, free), atol=1e-6)
    assert np.abs(shown(x, routed) - shown(x, free)).max() > 1e-3


def test_answers_in_windows_have_no_routes_to_replay():
    recipe = replace(t_ppo.t_ppo(window=2), routing="rollout")
    pieces = step.make_pieces(recipe, TASK, NETWORK, optax.sgd(0.0), judge.pure(TASK.verifier))
    prompts = tiny.prompts(TASK, P)
    state = step.initial_state(recipe, NETWORK, optax.sgd(0.0), jax.random.key(1), WEIGHTS, carried=pieces.carried(prompts))
    with pytest.raises(ValueError, match='replays the experts of the rollout.*"old" or "free"'):
        jax.eval_shape(step.composed(pieces), state, prompts)


def test_a_dense_network_has_nothing_to_replay():
    network = tiny.network(TASK)
    x, samples = drawn(minirl.minirl_routing_replay(G, routing="rollout"), network, None)
    assert samples.routes is None and samples.prompt_routes is None and x.routes is None


def test_an_unknown_routing_is_refused():
    with pytest.raises(ValueError, match="routing='R3': allowed are .*rollout"):
        minirl.minirl_routing_replay(G, routing="R3")


def test_replicas_and_a_critic_run_on_mixtures():
    recipe, optimiser = by_lot(ppo.ppo()), optax.adam(1e-2)
    pieces = step.make_pieces(recipe, TASK, NETWORK, optimiser, judge.pure(TASK.verifier), axis=step.SEED_AXIS)
    state = jax.vmap(lambda key: step.initial_state(recipe, NETWORK, optimiser, key, WEIGHTS))(
        jax.random.split(jax.random.key(0), 2))
    _, metrics, _ = jax.jit(step.composed(pieces, seeds=2))(state, tiny.prompts(TASK, P))
    assert np.isfinite(metrics["loss/total"]).all() and metrics["loss/total"].shape == (2,)
