"""Criterion 5: the gradient of real rollouts is, on average, the exact one; all 31 completions are enumerated.

Expectations come from NumPy: the log-probabilities and their gradients from the whole-text oracle in
float64, the estimators of the papers written here once more, every completion (or pair of them) weighed
with its probability. The enumeration gives the standard error of the measured mean as well, so each
coordinate of the gradient is tested at 4.5 of its own standard errors.
"""
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.learner import step
from rl_jax.recipes.baselines import grpo, ppo, reinforce, rloo
from rl_jax.recipes.loss import dapo_decoupled_clip
from rl_jax.tasks.toys import symbols, token_tree
from rl_jax.train import evaluation
from tests.learner import tiny
from tests.models import oracle

DEPTH, BRANCHING, SIGMAS = 2, 3, 4.5
TASK = token_tree.token_tree(DEPTH, BRANCHING)
TABLE = TASK.splits["train"][0].facts["rewards"]
NETWORK = tiny.network(TASK)
V = TASK.tokenizer.size
COMPLETIONS = np.array([[symbols.END, symbols.PAD]] + [[a, b] for a in range(V) if a != symbols.END for b in range(V)])
MASK = np.array([[True, row[0] != symbols.END] for row in COMPLETIONS])
LENGTH = MASK.sum(axis=1)
STEPS, PROMPTS = 4, 2048


def weights(seed):
    return jax.tree.map(lambda a: a + 0.1, NETWORK.initialise(jax.random.key(seed)))


def reward_of(row):
    path = tuple(int(t) - symbols.FIRST for t in row)
    return TABLE[path[0] * BRANCHING + path[1]] if all(0 <= b < BRANCHING for b in path) else 0.0


REWARD = np.array([reward_of(row) for row in COMPLETIONS])


def log_probabilities(policy):
    """[B, T] of the completions' tokens."""
    prompt = np.array(TASK.splits["train"][0].prompt)

    def one(row):
        every = oracle.logp(NETWORK.shape, policy, prompt, row, jnp)
        return every[jnp.arange(DEPTH), row]

    return jax.vmap(one)(jnp.asarray(COMPLETIONS))


class Exact:
    """What is known of a policy: log-probabilities, their gradients as rows [B, T, D], probabilities."""

    def __init__(self):
        with jax.enable_x64(True):
            policy, other = (jax.tree.map(jnp.asarray, oracle.float64(weights(seed))) for seed in (0, 1))
            run = jax.jit(log_probabilities)
            self.logp, self.reference = (np.where(MASK, run(weights), 0.0) for weights in (policy, other))
            rows = jax.jit(jax.jacrev(log_probabilities))(policy)
            self.slopes = np.concatenate([np.reshape(a, (*MASK.shape, -1)) for a in jax.tree.leaves(rows)], axis=2)
            self.slopes = np.where(MASK[:, :, None], self.slopes, 0.0)
            tree = [COMPLETIONS.tolist().index(row) for row in token_tree.strings(DEPTH, BRANCHING).tolist()]
            self.tree = self.logp.sum(axis=1)[tree]
            worth = jax.grad(token_tree.expected_reward)(jnp.asarray(self.tree), TABLE)
            self.policy_gradient = np.asarray(worth) @ self.slopes[tree].sum(axis=1)
            self.states = np.stack([oracle.hidden(NETWORK.shape, oracle.float64(policy),
                                                  np.array([*TASK.splits["train"][0].prompt, *row[:-1]]))
                                    for row in COMPLETIONS])
        self.p = np.exp(self.logp.sum(axis=1))
        assert abs(self.p.sum() - 1) < 1e-9


def flat(tree):
    return np.concatenate([np.reshape(a, -1) for a in jax.tree.leaves(tree)])


@pytest.fixture(scope="module")
def exact():
    return Exact()


@dataclasses.dataclass
class Estimator:
    """Per group: probability [B], numerator [B, D] and denominator [B] of the batch's gradient."""

    p: np.ndarray
    over: np.ndarray
    under: np.ndarray

    def mean(self):
        return self.p @ self.over / (self.p @ self.under)

    def standard_error(self, groups, correction=0.0):
        """Of the ratio of means over so many groups, to first order."""
        influence = (self.over - self.under[:, None] * self.mean()) / (self.p @ self.under) + correction
        return np.sqrt(self.p @ influence**2 / groups)


def in_pairs(exact, credit, token_mean=False, asked=lambda i, j: True):
    """The estimator of groups of two: credit(i, j) -> d loss / d logp [T] of completion i beside j."""
    pairs = [(i, j) for i, j in itertools.product(range(len(REWARD)), repeat=2) if asked(i, j)]
    over = np.stack([credit(i, j) @ exact.slopes[i] + credit(j, i) @ exact.slopes[j] for i, j in pairs])
    under = np.array([LENGTH[i] + LENGTH[j] if token_mean else 1.0 for i, j in pairs])
    p = np.array([exact.p[i] * exact.p[j] for i, j in pairs])
    return Estimator(p / p.sum(), over, under)


def zscore(i, j):
    """(R - mean) / (standard deviation with ddof 1 + 1e-6), of i among the two."""
    mean = (REWARD[i] + REWARD[j]) / 2
    return (REWARD[i] - mean) / (np.sqrt((REWARD[i] - mean) ** 2 + (REWARD[j] - mean) ** 2) + 1e-6)


