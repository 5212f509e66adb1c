"""Every entry point against the whole text through `oracle`: each completion behind its own copy of its prompt."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.linear_logprob.op import linear_logprob
from rl_jax.models import heads
from rl_jax.models import transformer
from rl_jax.models.network import Network
from rl_jax.models.shape import Shape
from tests import numeric
from tests.models import oracle

P, G, S, T = 3, 2, 5, 4
SHAPE = Shape(vocabulary=11, width=16, layers=1, heads=4, key_heads=2, head_size=6, inner=24, rotary_base=50.0)
VARIANTS = {"two_layers": {"layers": 2}, "one_key_head, query_bias": {"key_heads": 1, "query_bias": True},
            "no_sharing_of_keys, scale_embedding, remat": {"key_heads": 4, "scale_embedding": True, "remat": True},
            "query_norm, untied": {"query_norm": True, "tied": False},
            "scan_layers, remat, query_bias, query_norm": {"scan_layers": True, "layers": 2, "remat": True,
                                                           "query_bias": True, "query_norm": True}}
every_variant = pytest.mark.parametrize("shape", [dataclasses.replace(SHAPE, **v) for v in VARIANTS.values()],
                                        ids=VARIANTS)


def texts(seed=0):
    """Prompts of random lengths, one of a single token, with garbage as padding; lengths of the completions."""
    rng = np.random.default_rng(seed)
    lengths = np.array([1, *rng.integers(2, S + 1, P - 1)], np.int32)
    ends = rng.integers(1, T + 1, P * G)
    prompts, completions = (jnp.asarray(rng.integers(0, 11, size), jnp.int32) for size in ((P, S), (P * G, T)))
    return prompts, jnp.asarray(lengths), completions, ends


def parameters_of(shape):
    return oracle.perturbed(Network(shape).initialise(jax.random.key(0)))


def pair(n, prompts, lengths, completions, ends):
    return np.asarray(prompts)[n // G, :lengths[n // G]], np.asarray(completions)[n, :ends[n]]


def program(shape):
    """(parameters, arrays..., weights) -> hidden states, log-probabilities, gradient of their weighted sum."""
    network = Network(shape)

    def said(parameters, prompts, lengths, completions, credit):
        hidden = network.hidden(parameters, prompts, lengths, completions)
        logp, entropy = linear_logprob(hidden.reshape(P * G * T, -1), network.vocabulary(parameters),
                                       completions.reshape(-1))
        logp, entropy = logp.reshape(P * G, T), entropy.reshape(P * G, T)
        return (credit * (logp + 0.5 * entropy)).sum(), (hidden, logp)

    return jax.jit(jax.value_and_grad(said, has_aux=True))


@every_variant
def test_the_shared_prefix_changes_nothing(shape):
    """Criterion 3: hidden states and log-probabilities to 1e-5, gradients to 1e-4 of each array's largest."""
    parameters, run = parameters_of(shape), program(shape)
    for seed in (0, 1):
        prompts, lengths, completions, ends = texts(seed)
        credit = numeric.normal(seed, P * G, T) * (np.arange(T) < ends[:, None])
        (_, (hidden, logp)), gradient = run(parameters, prompts, lengths, completions, jnp.asarray(credit, jnp.float32))
        for n in range(P * G):
            prompt, completion = pair(n, prompts, lengths, completions, ends)
            states = oracle.hidden(shape, oracle.float64(parameters), np.concatenate([prompt, completion]))
            np.testing.assert_allclose(hidden[n, :ends[n]], states[len(prompt) - 1:-1], atol=2e-5)
            expected = oracle.logp(shape, oracle.float64(parameters), prompt, completion)
            np.testing.assert_allclose(logp[n, :ends[n]], expected[np.arange(ends[n]), completion], atol=1e-5)

    expected = dict(jax.tree_util.tree_leaves_with_path(
        gradient_alone(shape, parameters, prompts, lengths, completions, credit)))
    for name, slope in jax.tree_util.tree_leaves_with_path(gradient):
        exact = expected[name]
        np.testing.assert_allclose(slope, exact, atol=1e-4 * np.abs(exact).max(), err_msg=str(name))


