"""The three shapes of attention against one loop in NumPy float64 over a single query."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode_attention.reference import Cache
from rl_jax.models import attention
from tests import numeric

P, G, S, T, E = 2, 3, 4, 5, 6
SEEN = np.array([[False] * S, [True, True, False, False]])  # a prompt of one token shows nothing
LENGTHS = SEEN.sum(axis=1, dtype=np.int32)
HEADS = [(4, 2), (4, 4), (3, 1)]


def one(query, keys, values):
    """Softmax attention of one query [E] to lists of keys and values [E]."""
    weight = [np.exp(query @ k / np.sqrt(len(query))) for k in keys]
    return sum(w * v for w, v in zip(weight, values, strict=True)) / sum(weight)


def arrays(h, k, *rows):
    """Queries [*rows, H, E], then keys and values [*rows, K, E]."""
    return tuple(numeric.normal(i, *rows, heads, E) for i, heads in enumerate((h, k, k)))


def run(function, *arguments):
    return np.asarray(jax.jit(function)(*(jnp.asarray(a, jnp.float32 if a.dtype == float else a.dtype)
                                          for a in map(np.asarray, arguments))))


@pytest.mark.parametrize(("h", "k"), HEADS)
def test_prompt(h, k):
    query, key, value = arrays(h, k, P, S)
    found = run(attention.prompt, query, key, value)
    for p, s, i in np.ndindex(P, S, h):
        j = i // (h // k)
        np.testing.assert_allclose(found[p, s, i], one(query[p, s, i], key[p, :s + 1, j], value[p, :s + 1, j]), atol=1e-5)


@pytest.mark.parametrize(("h", "k"), HEADS)
def test_shared_prefix(h, k):
    (query, key, value), (_, far_key, far_value) = arrays(h, k, P * G, T), arrays(h, k, P, S)
    found = run(attention.shared_prefix, query, key, value, far_key, far_value, LENGTHS)
    for n, t, i in np.ndindex(P * G, T, h):
        p, j = n // G, i // (h // k)
        keys = [*far_key[p, SEEN[p], j], *key[n, :t + 1, j]]
        values = [*far_value[p, SEEN[p], j], *value[n, :t + 1, j]]
        np.testing.assert_allclose(found[n, t, i], one(query[n, t, i], keys, values), atol=1e-5)


@pytest.mark.parametrize(("h", "k"), HEADS)
@pytest.mark.parametrize("now", [0, 3])
def test_one_query(h, k, now):
    """What stands in the cache after `now` is never read."""
    (query, key, value), (_, far_key, far_value) = arrays(h, k, P, T), arrays(h, k, P, S)
    key[:, now + 1:] = value[:, now + 1:] = 1e3
    heads_first = [a.swapaxes(1, 2) for a in (key, value, far_key, far_value)]

    def attend(query, key, value, far_key, far_value, seen):
        own, prompt = Cache(key, value, jnp.full(P, now + 1)), Cache(far_key, far_value, seen)
        return attention.one_query(query, own, prompt)

    found = run(attend, query[:, now], *heads_first, SEEN.sum(axis=1, dtype=np.int32))
    for p, i in np.ndindex(P, h):
        j = i // (h // k)
        keys = [*far_key[p, SEEN[p], j], *key[p, :now + 1, j]]
        values = [*far_value[p, SEEN[p], j], *value[p, :now + 1, j]]
        np.testing.assert_allclose(found[p, i], one(query[p, now, i], keys, values), atol=1e-5)


def test_scores_far_beyond_float32s_exponential_are_finite():
    query, key, value = (1e3 * a for a in arrays(2, 1, P * G, T))
    found = run(attention.shared_prefix, query, key, value, key[:P, :S], value[:P, :S], LENGTHS)
    assert np.isfinite(found).all()


def test_what_the_prompt_mask_hides_has_no_gradient():
    (query, key, value), (_, far_key, far_value) = (
        [jnp.asarray(a, jnp.float32) for a in arrays(4, 2, *rows)] for rows in ((P * G, T), (P, S)))

    def total(far_key, far_value):
        return (attention.shared_prefix(query, key, value, far_key, far_value, jnp.asarray(LENGTHS)) ** 2).sum()

    for slope in jax.jit(jax.grad(total, (0, 1)))(far_key, far_value):
        np.testing.assert_array_equal(np.asarray(slope)[~SEEN], 0.0)
        assert np.abs(np.asarray(slope)[SEEN]).min() > 0
