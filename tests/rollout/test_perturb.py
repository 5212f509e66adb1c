"""Prompts with tokens replaced by others of their own."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.rollout import perturb
from rl_jax.types import Prompts

token_noise = jax.jit(perturb.token_noise)
LENGTHS = np.array([3, 40, 1, 25])


def prompts(lengths=LENGTHS, width=40):
    """Each prompt has tokens of its own, all different; the padding is -1."""
    row, place = np.arange(len(lengths))[:, None], np.arange(width)[None]
    tokens = np.where(place < lengths[:, None], 100 * row + place, -1)
    count = np.arange(len(lengths))
    return Prompts(tokens=jnp.asarray(tokens), lengths=jnp.asarray(lengths), example=jnp.asarray(count),
                   domain=jnp.zeros(len(lengths), int), facts={"answer": jnp.asarray(count)})


def seeds(count, start=7):
    return jnp.arange(start, start + count, dtype=jnp.uint32)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_tokens_come_from_the_same_prompt_and_the_rest_stays(share):
    clean = prompts()
    noisy = token_noise(clean, seeds(4), share)
    for own, new, length, row in zip(clean.tokens, noisy.tokens, LENGTHS, range(4), strict=True):
        assert set(np.asarray(new[:length]).tolist()) <= set(np.asarray(own[:length]).tolist())
        np.testing.assert_array_equal(new[length:], -1, err_msg=str(row))
    if share == 0:
        np.testing.assert_array_equal(noisy.tokens, clean.tokens)
    for field in ("lengths", "example", "domain"):
        np.testing.assert_array_equal(vars(noisy)[field], vars(clean)[field])


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_how_many_and_from_where(share):
    # 200 prompts of 40 tokens: a token stays with 1 - share + share / 40; every place is copied from alike.
    clean = prompts(np.full(200, 40))
    noisy = token_noise(clean, seeds(200), share)
    same = float((noisy.tokens == clean.tokens).mean())
    expected = 1 - share + share / 40
    assert abs(same - expected) < 4 * np.sqrt(max(expected * (1 - expected), 1e-9) / 8000)
    copied = np.bincount(np.asarray(noisy.tokens % 100).ravel(), minlength=40) / 200
    assert np.abs(copied - 1).max() < 4 * np.sqrt(1 / 200) * 1.2


def test_a_prompts_noise_depends_on_its_own_number_only():
    clean, order = prompts(), np.array([2, 0, 3, 1])
    noisy = token_noise(clean, seeds(4), 0.5)
    moved = jax.tree.map(lambda a: a[order], clean)
    np.testing.assert_array_equal(token_noise(moved, seeds(4)[order], 0.5).tokens, noisy.tokens[order])
    other = token_noise(clean, seeds(4, start=99), 0.5)
    assert (np.asarray(other.tokens) != np.asarray(noisy.tokens)).any()


def test_arrays_of_numpy_will_do():
    clean = dataclasses.replace(prompts(), tokens=np.asarray(prompts().tokens), lengths=LENGTHS)
    np.testing.assert_array_equal(perturb.token_noise(clean, seeds(4), 0.5).tokens,
                                  token_noise(prompts(), seeds(4), 0.5).tokens)
