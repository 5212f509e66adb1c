"""Rollouts whose temperature follows each token's entropy: what was recorded is re-scored by the whole-text oracle."""
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.models.network import Network
from rl_jax.models.shape import Shape
from rl_jax.recipe import Rollout
from rl_jax.recipes.loss import hapo_heterogeneous
from rl_jax.rollout import decode, sample
from rl_jax.schedule import entropy_statistics as entropies
from rl_jax.types import Prompts
from tests import numeric
from tests.models import oracle

V, P, G, S, T = 7, 3, 2, 4, 5
NETWORK = Network(Shape(vocabulary=V, width=16, layers=1, heads=2, key_heads=1, head_size=8, inner=24))
PARAMETERS = oracle.perturbed(NETWORK.initialise(jax.random.key(0)))
TAU = 0.4
# Of a step before: its entropies lay around those of this policy.
STATISTICS = {"pivot": np.log(1.4), "deviation": 0.2, "above": 0.3, "below": 1.5}


def prompts():
    rng = np.random.default_rng(0)
    zero = jnp.zeros(P, jnp.int32)
    return Prompts(tokens=jnp.asarray(rng.integers(2, V, (P, S)), jnp.int32),
                   lengths=jnp.asarray(rng.integers(1, S + 1, P), jnp.int32), example=zero, domain=zero, facts={})


def drawn(rollout, statistics):
    run = decode.make_rollout(NETWORK, rollout, completion_length=T, stop_ids=(1,), pad_id=0)

    def of_state(numbers, state):
        return run(PARAMETERS, prompts(), numbers, jnp.int32(0), types.SimpleNamespace(entropies=state))

    return jax.jit(of_state)(decode.make_uniforms(jax.random.key(1), P, G, T), jax.tree.map(jnp.float32, statistics))


def factor(entropy):
    h = (np.log(entropy) - STATISTICS["pivot"]) / STATISTICS["deviation"]
    return 1 + TAU * min(max(h / STATISTICS["above" if h > 0 else "below"], -1), 1)


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def test_what_is_recorded_is_the_tempered_distribution_and_the_entropy_before_it():
    """Every token was drawn from the distribution whose log-probability was recorded, by the same random number."""
    recipe = hapo_heterogeneous.hapo_heterogeneous(group_size=G, tau=TAU)
    samples, asked = drawn(recipe.rollout, STATISTICS), prompts()
    numbers, factors = np.asarray(decode.make_uniforms(jax.random.key(1), P, G, T)), []
    for n in range(P * G):
        prompt = np.asarray(asked.tokens)[n // G, :asked.lengths[n // G]]
        every = oracle.logp(NETWORK.shape, oracle.float64(PARAMETERS), prompt, np.asarray(samples.tokens)[n])
        for t in np.flatnonzero(samples.mask[n]):
            entropy = -(np.exp(every[t]) * every[t]).sum()
            factors.append(factor(entropy))
            p, token = softmax(every[t] / factors[-1]), int(samples.tokens[n, t])
            np.testing.assert_allclose(samples.rollout_entropy[n, t], entropy, atol=1e-4)
            np.testing.assert_allclose(samples.rollout_logp[n, t], np.log(p[token]), atol=1e-4)
            u = numbers[n // G, n % G, t]
            assert p[:token].sum() - 1e-5 <= u <= p[:token + 1].sum() + 1e-5
    assert min(factors) < 0.95 and max(factors) > 1.05  # both sides were met


def test_before_the_first_step_and_switched_off_it_is_the_plain_rollout():
    plain = drawn(Rollout(G), STATISTICS)
    nothing_known = entropies.of_previous_step().init(0)
    for tau, statistics in ((TAU, nothing_known), (0.0, STATISTICS)):
        found = drawn(hapo_heterogeneous.hapo_heterogeneous(group_size=G, tau=tau).rollout, statistics)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, plain)


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 3}, {"top_p": 0.8}],
                         ids=str)
def test_one_draw_is_tempered_before_it_is_cut(setting):
    """The factor reads the entropy at the rollout's own temperature; truncation reads the tempered distribution."""
    logits = 2 * numeric.normal(0, 4, 9)
    rollout = Rollout(**setting, temperature_factor=lambda entropy, c: 1 + c.slope * entropy)
    _, logp, entropy, keep = sample.draw(jnp.full(4, 0.4), jnp.asarray(logits, jnp.float32), rollout,
                                         types.SimpleNamespace(slope=0.3))
    for i, row in enumerate(logits):
        own = softmax(row / setting.get("temperature", 1.0))
        expected = -(own * np.log(own)).sum()
        np.testing.assert_allclose(entropy[i], expected, rtol=1e-5)
        p = softmax(row / setting.get("temperature", 1.0) / (1 + 0.3 * expected))
        if keep is not None:
            ranked = np.sort(p)[::-1]
            inside = setting.get("top_k") or 1 + int((np.cumsum(ranked) < setting["top_p"]).sum())
            np.testing.assert_array_equal(keep[i], p >= ranked[inside - 1])
            p = np.where(keep[i], p, 0) / p[np.asarray(keep[i])].sum()
        assert np.abs(np.exp(logp[i]) - p).min() < 1e-6
