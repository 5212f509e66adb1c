"""One draw against a float64 oracle that sorts, cuts and renormalises by hand."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.recipe import Rollout
from rl_jax.rollout import decode, sample
from tests import numeric

ROWS, V, STRATA = 4, 9, 2000
LOGITS = 2 * numeric.normal(0, ROWS, V)
TIED = np.array([[1.0, 3.0, 1.0, 2.0, 2.0, 2.0, -1.0, 0.0, 1.0]])
SETTINGS = [{}, {"temperature": 0.7}, {"temperature": 1.8}, {"top_k": 1}, {"top_k": 3}, {"top_k": 50}, {"top_p": 0.5},
            {"top_p": 0.9}, {"top_p": 1e-6}, {"min_p": 0.2}, {"top_k": 4, "top_p": 0.8, "min_p": 0.05},
            {"temperature": 0.6, "top_k": 5, "top_p": 0.95}, {"temperature": 1.5, "min_p": 0.3, "top_p": 0.7}]
every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def oracle(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The probabilities that are drawn from, one row."""
    p = softmax(logits / temperature)
    least = 0.0
    ranked = np.sort(p)[::-1]
    if top_k:
        least = max(least, ranked[min(top_k, len(p)) - 1])
    if top_p < 1:
        inside = next(i for i in range(len(p)) if ranked[: i + 1].sum() >= top_p)
        least = max(least, ranked[inside])
    least = max(least, min_p * p.max())
    p = np.where(p >= least * (1 - 1e-9), p, 0.0)
    return p / p.sum()


def run(logits, uniform, setting):
    rollout = Rollout(**setting)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (len(uniform), logits.shape[-1]))
    return jax.device_get(jax.jit(lambda u, z: sample.draw(u, z, rollout))(jnp.asarray(uniform, jnp.float32), rows))


@every_setting
def test_tokens_come_with_the_probability_of_the_truncated_distribution(setting):
    """Evenly spread numbers fall on a token as often as its probability says, to one in each direction."""
    every = np.concatenate([LOGITS, TIED])
    found = run(np.repeat(every, STRATA, axis=0), np.tile((np.arange(STRATA) + 0.5) / STRATA, len(every)), setting)
    assert (found[3] is not None) == Rollout(**setting).truncated
    for i, logits in enumerate(every):
        token, logp, entropy, keep = jax.tree.map(lambda a, i=i: a[i * STRATA:(i + 1) * STRATA], found)
        p = oracle(logits, **setting)
        np.testing.assert_allclose(np.bincount(token, minlength=V), STRATA * p, atol=1.01)
        np.testing.assert_allclose(logp, np.log(p[token]), atol=1e-5)
        np.testing.assert_allclose(entropy, -(p[p > 0] * np.log(p[p > 0])).sum(), atol=1e-5)
        if keep is not None:
            np.testing.assert_array_equal(keep[0], p > 0)


def test_ties_with_the_last_kept_token_are_kept():
    z = jnp.asarray(TIED, jnp.float32)
    for setting in ({"top_k": 2}, {"top_p": 0.5}):
        np.testing.assert_array_equal(sample.kept(z, Rollout(**setting))[0], TIED[0] >= 2)


def test_greedy_takes_the_most_probable_and_is_certain():
    token, logp, entropy, keep = sample.draw(jnp.zeros(ROWS), jnp.asarray(LOGITS, jnp.float32),
                                             Rollout(temperature=0.0, top_k=2))
    np.testing.assert_array_equal(token, LOGITS.argmax(axis=1))
    np.testing.assert_array_equal([logp, entropy], 0.0)
    assert keep is None


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.7, "top_p": 0.9}], ids=str)
def test_frequencies_with_real_random_numbers(setting):
    """Pearson's chi-square of 40,000 draws; its mean is the degrees of freedom, its deviation sqrt(2 of them)."""
    uniform = decode.make_uniforms(jax.random.key(7), 100, 400, 1).reshape(-1)
    p = oracle(LOGITS[0], **setting)
    counts = np.bincount(run(LOGITS[:1], np.asarray(uniform), setting)[0], minlength=V)
    assert counts[p == 0].sum() == 0
    expected = len(uniform) * p[p > 0]
    free = len(expected) - 1
    chi_square = ((counts[p > 0] - expected) ** 2 / expected).sum()
    assert chi_square < free + 4 * np.sqrt(2 * free)


@pytest.mark.parametrize("setting", [{"top_k": 20}, {"top_p": 0.9}, {"top_k": 20, "temperature": 0.01}], ids=str)
def test_no_random_number_draws_a_token_that_was_cut(setting):
    """A parallel cumulative sum rises and falls by a rounding over tokens of probability 0: hit each such place."""
    logits = jnp.asarray(5 * numeric.normal(1, 1, 500), jnp.float32)
    tempered = logits / setting.get("temperature", 1.0)
    keep = sample.kept(tempered, Rollout(**setting))
    p = jax.jit(lambda z: jnp.exp(jax.nn.log_softmax(jnp.where(keep, z, -jnp.inf), axis=1)))(tempered)
    places = np.asarray(jax.jit(lambda p: jnp.cumsum(p, axis=1))(p))[0]
    steps = np.concatenate([np.nextafter(places, np.float32(end)) for end in (0, 2)] + [places, [0, 1 - 2**-24]])
    uniform = np.unique(steps[(steps >= 0) & (steps < 1)]).astype(np.float32)
    token, logp, *_ = run(np.asarray(logits), uniform, setting)
    assert np.asarray(keep)[0, token].all()
    assert np.isfinite(logp).all()


def test_what_cannot_be_asked_for_is_refused():
    for wrong in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*allowed are"):
            Rollout(**wrong)


@pytest.mark.parametrize("size", [5, sample.BLOCK, 3 * sample.BLOCK + 7])
def test_the_token_is_the_first_whose_cumulative_weight_passes(size):
    """Against a running sum over float64, wherever that is not within rounding of the target."""
    generator = np.random.default_rng(size)
    weight = np.exp(2 * generator.normal(size=(200, size))) * (generator.random((200, size)) < 0.6)
    weight[:, size // 2] = 0.1
    uniform = generator.random(200)
    found = np.asarray(jax.jit(sample.first_beyond)(jnp.asarray(uniform, jnp.float32), jnp.asarray(weight, jnp.float32)))
    for u, row, token in zip(uniform, weight, found, strict=True):
        cumulative = np.cumsum(row)
        target, near = u * cumulative[-1], 1e-5 * cumulative[-1]
        assert row[token] > 0
        assert cumulative[token] > target - near and cumulative[token] - row[token] <= target + near


@pytest.mark.parametrize("place", [0, 4, sample.BLOCK - 1, sample.BLOCK, 2 * sample.BLOCK + 1])
@pytest.mark.parametrize("uniform", [0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))])
def test_the_only_token_with_weight_is_taken(place, uniform):
    weight = jnp.zeros((1, 2 * sample.BLOCK + 3)).at[0, place].set(1e-30)
    assert sample.first_beyond(jnp.full(1, uniform, jnp.float32), weight)[0] == place
