"""What else the policy before the batch says: moments of its distributions, and the answers under other prompts."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.linear_logprob.support import pack_support
from rl_jax import recipe as recipes
from rl_jax.learner import assemble, evaluate, update
from rl_jax.recipe import Rollout
from rl_jax.recipes.baselines import grpo, rloo
from rl_jax.tasks.toys import addmod
from rl_jax.types import Samples, Verdict
from tests.learner import tiny
from tests.models import oracle
from tests.recipes import toy

TASK = addmod.addmod()
P, G, T = 2, 2, 3
NETWORK = tiny.network(TASK)
V = TASK.tokenizer.size
POLICY = oracle.perturbed(NETWORK.initialise(jax.random.key(0)))


def experience(kept=None):
    rng = np.random.default_rng(0)
    shape, zero = (P * G, T), jnp.zeros((P * G, T))
    tokens = rng.integers(0, V, shape) if kept is None else kept.argmax(axis=2)
    samples = Samples(tokens=jnp.asarray(tokens, jnp.int32), mask=jnp.asarray(np.arange(T) < [[3], [2], [3], [1]]),
                      rollout_logp=zero, rollout_entropy=zero, finished=jnp.ones(P * G, bool),
                      version=jnp.zeros(P * G, jnp.int32),
                      support=None if kept is None else pack_support(jnp.asarray(kept)))
    verdict = Verdict(score=jnp.zeros(P * G), parts={}, failed=jnp.zeros(P * G, bool))
    return assemble.experience(tiny.prompts(TASK, P), samples, verdict, seed=jnp.asarray([7, 8, 9, 10], jnp.uint32))


def prompt_of(prompts, n):
    return np.asarray(prompts.tokens)[n // G, :int(prompts.lengths[n // G])]


# Moments


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("top", [0, 4])
def test_moments_are_those_of_the_whole_distribution(temperature, top):
    """sum_v p_v^2 and sum_v p_v^3 of the softmax in NumPy, float64, over all tokens or the four that were kept."""
    whole, hidden = np.zeros((P * G, T, V)), np.zeros((P * G, T))
    kept = np.ones((P * G, T, V), bool)
    for run in range(2 if top else 1):  # what is kept decides which tokens can have been drawn
        x = experience(kept if top else None)
        for n in range(P * G):
            prompt, tokens = prompt_of(x.prompts, n), np.asarray(x.tokens)[n]
            whole[n] = oracle.logp(NETWORK.shape, oracle.float64(POLICY), prompt, tokens, temperature=temperature)
            states = oracle.hidden(NETWORK.shape, oracle.float64(POLICY), np.concatenate([prompt, tokens]))
            hidden[n] = (states[len(prompt) - 1:-1] ** 2).sum(axis=1)
        if top and run == 0:
            kept = whole >= np.sort(whole, axis=2)[:, :, -top, None]
    p = np.where(kept, np.exp(whole), 0.0)
    p /= p.sum(axis=2, keepdims=True)
    found = jax.jit(evaluate.make_moments(NETWORK, temperature))({"policy": POLICY}, x)
    for values, expected in zip(found, ((p**2).sum(axis=2), (p**3).sum(axis=2), hidden), strict=True):
        np.testing.assert_allclose(values, expected, rtol=2e-4)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_moments_and_views_are_constants_of_the_policy_before_the_batch(microbatches):
    """At the rollout's temperature; read by name, 0 behind the mask, without gradient."""
    recipe = recipes.replace(grpo.grpo(G, beta=0.0), models=("moments",), rollout=Rollout(G, temperature=0.7),
                             views={"turned": turned})
    policy_of, x = evaluate.make_evaluate(NETWORK, 0.7), experience()

    def full(policy):
        full = evaluate.with_models(recipe, NETWORK, policy_of, {"policy": policy}, {}, x, microbatches)
        full = assemble.selected(recipe, full)
        return full.second_moment, full.third_moment, full.hidden_square, full.view.turned

    def total(policy):
        return sum(values.sum() for values in full(policy))

    found, slope = jax.jit(lambda policy: (full(policy), jax.grad(total)(policy)))(POLICY)
    tiny.same(slope, jax.tree.map(jnp.zeros_like, POLICY))
    expected = jax.jit(evaluate.make_moments(NETWORK, 0.7))({"policy": POLICY}, x)
    for values, whole in zip(found, expected, strict=False):
        np.testing.assert_allclose(values, np.where(x.mask, whole, 0.0), rtol=1e-5)
    mask = np.asarray(x.mask)
    view = under(turned(x.prompts, x.seed[::G]), x, 0.7)
    np.testing.assert_allclose(np.asarray(found[3])[mask], view[mask], atol=1e-4)
    assert not np.asarray(found[3])[~mask].any()


