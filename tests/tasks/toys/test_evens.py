import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.tasks import judge, stream
from rl_jax.tasks.task import HostVerifier, PureVerifier
from rl_jax.tasks.toys import evens


def test_the_share_of_even_ids_of_what_was_chosen():
    tokens = jnp.array([[0, 2, 3, 5], [1, 1, 1, 4], [2, 4, 6, 8]])
    mask = jnp.array([[True] * 4, [True, True, False, False], [False] * 4])
    score, parts = jax.jit(evens.score)({}, tokens, mask)
    np.testing.assert_allclose(score, [0.5, 0.0, 0.0])
    assert parts == {}


def test_both_verifiers_say_the_same():
    task = evens.evens(50, completion_length=7, verifier="host")
    tokens = np.random.default_rng(0).integers(50, size=(9, 7))
    mask = np.ones(tokens.shape, bool)
    texts = judge.texts_of(task.tokenizer, tokens, mask)
    said = [task.verifier.score({}, text)["score"] for text in texts]
    np.testing.assert_allclose(said, evens.score({}, jnp.asarray(tokens), jnp.asarray(mask))[0], rtol=1e-6)
    assert isinstance(task.verifier, HostVerifier) and isinstance(evens.evens(50).verifier, PureVerifier)
    assert evens.score_of_text({}, "") == {"score": 0.0}


def test_prompts_have_one_length_and_text_round_trips():
    task = evens.evens(100, prompt_length=5, train_size=3)
    prompts = stream.batch(task, task.splits["train"])
    assert prompts.tokens.shape == (3, 5) and list(prompts.lengths) == [5, 5, 5]
    for example in task.splits["train"]:
        assert task.tokenizer.encode(example.text) == list(example.prompt)
    assert task.tokenizer.stop_ids == ()
    assert evens.evens(100, seed=1).fingerprint != evens.evens(100).fingerprint


@pytest.mark.parametrize("wrong", [{"vocabulary": 1}, {"prompt_length": 0}, {"completion_length": 0},
                                   {"train_size": 0}, {"verifier": "remote"}])
def test_what_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        evens.evens(**wrong)


@pytest.mark.parametrize("text", ["1 two", "100", "-1"])
def test_text_that_is_no_ids_is_refused(text):
    with pytest.raises(ValueError, match="from 0 to 99"):
        evens.Numbers(100).encode(text)
