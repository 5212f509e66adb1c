"""What weights say, and that no network runs that nobody asked for."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax import recipe as recipes
from rl_jax.learner import assemble, evaluate, step
from rl_jax.models.network import Network
from rl_jax.recipes.baselines import grpo, ppo, reinforce, rloo
from rl_jax.tasks import judge
from rl_jax.tasks.toys import addmod
from rl_jax.types import Samples, Verdict
from tests.learner import tiny
from tests.models import oracle

TASK = addmod.addmod()
P, G, T, TEMPERATURE = 2, 2, 3, 0.8
APPLIED = []


class Counted(Network):
    """Counts how often the whole network is applied, while a program is traced."""

    def hidden(self, parameters, *given):
        APPLIED.append(1)
        return super().hidden(parameters, *given)


NETWORK = Counted(tiny.network(TASK).shape)
POLICY, OTHER = (oracle.perturbed(NETWORK.initialise(jax.random.key(i)), i) for i in (0, 1))


def experience():
    rng = np.random.default_rng(0)
    shape, zero = (P * G, T), jnp.zeros((P * G, T))
    samples = Samples(tokens=jnp.asarray(rng.integers(0, TASK.tokenizer.size, shape), jnp.int32),
                      mask=jnp.ones(shape, bool), rollout_logp=zero, rollout_entropy=zero,
                      finished=jnp.ones(P * G, bool), version=jnp.zeros(P * G, jnp.int32))
    verdict = Verdict(score=jnp.zeros(P * G), parts={}, failed=jnp.zeros(P * G, bool))
    return assemble.experience(tiny.prompts(TASK, P), samples, verdict)


def logp_of(parameters, x):
    """[N, T] by the oracle."""
    rows = []
    for n in range(P * G):
        prompt = np.asarray(x.prompts.tokens)[n // G, :x.prompts.lengths[n // G]]
        tokens = np.asarray(x.tokens)[n]
        rows.append(oracle.logp(NETWORK.shape, oracle.float64(parameters), prompt, tokens,
                                temperature=TEMPERATURE)[np.arange(T), tokens])
    return np.stack(rows)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_every_role_is_evaluated_with_its_own_weights(microbatches):
    recipe = recipes.replace(ppo.ppo(), models=("reference", "old", "teacher", "critic"))
    critic = {"body": OTHER, "value": jnp.arange(16.0)}
    parameters = {"policy": POLICY, "critic": critic}
    frozen = {"reference": OTHER, "teacher": jax.tree.map(lambda a: a / 2, POLICY)}
    policy_of, x = evaluate.make_evaluate(NETWORK, TEMPERATURE), experience()
    full = jax.jit(lambda p, f, x: evaluate.with_models(recipe, NETWORK, policy_of, p, f, x, microbatches))(parameters, frozen, x)
    np.testing.assert_allclose(full.old_logp, logp_of(POLICY, x), atol=1e-5)
    np.testing.assert_allclose(full.reference_logp, logp_of(OTHER, x), atol=1e-5)
    np.testing.assert_allclose(full.teacher_logp, logp_of(frozen["teacher"], x), atol=1e-5)
    for n in range(P * G):
        prompt = np.asarray(x.prompts.tokens)[n // G, :x.prompts.lengths[n // G]]
        states = oracle.hidden(NETWORK.shape, oracle.float64(OTHER), np.concatenate([prompt, np.asarray(x.tokens)[n]]))
        np.testing.assert_allclose(full.values[n], states[len(prompt) - 1:-1] @ np.arange(16.0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("recipe", "passes"), [
    (reinforce.reinforce(G), 1), (rloo.rloo(G), 1), (grpo.grpo(G, beta=0.0), 1), (grpo.grpo(G, beta=0.1), 2),
    (rloo.rloo(G, beta=0.1), 2), (ppo.ppo(epochs=1), 4)], ids=lambda r: getattr(r, "name", r))
def test_the_networks_that_run_are_those_that_were_asked_for(recipe, passes):
    """One application to learn; one more for a reference; PPO's critic is a second network, before and while it learns."""
    optimiser = tiny.recorder()
    pieces = step.make_pieces(recipe, TASK, NETWORK, optimiser, judge.pure(TASK.verifier))
    state = jax.eval_shape(lambda key: step.initial_state(recipe, NETWORK, optimiser, key), jax.random.key(0))
    assert set(state.frozen) == set(recipe.models) & {"reference", "teacher"}
    APPLIED.clear()
    x = jax.eval_shape(step.composed(pieces), state, tiny.prompts(TASK, P))[2]
    assert len(APPLIED) == passes
    assert set(x.given) == {"advantage"} | {{"reference": "reference_logp", "critic": "values"}[m] for m in recipe.models}


def test_what_is_given_is_constant():
    policy_of, x = evaluate.make_evaluate(NETWORK, TEMPERATURE), experience()
    recipe = recipes.replace(grpo.grpo(G), models=("old",))

    def total(policy):
        return evaluate.with_models(recipe, NETWORK, policy_of, {"policy": policy}, {}, x).old_logp.sum()

    slope = jax.jit(jax.grad(total))(POLICY)
    tiny.same(slope, jax.tree.map(jnp.zeros_like, POLICY))


def test_rows_that_keep_no_token_give_numbers():
    """Positions that were never drawn have an empty support: no NaN reaches the gradient behind the mask."""
    x = experience()
    bits = jnp.zeros((P * G, T, 1), jnp.uint32).at[:, 0].set(2**TASK.tokenizer.size - 1)
    x = dataclasses.replace(x, support=bits, mask=x.mask.at[:, 1:].set(False))
    policy_of = evaluate.make_evaluate(NETWORK, TEMPERATURE)

    def total(policy):
        said = assemble.hide_policy(policy_of({"policy": policy}, x), x.mask)
        return (said.logp + said.entropy).sum()

    value, slope = jax.jit(jax.value_and_grad(total))(POLICY)
    assert np.isfinite(value) and all(np.isfinite(a).all() for a in jax.tree.leaves(slope))
