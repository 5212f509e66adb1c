"""Answers that grow by windows: equal to those drawn at once, and what each step says of them, token by token."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.models.network import Network
from rl_jax.models.shape import Shape
from rl_jax.recipe import Rollout
from rl_jax.rollout import decode, window
from rl_jax.types import Prompts
from tests.models import oracle

V, P, G, S, T = 7, 4, 2, 4, 6
PAD, END = 3, 1  # padding is a token like any other, and not 0
NETWORK = Network(Shape(vocabulary=V, width=16, layers=1, heads=2, key_heads=1, head_size=8, inner=24))
PARAMETERS = oracle.perturbed(NETWORK.initialise(jax.random.key(0)))
UNIFORM_POLICY = jax.tree.map(jnp.zeros_like, PARAMETERS)  # all logits 0: token i for numbers in [i, i + 1) / V


def prompts(seed, count=P):
    """Numbered from 100 times the seed, with a fact that says the number again."""
    rng = np.random.default_rng(seed)
    number = 100 * seed + jnp.arange(count, dtype=jnp.int32)
    return Prompts(tokens=jnp.asarray(rng.integers(2, V, (count, S)), jnp.int32), example=number, domain=number % 2,
                   lengths=jnp.asarray(rng.integers(1, S + 1, count), jnp.int32),
                   facts={"number": 1.0 * number[:, None]})


def empty(rollout, count=P):
    group = rollout.group_size
    return window.blank(jax.tree.map(jnp.zeros_like, prompts(0, count)),
                        window.whole(NETWORK, rollout, count * group, T), jnp.zeros((count, group, T)))


@functools.cache
def grower(rollout):
    """The compiled step, once for each way to draw."""
    return jax.jit(window.make_window(NETWORK, rollout, completion_length=T, stop_ids=(END,), pad_id=PAD))


def uniforms(seed, group=G):
    return decode.make_uniforms(jax.random.key(seed), P, group, T)


def grown(rollout, steps, parameters=PARAMETERS):
    """Slots after each step; prompts and random numbers of step k are those of seed k + 1."""
    slots, found = empty(rollout), []
    for k in range(steps):
        numbers = uniforms(k + 1, rollout.group_size)
        slots = grower(rollout)(parameters, slots, prompts(k + 1), numbers, jnp.int32(10 + k))
        found.append(slots)
    return found


def rows_of(slots, place, group):
    """The samples of one place."""
    return jax.tree.map(lambda a: np.asarray(a)[place * group:(place + 1) * group], slots.samples)


SETTINGS = [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8, "temperature": 1.3},
            {"temperature_factor": lambda entropy, coefficient: 1 + 0.1 * entropy}]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(s))
@pytest.mark.parametrize("size", [2, 4])
def test_three_windows_are_one_draw(setting, size):
    """Same random numbers and weights; windows that divide T and one that does not. What every place asks first ends
    somewhere: all those answers are compared, whatever is asked in their neighbours' places meanwhile."""
    rollout = Rollout(G, window=size, **setting)
    whole = jax.jit(decode.make_rollout(NETWORK, Rollout(G, **setting), completion_length=T, stop_ids=(END,),
                                        pad_id=PAD))
    expected = whole(PARAMETERS, prompts(1), uniforms(1), jnp.int32(0))
    steps, ended = grown(rollout, -(-T // size)), {}
    for k, slots in enumerate(steps):
        for place in range(P):
            if np.asarray(slots.prompts.example)[place] == 100 + place and not slots.busy[place]:
                ended.setdefault(place, (k, rows_of(slots, place, G)))
    assert sorted(ended) == list(range(P))
    assert len({k for k, _ in ended.values()}) > 1, "some go on and some do not"
    lengths = np.asarray(expected.mask).sum(axis=1)
    assert 0 < (lengths % size != 0).sum() and (lengths > size).any(), "some end inside a window"
    for place, (_, found) in ended.items():
        rows = slice(place * G, (place + 1) * G)
        mask = np.asarray(expected.mask)[rows]
        np.testing.assert_array_equal(found.mask, mask)
        np.testing.assert_array_equal(found.tokens, np.asarray(expected.tokens)[rows])
        np.testing.assert_array_equal(found.finished, np.asarray(expected.finished)[rows])
        for name in ("rollout_logp", "rollout_entropy"):
            np.testing.assert_allclose(vars(found)[name], np.asarray(vars(expected)[name])[rows], rtol=1e-5, atol=2e-6)
        assert found.complete.all()
        if rollout.truncated:
            np.testing.assert_array_equal(found.support[mask], np.asarray(expected.support)[rows][mask])
        else:
            assert found.support is None


def test_windows_end_at_either_of_two_stop_tokens():
    """The oracle is one draw with the same two; here both of them end some answer."""
    ends = {"completion_length": T, "stop_ids": (END, 3), "pad_id": PAD}
    expected = jax.jit(decode.make_rollout(NETWORK, Rollout(G), **ends))(
        PARAMETERS, prompts(1), uniforms(1), jnp.int32(10))
    grow, rollout = jax.jit(window.make_window(NETWORK, Rollout(G, window=2), **ends)), Rollout(G, window=2)
    slots = empty(rollout)
    for _ in range(-(-T // 2)):
        before, slots = slots, grow(PARAMETERS, slots, prompts(1), uniforms(1), jnp.int32(10))
        for place in np.flatnonzero(~np.asarray(slots.busy)):
            rows = slice(place * G, (place + 1) * G)
            np.testing.assert_array_equal(rows_of(slots, place, G).tokens, np.asarray(expected.tokens)[rows])
            np.testing.assert_array_equal(rows_of(slots, place, G).finished, np.asarray(expected.finished)[rows])
    last = np.asarray(expected.tokens)[np.arange(P * G), np.asarray(expected.mask).sum(axis=1) - 1]
    assert {END, 3} <= set(last[np.asarray(expected.finished)])


def test_a_window_as_long_as_the_answer_is_one_draw():
    whole = jax.jit(decode.make_rollout(NETWORK, Rollout(G), completion_length=T, stop_ids=(END,), pad_id=PAD))
    expected = whole(PARAMETERS, prompts(1), uniforms(1), jnp.int32(10))
    (slots,) = grown(Rollout(G, window=T + 3), 1)
    assert not slots.busy.any() and slots.samples.complete.all()
    np.testing.assert_array_equal(slots.samples.fresh, expected.mask)
    for name in ("tokens", "mask", "finished", "version"):
        np.testing.assert_array_equal(vars(slots.samples)[name], vars(expected)[name])
    np.testing.assert_allclose(slots.samples.rollout_logp, expected.rollout_logp, rtol=1e-5, atol=2e-6)


def scripted(rows):
    """Numbers that make the uniform policy draw these tokens, [P, G, T]."""
    return (jnp.asarray(rows, jnp.float32).reshape(P, G, T) + 0.5) / V


# The first prompts, two answers each: both end in the first window; one ends in the second and one in the first; one
# ends with the budget and one never does; one ends on a window's last place, one in the second window.
FIRST = [[2, 1, 5, 5, 5, 5], [1, 5, 5, 5, 5, 5],
         [2, 2, 1, 5, 5, 5], [4, 1, 5, 5, 5, 5],
         [2, 2, 2, 2, 2, 1], [6, 6, 6, 6, 6, 6],
         [2, 1, 5, 5, 5, 5], [2, 2, 2, 1, 5, 5]]
SECOND = [[4] * 6] * 8  # never ends
THIRD = [[0, 0, 1, 2, 2, 2]] * 8


@pytest.fixture(scope="module")
def script():
    """Slots after each of three steps of two tokens."""
    rollout = Rollout(G, window=2)
    slots, found = empty(rollout), []
    for k, rows in enumerate((FIRST, SECOND, THIRD)):
        slots = grower(rollout)(UNIFORM_POLICY, slots, prompts(k + 1), scripted(rows), jnp.int32(10 + k))
        found.append(slots)
    return found


def test_busy_places_keep_their_prompt_and_the_others_take_the_fresh_one(script):
    np.testing.assert_array_equal([s.busy for s in script], [[False, True, True, True], [True, False, True, False],
                                                             [True, True, False, True]])
    np.testing.assert_array_equal([s.prompts.example for s in script], [
        [100, 101, 102, 103], [200, 101, 102, 103], [200, 301, 102, 303]])
    for slots in script:  # everything of a prompt goes with it: its text, its length, its facts
        for place, number in enumerate(np.asarray(slots.prompts.example)):
            expected = jax.tree.map(lambda a, p=place: a[p], prompts(int(number) // 100))
            jax.tree.map(lambda a, b, p=place: np.testing.assert_array_equal(a[p], b), slots.prompts, expected)


def test_tokens_grow_by_the_window_with_the_random_numbers_they_began_with(script):
    """A place is a pair of rows: what it holds after each step, written out; padding behind it."""
    def held(*rows):
        return [list(row) + [PAD] * (T - len(row)) for row in rows]

    expected = [
        held((2, 1), (1,), (2, 2), (4, 1), (2, 2), (6, 6), (2, 1), (2, 2)),
        held((4, 4), (4, 4), (2, 2, 1), (4, 1), (2, 2, 2, 2), (6, 6, 6, 6), (2, 1), (2, 2, 2, 1)),
        held((4, 4, 4, 4), (4, 4, 4, 4), (0, 0), (0, 0), (2, 2, 2, 2, 2, 1), (6,) * 6, (0, 0), (0, 0))]
    lengths = [[2, 1, 2, 2, 2, 2, 2, 2], [2, 2, 3, 2, 4, 4, 2, 4], [4, 4, 2, 2, 6, 6, 2, 2]]
    for slots, tokens, length in zip(script, expected, lengths, strict=True):
        np.testing.assert_array_equal(slots.samples.tokens, tokens)
        mask = np.arange(T) < np.array(length)[:, None]
        np.testing.assert_array_equal(slots.samples.mask, mask)
        np.testing.assert_allclose(slots.samples.rollout_logp, np.where(mask, -np.log(V), 0.0), rtol=1e-6)
        np.testing.assert_allclose(slots.samples.rollout_entropy, np.where(mask, np.log(V), 0.0), rtol=1e-6)


def test_fresh_complete_finished_and_version(script):
    """Fresh are this step's tokens; an answer that ended before its neighbour has none and waits to be complete."""
    fresh = [[2, 1, 2, 2, 2, 2, 2, 2], [2, 2, 1, 0, 2, 2, 0, 2], [2, 2, 2, 2, 2, 2, 2, 2]]
    for slots, count in zip(script, fresh, strict=True):
        length = np.asarray(slots.samples.mask).sum(axis=1)
        column = np.arange(T)[None]
        expected = (column < length[:, None]) & (column >= (length - np.array(count))[:, None])
        np.testing.assert_array_equal(slots.samples.fresh, expected)
        np.testing.assert_array_equal(slots.samples.complete, np.repeat(~np.asarray(slots.busy), G))
    np.testing.assert_array_equal([s.samples.finished for s in script], np.array([
        [1, 1, 0, 1, 0, 0, 1, 0], [0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 1, 0, 0, 0]], bool))
    np.testing.assert_array_equal([s.samples.version for s in script], [
        [10] * 8, [11, 11, 11, 10, 11, 11, 10, 11], [12] * 8])


def test_each_window_is_drawn_by_the_weights_of_its_step():
    """Log-probabilities: those of the first tokens are the first weights', of the later ones the later weights'."""
    rollout, other = Rollout(1, window=2), jax.tree.map(lambda a: 0.7 * a, PARAMETERS)
    asked, numbers, slots = prompts(1), uniforms(1, 1), empty(rollout)
    weights = (PARAMETERS, other, PARAMETERS)
    compared = 0
    for k, parameters in enumerate(weights):
        slots = grower(rollout)(parameters, slots, asked, numbers, jnp.int32(k))
        samples = slots.samples
        for n in range(P):
            length, text = int(samples.mask[n].sum()), np.asarray(samples.tokens)[n]
            prompt = np.asarray(slots.prompts.tokens)[n, :int(slots.prompts.lengths[n])]
            every = [oracle.logp(NETWORK.shape, oracle.float64(w), prompt, text) for w in weights]
            began = k - (length - 1) // 2
            for t in range(length):
                compared += t > 1
                np.testing.assert_allclose(samples.rollout_logp[n, t], every[began + t // 2][t, text[t]], atol=1e-4)
    assert compared > 4


def test_replicas_change_nothing():
    """Under a named axis, as each alone."""
    rollout = Rollout(G, window=2)
    run = jax.vmap(window.make_window(NETWORK, rollout, completion_length=T, stop_ids=(END,), pad_id=PAD, axis="seed"),
                   (None, 0, None, 0, None), axis_name="seed")
    both = jax.tree.map(lambda a: jnp.stack([a, a]), empty(rollout))
    numbers = jnp.stack([scripted(FIRST), scripted(THIRD)])
    for k in range(2):
        both = jax.jit(run)(UNIFORM_POLICY, both, prompts(k + 1), numbers, jnp.int32(k))
    for i, rows in enumerate((FIRST, THIRD)):
        slots = empty(rollout)
        for k in range(2):
            slots = grower(rollout)(UNIFORM_POLICY, slots, prompts(k + 1), scripted(rows), jnp.int32(k))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), both, slots)


@pytest.mark.parametrize("option", [{"resample": 1}, {"given": 1}])
def test_a_window_cannot_be_combined_with_what_changes_the_batch(option):
    with pytest.raises(ValueError, match="window=2 goes on with the answers of the step before"):
        Rollout(4, window=2, **option)


def test_a_window_changes_nothing_else_of_the_rollout():
    assert dataclasses.replace(Rollout(G, window=2), window=0) == Rollout(G)