def test_moments_take_one_pass_over_the_vocabulary():
    """One matrix product more than the hidden states take."""
    x = experience()
    products = lambda call: str(jax.make_jaxpr(call)(POLICY)).count("dot_general[")
    hidden = products(lambda policy: NETWORK.hidden(policy, x.prompts.tokens, x.prompts.lengths, x.tokens))
    assert products(lambda policy: evaluate.make_moments(NETWORK, 0.7)({"policy": policy}, x)) == hidden + 1


def test_moments_that_nobody_asked_for_are_not_there():
    with pytest.raises(ValueError, match='x.second_moment is not there: .*models=."moments",'):
        _ = experience().second_moment


# Views


def turned(prompts, seed):
    """Other prompts: shorter by their last token, and each token moved by a number drawn for its prompt."""
    shift = (seed % 3).astype(jnp.int32)[:, None] + 1
    return dataclasses.replace(prompts, tokens=(prompts.tokens + shift) % V, lengths=prompts.lengths - 1)


def under(prompts, x, temperature):
    """Log-probabilities of the drawn tokens under prompts, [N, T], by the oracle."""
    rows = []
    for n in range(P * G):
        tokens = np.asarray(x.tokens)[n]
        every = oracle.logp(NETWORK.shape, oracle.float64(POLICY), prompt_of(prompts, n), tokens,
                            temperature=temperature)
        rows.append(every[np.arange(T), tokens])
    return np.stack(rows)


def test_views_may_have_other_lengths_and_draw_lots_per_prompt():
    """A longer prompt, and the seeds that a view sees: one of each prompt, that of its first row."""
    seen = []

    def longer(prompts, seed):
        seen.append(seed.shape)
        head = jnp.broadcast_to(jnp.array([[3, 4]]), (P, 2))
        return dataclasses.replace(prompts, tokens=jnp.concatenate([head, prompts.tokens], axis=1),
                                   lengths=prompts.lengths + 2)

    recipe = recipes.replace(rloo.rloo(G), views={"longer": longer, "turned": turned})
    x = experience()
    policy_of = evaluate.make_evaluate(NETWORK, 1.0)
    full = jax.jit(lambda x: evaluate.with_models(recipe, NETWORK, policy_of, {"policy": POLICY}, {}, x))(x)
    np.testing.assert_allclose(full.view.longer, under(longer(x.prompts, x.seed[::G]), x, 1.0), atol=1e-4)
    np.testing.assert_allclose(full.view.turned, under(turned(x.prompts, x.seed[::G]), x, 1.0), atol=1e-4)
    assert np.abs(np.asarray(full.view.longer - full.view.turned)).max() > 0.1
    assert set(seen) == {(P,)}
    tiny.same(full.prompts, x.prompts)


def test_a_view_reaches_the_loss_and_its_rows_follow_selection():
    """Resampled rows carry their views, marks and everything else that is known of them."""
    def loss(policy, x):
        return (policy.logp - x.view.other) * x.mark.weight

    rows = jnp.arange(toy.PROMPTS * G) // G * G  # each prompt's first answer, twice
    recipe = recipes.replace(rloo.rloo(G), views={"other": turned}, loss=loss, selection=lambda x: rows,
                             marks=lambda x: {"weight": jnp.broadcast_to(1.0 + x.score[:, None], x.mask.shape)})
    x = toy.experience(recipe)
    policy = toy.policy(x)
    loss_of, _ = update.batch_loss(recipe, policy, x)
    mask = np.asarray(x.mask)[rows]
    away = np.asarray(policy.logp - x.view.other)[rows] * (1 + np.asarray(x.score)[rows][:, None])
    np.testing.assert_allclose(loss_of, (away * mask).sum() / mask.shape[0], rtol=1e-5)
