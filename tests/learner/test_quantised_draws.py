"""Answers drawn with a copy of the weights in 8 bits: the gap is reported, and truncated importance weights correct it."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_jax.learner import assemble, evaluate, step
from rl_jax.models import quantised
from rl_jax.recipe import replace
from rl_jax.recipes.weighting import truncated_importance
from rl_jax.tasks import judge
from rl_jax.tasks.toys import addmod
from tests.learner import tiny
from tests.models import oracle

TASK = addmod.addmod(4, validation_size=0, held_out_size=0)
NETWORK = tiny.network(TASK)
WEIGHTS = jax.tree.map(lambda a: a / 2, oracle.perturbed(NETWORK.initialise(jax.random.key(5))))
P, G = 4, 8


def setting(quantise, ceiling=2.0):
    recipe = replace(truncated_importance.truncated_importance(G, ceiling=ceiling),
                     reward=lambda x: (x.seed % 7).astype(jnp.float32))
    pieces = step.make_pieces(recipe, TASK, NETWORK, optax.adam(1e-2), judge.pure(TASK.verifier), quantise=quantise)
    state = step.initial_state(recipe, NETWORK, optax.adam(1e-2), jax.random.key(1), WEIGHTS)
    return recipe, pieces, state


def drawn(quantise):
    _, pieces, state = setting(quantise)
    asked = jax.jit(pieces.ask)(state, tiny.prompts(TASK, P), pieces.uniforms(state.key, state.step, P), state.step)
    return assemble.experience(*asked[:3])


@pytest.mark.parametrize(("kind", "least", "most"), [("int8", 1e-3, 0.2), ("fp8", 5e-3, 1.0)])
def test_the_copys_log_probabilities_are_recorded_and_the_gap_is_reported(kind, least, most):
    x = drawn(kind)
    logp_of = jax.jit(evaluate.make_evaluate(NETWORK, 1.0))
    by_copy = logp_of({"policy": quantised.copy(WEIGHTS, kind)}, x).logp
    by_weights = logp_of({"policy": WEIGHTS}, x).logp
    np.testing.assert_allclose(np.where(x.mask, x.rollout_logp, 0), np.where(x.mask, by_copy, 0), atol=1e-5)
    gap = np.abs(np.where(x.mask, x.rollout_logp - by_weights, 0)).max()
    assert least < gap < most
    _, pieces, state = setting(kind)
    _, metrics, _ = jax.jit(step.composed(pieces))(state, tiny.prompts(TASK, P))
    np.testing.assert_allclose(metrics["rollout/logp_gap_nats"], gap, rtol=1e-3)
    _, pieces, state = setting("")
    _, metrics, _ = jax.jit(step.composed(pieces))(state, tiny.prompts(TASK, P))
    assert float(metrics["rollout/logp_gap_nats"]) < 1e-5


def test_tokens_are_weighted_by_how_much_likelier_the_weights_found_them():
    """min(exp(old - rollout), ceiling), from the numbers themselves; a ceiling inside their spread cuts some off."""
    x = drawn("fp8")
    policy_of = evaluate.make_evaluate(NETWORK, 1.0)
    for ceiling in (2.0, 1.001):
        recipe, _, _ = setting("fp8", ceiling)
        full = jax.jit(lambda x, r=recipe: evaluate.with_models(r, NETWORK, policy_of, {"policy": WEIGHTS}, {}, x))(x)
        mask = np.asarray(x.mask)
        ratio = np.exp(np.where(mask, np.asarray(full.old_logp) - np.asarray(x.rollout_logp), 0.0))
        assert (ratio[mask] > 1.001).any() and (ratio[mask] < 0.999).any()
        mean = mask / np.maximum(mask.sum(axis=1, keepdims=True), 1) / mask.any(axis=1).sum()
        np.testing.assert_allclose(recipe.weighting(full), mean * np.minimum(ratio, ceiling), rtol=1e-5, atol=1e-8)


def test_the_weights_that_learn_are_the_whole_ones():
    _, pieces, state = setting("int8")
    state, metrics, _ = jax.jit(step.composed(pieces))(state, tiny.prompts(TASK, P))
    assert {a.dtype for a in jax.tree.leaves(state.parameters)} == {np.dtype("float32")}
    assert float(metrics["gradient/norm"]) > 1e-3


def test_replicas_draw_with_copies_of_their_own():
    recipe, _, _ = setting("int8")
    pieces = step.make_pieces(recipe, TASK, NETWORK, optax.adam(1e-2), judge.pure(TASK.verifier), quantise="int8",
                              axis=step.SEED_AXIS)
    state = jax.vmap(lambda key: step.initial_state(recipe, NETWORK, optax.adam(1e-2), key))(
        jax.random.split(jax.random.key(0), 2))
    _, metrics, _ = jax.jit(step.composed(pieces, seeds=2))(state, tiny.prompts(TASK, P))
    assert np.isfinite(metrics["loss/total"]).all() and (metrics["rollout/logp_gap_nats"] > 0).all()