def gradient_alone(shape, parameters, prompts, lengths, completions, credit):
    """The same gradient in float64, each text a row of its own, padded on the right."""
    rows = np.zeros((P * G, S + T), int)
    for n in range(P * G):
        text = np.concatenate([prompts[n // G, :lengths[n // G]], completions[n]])
        rows[n, :len(text)] = text

    def alone(parameters, row, start, completion, credit):
        states = oracle.hidden(shape, parameters, row, jnp)[start - 1 + jnp.arange(T)]
        every = jax.nn.log_softmax(states @ parameters["embedding" if shape.tied else "head"].T)
        entropy = -(jnp.exp(every) * every).sum(axis=1)
        return (credit * (every[jnp.arange(T), completion] + 0.5 * entropy)).sum()

    with jax.enable_x64(True):
        run = jax.jit(jax.grad(lambda p, *a: jax.vmap(alone, (None, 0, 0, 0, 0))(p, *a).sum()))
        return jax.device_get(run(oracle.float64(parameters), rows, np.repeat(lengths, G), np.asarray(completions), credit))


def decoded(shape, parameters, prompts, lengths, completions):
    """Hidden states [N, T, D] by prefill and one decode step per position, vmapped over the group."""
    network = Network(shape)

    @jax.jit
    def all_steps(parameters, prompts, lengths, completions):
        prompt_cache, _ = network.prefill(parameters, prompts)
        given = jnp.moveaxis(completions.reshape(P, G, T), 1, 0)
        cache = jax.tree.map(lambda a: jnp.stack([a] * G), network.empty_cache(parameters, P, T))
        token = jnp.repeat(transformer.last_token(prompts, lengths)[None], G, axis=0)
        states, turns = [], network.turns(prompts.shape[1] + T)
        for now in range(T):
            step = jax.vmap(lambda c, t, now=now: network.decode(parameters, prompt_cache, c, t, lengths, jnp.int32(now), turns))
            hidden, cache, _ = step(cache, token)
            states.append(hidden)
            token = given[:, :, now]
        return jnp.moveaxis(jnp.stack(states), (0, 1, 2), (2, 1, 0)).reshape(P * G, T, -1)

    return all_steps(parameters, prompts, lengths, completions)


@pytest.mark.parametrize("variant", ["query_norm, untied", "scan_layers, remat, query_bias, query_norm"])
def test_decode_steps_give_the_hidden_states_of_training(variant):
    shape = dataclasses.replace(SHAPE, **VARIANTS[variant])
    parameters, (prompts, lengths, completions, _) = parameters_of(shape), texts()
    expected = jax.jit(Network(shape).hidden)(parameters, prompts, lengths, completions)
    np.testing.assert_allclose(decoded(shape, parameters, prompts, lengths, completions), expected, atol=2e-5)


def test_scanned_layers_are_the_unrolled_ones_stacked():
    unrolled = dataclasses.replace(SHAPE, layers=2)
    scanned = dataclasses.replace(unrolled, scan_layers=True)
    parameters, arrays = jax.tree.map(lambda a: a / 2, parameters_of(unrolled)), texts()[:3]
    assert jax.tree.structure(oracle.scanned(parameters)) == jax.tree.structure(parameters_of(scanned))
    one = jax.jit(Network(unrolled).hidden)(parameters, *arrays)
    other = jax.jit(Network(scanned).hidden)(oracle.scanned(parameters), *arrays)
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_what_stands_behind_the_prompts_length_is_never_read():
    parameters, (prompts, lengths, completions, _) = parameters_of(SHAPE), texts()
    other = jnp.where(jnp.arange(S)[None] < lengths[:, None], prompts, (prompts + 1) % 11)
    run = jax.jit(Network(SHAPE).hidden)
    np.testing.assert_array_equal(run(parameters, prompts, lengths, completions),
                                  run(parameters, other, lengths, completions))


def test_bfloat16_computes_in_it_and_keeps_float32_parameters():
    shape = dataclasses.replace(SHAPE, compute="bfloat16", scan_layers=True, query_bias=True, query_norm=True,
                                scale_embedding=True)
    parameters, (prompts, lengths, completions, _) = parameters_of(shape), texts()
    assert {a.dtype for a in jax.tree.leaves(parameters)} == {np.dtype("float32")}
    credit = jnp.ones((P * G, T))
    (_, (hidden, logp)), gradient = program(shape)(parameters, prompts, lengths, completions, credit)
    assert hidden.dtype == jnp.bfloat16 and logp.dtype == jnp.float32
    assert {a.dtype for a in jax.tree.leaves(gradient)} == {np.dtype("float32")}
    assert {a.dtype for a in jax.tree.leaves(Network(shape).prefill(parameters, prompts))} == {jnp.dtype(jnp.bfloat16)}
    slopes = gradient_alone(shape, parameters, np.asarray(prompts), np.asarray(lengths), np.asarray(completions),
                            np.asarray(credit))
    for slope, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(slopes), strict=True):  # 8 bits of mantissa
        assert (slope * other).sum() > 0.9 * np.linalg.norm(slope) * np.linalg.norm(other)
    for n in range(P * G):
        prompt, completion = pair(n, prompts, lengths, completions, [T] * P * G)
        expected = oracle.logp(shape, oracle.float64(parameters), prompt, completion)[np.arange(T), completion]
        assert np.abs(logp[n] - expected).mean() < 0.2  # logits of order 10
    steps = decoded(shape, parameters, prompts, lengths, completions)
    np.testing.assert_allclose(np.asarray(steps, np.float32), np.asarray(hidden, np.float32), atol=0.25)


def test_a_fresh_networks_logits_are_of_order_one():
    parameters, (prompts, lengths, completions, _) = Network(SHAPE).initialise(jax.random.key(3)), texts()
    hidden = jax.jit(Network(SHAPE).hidden)(parameters, prompts, lengths, completions)
    logits = np.asarray(hidden) @ np.asarray(Network(SHAPE).vocabulary(parameters)).T
    assert 0.3 < logits.std() < 3


def test_value_head_starts_at_zero_and_is_a_product():
    network, parameters = Network(SHAPE), parameters_of(SHAPE)
    critic = heads.critic_from(network, parameters)
    hidden, weight = (numeric.normal(i, *shape) for i, shape in enumerate(((P * G, T, 16), (16,))))
    np.testing.assert_array_equal(critic["value"], 0.0)
    assert critic["body"]["embedding"] is not parameters["embedding"]
    found = heads.value(jnp.asarray(hidden, jnp.float32), jnp.asarray(weight, jnp.float32))
    np.testing.assert_allclose(found, hidden @ weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("wrong", "says"), [
    ({"width": 0}, "width=0: must be at least 1"), ({"vocabulary": 0}, "vocabulary=0"), ({"layers": -1}, "layers=-1"),
    ({"heads": 4, "key_heads": 3}, "key_heads must divide heads"), ({"head_size": 7}, "head_size=7: rotary"),
    ({"compute": "float16"}, "allowed are .'bfloat16', 'float32'.")])
def test_a_shape_that_cannot_be_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(SHAPE, **wrong)
