import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.tasks.toys import bandit


def test_every_token_gets_its_value():
    """Ids 0 and 1 are padding and end, 2 to 4 the arms, 5 the question mark."""
    task = bandit.bandit((0.25, 1.0, 0.5))
    facts = {"values": jnp.tile(task.splits["train"][0].facts["values"][None], (6, 1))}
    tokens = jnp.arange(6)[:, None]
    score, parts = jax.jit(task.verifier.score)(facts, tokens, jnp.ones((6, 1), bool))
    np.testing.assert_array_equal(score, [0, 0, 0.25, 1.0, 0.5, 0])
    assert parts == {}
    np.testing.assert_array_equal(bandit.score(facts, tokens, jnp.zeros((6, 1), bool))[0], 0)


def test_the_worked_solution_is_the_best_arm():
    task = bandit.bandit((0.25, 1.0, 0.5))
    assert task.tokenizer.decode(task.splits["train"][0].answer) == "1"
    assert task.completion_length == task.prompt_length == 1
    assert bandit.bandit((0.0, 1.0)).fingerprint != bandit.bandit((1.0, 0.0)).fingerprint


@pytest.mark.parametrize("values", [(), (2.0,), (-0.1,), (0.5,) * 63])
def test_refused_values(values):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        bandit.bandit(values)