def measured(recipe):
    """Mean gradient by role over `STEPS` real steps from the same weights, and how many groups were learned from."""
    optimiser = tiny.recorder()
    run = jax.jit(step.composed(tiny.pieces(recipe, TASK, optimiser)))
    state = tiny.state(recipe, TASK, optimiser, seed=11, policy=weights(0))
    state = dataclasses.replace(state, frozen={role: weights(1) for role in state.frozen})
    asked, gradients, groups = tiny.prompts(TASK, PROMPTS * (1 + recipe.rollout.resample)), [], 0
    for _ in range(STEPS):
        state, _, x = run(state, asked)
        gradients.append(state.optimiser)
        groups += int(x.mask.any(axis=1).sum()) // recipe.group_size
    return jax.tree.map(lambda *a: np.mean(a, axis=0), *gradients), groups


def agree(found, expected, error):
    """Within sampling error, and that error is small enough to tell the expectation from zero."""
    z = (found - expected) / (error + 1e-7 * np.abs(expected).max())
    assert np.abs(z).max() < SIGMAS
    assert np.abs(expected / (error + 1e-12)).max() > 8


def test_reinforce(exact):
    """The gradient of the expected reward."""
    found, groups = measured(reinforce.reinforce(baseline=0.25))
    one = Estimator(exact.p, np.einsum("b,btd->bd", 0.25 - REWARD, exact.slopes), np.ones(len(REWARD)))
    np.testing.assert_allclose(one.mean(), -exact.policy_gradient, atol=1e-9)
    agree(flat(found["policy"]), -exact.policy_gradient, one.standard_error(groups))


def test_rloo(exact):
    """The same gradient: leaving an answer out of its own baseline keeps it unbiased."""
    found, groups = measured(rloo.rloo(group_size=2))
    pairs = in_pairs(exact, lambda i, j: -(REWARD[i] - REWARD[j]) / 2 * MASK[i])
    np.testing.assert_allclose(pairs.mean(), -exact.policy_gradient, atol=1e-9)
    agree(flat(found["policy"]), -exact.policy_gradient, pairs.standard_error(groups))


def test_grpo(exact):
    """Z-scores in pairs, the mean of token means, and k3 to a reference that is not the policy."""
    beta = 0.5
    found, groups = measured(grpo.grpo(group_size=2, beta=beta))

    def credit(i, j):
        divergence = 1 - np.exp(exact.reference[i] - exact.logp[i])
        return MASK[i] * (beta * divergence - zscore(i, j)) / (2 * LENGTH[i])

    pairs = in_pairs(exact, credit)
    agree(flat(found["policy"]), pairs.mean(), pairs.standard_error(groups))


def test_dapo(exact):
    """Pairs of which exactly one is right, drawn again within the budget, a mean over all their tokens."""
    found, groups = measured(dapo_decoupled_clip.dapo_decoupled_clip(group_size=2, resample=2))
    right = REWARD >= 1
    pairs = in_pairs(exact, lambda i, j: -zscore(i, j) * MASK[i], token_mean=True, asked=lambda i, j: right[i] != right[j])
    share = 2 * (exact.p @ right) * (1 - exact.p @ right)
    asked = STEPS * PROMPTS * 3
    assert abs(groups - min(share * asked, STEPS * PROMPTS)) < 5 * np.sqrt(asked * share * (1 - share))
    agree(flat(found["policy"]), pairs.mean(), pairs.standard_error(groups))


def test_ppo_before_its_critic_has_learnt(exact):
    """Whitened GAE of a critic that says 0: A = decay^(tokens that follow) R, and the critic's error is that A."""
    decay = 0.9
    found, groups = measured(ppo.ppo(decay=decay, epochs=1))
    later = LENGTH[:, None] - 1 - np.arange(DEPTH)[None, :]
    advantage = np.where(MASK, decay**later * REWARD[:, None], 0.0)
    tokens = exact.p @ LENGTH
    mean = exact.p @ advantage.sum(axis=1) / tokens
    squares = (MASK * (advantage - mean) ** 2).sum(axis=1)
    variance = exact.p @ squares / tokens
    white = MASK * (advantage - mean) / np.sqrt(variance)
    policy = Estimator(exact.p, np.einsum("bt,btd->bd", -white, exact.slopes), LENGTH)
    of_scale = -policy.mean()[None] * ((squares - variance * LENGTH) / (2 * variance * tokens))[:, None]
    agree(flat(found["policy"]), policy.mean(), policy.standard_error(groups, of_scale))
    critic = Estimator(exact.p, np.einsum("bt,btd->bd", -advantage, exact.states), LENGTH)
    agree(found["critic"]["value"], critic.mean(), critic.standard_error(groups))
    np.testing.assert_array_equal(flat(found["critic"]["body"]), 0.0)


def test_pass_at_k(exact):
    """The unbiased estimate from real samples, in 256 problems of 8, within 4.5 of its own standard errors."""
    draw = step.make_draw(tiny.pieces(reinforce.reinforce(group_size=8), TASK, tiny.recorder()))
    asked = tiny.prompts(TASK, 256)
    state = tiny.state(reinforce.reinforce(group_size=8), TASK, tiny.recorder(), seed=2, policy=weights(0))
    samples = jax.jit(draw)(state, asked, jnp.int32(0))
    facts = jax.tree.map(lambda a: jnp.repeat(a, 8, axis=0), asked.facts)
    score, _ = TASK.verifier.score(facts, samples.tokens, samples.mask)
    for k in (1, 2, 4, 8):
        value, error = evaluation.pass_at_k(np.asarray(score).reshape(256, 8), k)
        assert abs(value - float(token_tree.pass_at_k(jnp.asarray(exact.tree, jnp.float32), TABLE, k))) < SIGMAS * error
        assert error < 0.04
