import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.tasks.toys import token_tree

DEPTH, BRANCHING = 3, 3


def facts(table, count):
    return {"rewards": jnp.tile(jnp.asarray(table)[None], (count, 1))}


def test_the_score_of_each_string_is_its_reward():
    task = token_tree.token_tree(DEPTH, BRANCHING, seed=4)
    table = task.splits["train"][0].facts["rewards"]
    tokens = token_tree.strings(DEPTH, BRANCHING)
    assert tokens.shape == (27, 3) and len({tuple(row) for row in tokens.tolist()}) == 27
    score, _ = jax.jit(task.verifier.score)(facts(table, 27), jnp.asarray(tokens), jnp.ones((27, 3), bool))
    np.testing.assert_array_equal(score, table)
    assert table.max() == 1 and len(set(table.tolist())) > 2
    best = task.splits["train"][0].answer
    assert table[tokens.tolist().index(best)] == 1


def test_all_strings_of_the_vocabulary_that_leave_the_tree_score_0():
    task = token_tree.token_tree(2, 2)
    every = np.array(list(itertools.product(range(task.tokenizer.size), repeat=2)))
    table = task.splits["train"][0].facts["rewards"]
    score, _ = task.verifier.score(facts(table, len(every)), jnp.asarray(every), jnp.ones(every.shape, bool))
    inside = {tuple(row): reward for row, reward in zip(token_tree.strings(2, 2).tolist(), table, strict=True)}
    np.testing.assert_array_equal(score, [inside.get(tuple(row), 0.0) for row in every.tolist()])
    cut = jnp.tile(jnp.array([[True, False]]), (len(every), 1))
    np.testing.assert_array_equal(task.verifier.score(facts(table, len(every)), jnp.asarray(every), cut)[0], 0)


def softmax_tree(weights):
    """log p of every string when each level has its own softmax, as jnp."""
    logp = jax.nn.log_softmax(weights, axis=1)
    digits = token_tree.strings(DEPTH, BRANCHING) - 2
    return sum(logp[level, digits[:, level]] for level in range(DEPTH))


def test_expected_reward_and_its_gradient_against_loops():
    """The gradient is sum_s p(s) r(s) d log p(s), each d log p a loop over one-hot minus softmax."""
    weights = np.random.default_rng(0).normal(size=(DEPTH, BRANCHING))
    table = token_tree.rewards(DEPTH, BRANCHING, 0)
    p = np.exp(weights) / np.exp(weights).sum(axis=1, keepdims=True)
    value, gradient = 0.0, np.zeros_like(weights)
    for string, reward in zip(itertools.product(range(BRANCHING), repeat=DEPTH), table, strict=True):
        probability = np.prod([p[level, branch] for level, branch in enumerate(string)])
        value += probability * reward
        for level, branch in enumerate(string):
            gradient[level] += probability * reward * (np.eye(BRANCHING)[branch] - p[level])
    got, got_gradient = jax.value_and_grad(lambda w: token_tree.expected_reward(softmax_tree(w), table))(
        jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(got, value, rtol=1e-5)
    np.testing.assert_allclose(got_gradient, gradient, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_against_enumeration(k):
    table = np.array([0.0, 1.0, 0.75, 1.0], np.float32)
    p = np.array([0.4, 0.1, 0.3, 0.2])
    expected = sum(np.prod(p[list(drawn)]) for drawn in itertools.product(range(4), repeat=k)
                   if any(table[i] == 1 for i in drawn))
    np.testing.assert_allclose(token_tree.pass_at_k(jnp.log(jnp.asarray(p)), table, k), expected, rtol=1e-5)


@pytest.mark.parametrize("depth, branching", [(0, 2), (5, 3), (1, 10), (2, 0)])
def test_refused_sizes(depth, branching):
    with pytest.raises(ValueError, match="at most 81"):
        token_tree.token_tree(depth, branching)
