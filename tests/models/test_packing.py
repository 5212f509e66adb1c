"""Where packed answers lie, against loops in Python; and that a network says the same of them as of rows of their own."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.models import packing
from rl_jax.models.network import Network
from rl_jax.models.shape import Shape
from tests.models import oracle

P, G, S, T, R = 3, 4, 5, 6, 2
SHAPE = Shape(vocabulary=11, width=16, layers=2, heads=4, key_heads=2, head_size=6, inner=24, rotary_base=50.0)
VARIANTS = {"one_layer": {"layers": 1},
            "scan_layers, remat, window, attention_cap": {"scan_layers": True, "remat": True, "window": 3,
                                                          "reach": ("window", "full"), "attention_cap": 2.0}}
LENGTHS = np.array([[6, 0, 3, 3], [1, 2, 4, 5], [0, 0, 0, 6]])


def first_fit(lengths, rows, room):
    """(row, start) of each answer, or None where one finds no room."""
    used, found = [0] * rows, [None] * len(lengths)
    for one in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r in range(rows) if used[r] + lengths[one] <= room), None)
        if row is None:
            return None
        found[one] = row, used[row]
        used[row] += lengths[one]
    return found


def test_the_longest_first_where_there_is_room():
    rng = np.random.default_rng(0)
    run = jax.jit(packing.layout, static_argnums=(1, 2))
    fitted = []
    for _ in range(60):
        lengths = rng.integers(0, T + 1, (P, G))
        found, expected = run(jnp.asarray(lengths), R, T), [first_fit(list(group), R, T) for group in lengths]
        fitted.append(all(one is not None for one in expected))
        assert bool(found.fits) == fitted[-1]
        if fitted[-1]:
            np.testing.assert_array_equal(np.stack([found.row, found.start], axis=2), expected)
    assert 0 < sum(fitted) < len(fitted)


def packed_places(lengths):
    found = packing.layout(lengths, R, T)
    return packing.places(found, lengths, R, T, T)


def test_every_token_has_one_place_and_comes_back():
    place = packed_places(jnp.asarray(LENGTHS))
    source = packing.sources(place, P * R, T)
    taken, there = np.asarray(source), np.arange(T) < LENGTHS.reshape(-1)[:, None]
    assert sorted(taken[taken >= 0]) == list(np.flatnonzero(there))
    for n, row in zip(*np.divmod(taken[taken >= 0], T), strict=True):
        assert there[n, row]
    owners = np.where(taken >= 0, taken // (T * G), -1)  # the group of every position
    for row, group in enumerate(owners):
        assert set(group) <= {-1, row // R}
    values = jnp.asarray(np.random.default_rng(0).normal(size=(P * G, T, 2)))
    np.testing.assert_array_equal(packing.unpacked(packing.packed(values, source), place),
                                  np.where(there[:, :, None], values, 0))


def test_answers_in_a_row_each_begin_with_the_prompt_s_last_token():
    completions, segment = jnp.asarray([[4, 5, 6, 7, 8, 9]]), jnp.asarray([[2, 2, 0, 0, 0, -1]])
    inputs, position = packing.fed(jnp.asarray([3]), completions, segment)
    assert inputs[0, :5].tolist() == [3, 4, 3, 6, 7] and position[0, :5].tolist() == [0, 1, 0, 1, 2]
    inputs, position = packing.fed(jnp.asarray([3]), completions)
    assert inputs.tolist() == [[3, 4, 5, 6, 7, 8]] and position.tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_and_gradients_are_those_of_rows_of_their_own(variant):
    network = Network(dataclasses.replace(SHAPE, **VARIANTS[variant]))
    parameters = oracle.perturbed(network.initialise(jax.random.key(0)))
    rng = np.random.default_rng(1)
    prompts, completions = (jnp.asarray(rng.integers(0, 11, size), jnp.int32) for size in ((P, S), (P * G, T)))
    prompt_lengths, credit = jnp.asarray([1, 3, 5]), jnp.asarray(rng.normal(size=(P * G, T, SHAPE.width)), jnp.float32)
    there = (jnp.arange(T)[None, :] < jnp.asarray(LENGTHS).reshape(-1, 1))[:, :, None]

    def whole(parameters):
        return jnp.where(there, network.hidden(parameters, prompts, prompt_lengths, completions), 0.0)

    def packed(parameters):
        place = packed_places(jnp.asarray(LENGTHS))
        source = packing.sources(place, P * R, T)
        segment = jnp.where(source < 0, -1, source // T)
        found = network.hidden(parameters, prompts, prompt_lengths, packing.packed(completions, source), None, segment)
        return packing.unpacked(found, place)

    @jax.jit
    def both(parameters):
        return [jax.value_and_grad(lambda p, run=run: ((run(p) * credit).sum(), run(p)), has_aux=True)(parameters)
                for run in (whole, packed)]

    ((_, expected), expected_gradient), ((_, found), gradient) = both(parameters)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradient, expected_gradient)
