"""Rollouts: scripted through the random numbers where the policy is uniform, and against the whole-text oracle."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.linear_logprob.support import unpack_support
from rl_jax.models.network import Network
from rl_jax.models.shape import Shape
from rl_jax.recipe import Rollout
from rl_jax.rollout import decode
from rl_jax.types import Prompts
from tests.models import oracle

V, P, G, S, T = 7, 3, 2, 4, 5
PAD, END = 0, 1
NETWORK = Network(Shape(vocabulary=V, width=16, layers=1, heads=2, key_heads=1, head_size=8, inner=24))
PARAMETERS = oracle.perturbed(NETWORK.initialise(jax.random.key(0)))
UNIFORM_POLICY = jax.tree.map(jnp.zeros_like, PARAMETERS)  # all logits 0: token i for numbers in [i, i + 1) / V


def prompts(count=P, seed=0):
    rng = np.random.default_rng(seed)
    zero = jnp.zeros(count, jnp.int32)
    return Prompts(tokens=jnp.asarray(rng.integers(2, V, (count, S)), jnp.int32),
                   lengths=jnp.asarray(rng.integers(1, S + 1, count), jnp.int32), example=zero, domain=zero, facts={})


def make(rollout, network=NETWORK, **options):
    ends = {"completion_length": T, "stop_ids": (END,), "pad_id": PAD}
    return decode.make_rollout(network, rollout, **ends | options)


@pytest.fixture(scope="module")
def drawn():
    """The compiled rollout of two samples per prompt."""
    return jax.jit(make(Rollout(G)))


def scripted(rows):
    """Numbers that make the uniform policy draw these tokens, [P, G, T]."""
    return (jnp.asarray(rows, jnp.float32).reshape(P, G, T) + 0.5) / V


SCRIPT = [[2, 3, 1, 5, 5], [1, 5, 5, 5, 5], [2, 2, 2, 2, 2], [4, 4, 4, 4, 1], [1, 1, 1, 1, 1], [0, 0, 2, 1, 6]]
CHOSEN = [3, 1, 5, 5, 1, 4]


@pytest.mark.parametrize("pad", [PAD, END])
def test_an_answer_ends_with_its_end_token_which_is_chosen(pad):
    """Also where padding has the same id; a padding token that the policy chose itself is chosen."""
    samples = jax.jit(make(Rollout(G), pad_id=pad))(UNIFORM_POLICY, prompts(), scripted(SCRIPT), jnp.int32(7))
    mask = np.arange(T) < np.array(CHOSEN)[:, None]
    np.testing.assert_array_equal(samples.mask, mask)
    np.testing.assert_array_equal(samples.tokens, np.where(mask, SCRIPT, pad))
    np.testing.assert_array_equal(samples.finished, [True, True, False, True, True, True])
    np.testing.assert_array_equal(samples.version, 7)
    np.testing.assert_allclose(samples.rollout_logp, np.where(mask, -np.log(V), 0.0), rtol=1e-6)
    np.testing.assert_allclose(samples.rollout_entropy, np.where(mask, np.log(V), 0.0), rtol=1e-6)
    assert samples.support is None


@pytest.mark.parametrize("pad", [PAD, 5])
def test_an_answer_ends_at_the_first_of_several_stop_tokens(pad):
    """Tokens 1 and 5 both end: each is chosen, also where padding has its id."""
    samples = jax.jit(make(Rollout(G), stop_ids=(END, 5), pad_id=pad))(
        UNIFORM_POLICY, prompts(), scripted([[2, 3, 1, 5, 5], [5, 1, 5, 5, 5], [2, 2, 2, 2, 2], [4, 4, 4, 4, 5],
                                             [1, 1, 1, 1, 1], [0, 0, 5, 1, 6]]), jnp.int32(0))
    np.testing.assert_array_equal(samples.mask.sum(axis=1), [3, 1, 5, 5, 1, 3])
    np.testing.assert_array_equal(samples.finished, [True, True, False, True, True, True])
    np.testing.assert_array_equal([row[mask][-1] for row, mask in zip(np.asarray(samples.tokens), np.asarray(
        samples.mask), strict=True)], [1, 5, 2, 5, 1, 5])
    np.testing.assert_array_equal(np.asarray(samples.tokens)[~np.asarray(samples.mask)], pad)
    assert (np.asarray(samples.rollout_logp)[np.asarray(samples.mask)] != 0).all()


class Watched(Network):
    """Tells which decode steps ran."""

    def decode(self, parameters, prompt_cache, cache, token, lengths, now, table):
        jax.debug.callback(lambda n: STEPS.append(int(n)), now)
        return super().decode(parameters, prompt_cache, cache, token, lengths, now, table)


STEPS = []


@pytest.mark.parametrize(("ends", "steps"), [([0, 2, 1, 2, 0, 1], 3), ([0] * 6, 1), ([0, 1, 2, 3, 4, 9], T)])
def test_decoding_stops_with_the_last_answer(ends, steps):
    script = np.full((P * G, T), 3)
    for row, end in enumerate(ends):
        script[row, end:end + 1] = END
    STEPS.clear()
    run = jax.jit(make(Rollout(G), Watched(NETWORK.shape)))
    jax.block_until_ready(run(UNIFORM_POLICY, prompts(), scripted(script), jnp.int32(0)))
    jax.effects_barrier()
    assert sorted(set(STEPS)) == list(range(steps))


def test_replicas_wait_for_each_other_and_change_nothing(drawn):
    """Under a named axis the loop runs until every replica's answers have ended, in one loop for all."""
    other = np.full((P * G, T), END)
    numbers = jnp.stack([scripted(SCRIPT), scripted(other)])
    run = jax.vmap(make(Rollout(G), axis="seed"), (None, None, 0, None), axis_name="seed")
    arguments = (UNIFORM_POLICY, prompts(), numbers, jnp.int32(0))
    both = jax.jit(run)(*arguments)
    for i in range(2):
        alone = drawn(UNIFORM_POLICY, prompts(), numbers[i], jnp.int32(0))
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a, i=i: a[i], both), alone)
    (loop,) = (e for e in equations(jax.make_jaxpr(run)(*arguments).jaxpr) if e.primitive.name == "while")
    assert loop.params["cond_jaxpr"].out_avals[0].shape == ()  # a batched predicate would select every cache


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 3, "temperature": 1.3}], ids=str)
def test_tokens_and_their_numbers_are_those_of_the_whole_text(setting):
    """The oracle reads prompt and completion as one text and draws from the same random numbers."""
    asked, numbers = prompts(), decode.make_uniforms(jax.random.key(1), P, G, T)
    samples = jax.jit(make(Rollout(G, **setting)))(PARAMETERS, asked, numbers, jnp.int32(0))
    rollout = Rollout(**setting)
    for n in range(P * G):
        prompt = np.asarray(asked.tokens)[n // G, :asked.lengths[n // G]]
        length = int(samples.mask[n].sum())
        every = oracle.logp(NETWORK.shape, oracle.float64(PARAMETERS), prompt, np.asarray(samples.tokens)[n],
                            temperature=rollout.temperature)
        for t in range(length):
            p = np.exp(every[t])
            if rollout.truncated:
                keep = np.asarray(unpack_support(samples.support[n, t], V))
                least = p[keep].min()
                assert (p[~keep] < least).all()
                if rollout.top_k:
                    assert keep.sum() == rollout.top_k
                else:
                    assert p[keep].sum() >= rollout.top_p > p[keep].sum() - least
                p = np.where(keep, p, 0) / p[keep].sum()
            token = int(samples.tokens[n, t])
            u = float(numbers[n // G, n % G, t])
            assert p[:token].sum() - 1e-5 <= u <= p[:token + 1].sum() + 1e-5
            np.testing.assert_allclose(samples.rollout_logp[n, t], np.log(p[token]), atol=1e-4)
            np.testing.assert_allclose(samples.rollout_entropy[n, t], -(p[p > 0] * np.log(p[p > 0])).sum(), atol=1e-4)


def test_greedy_takes_the_most_probable_token_each_time():
    asked = prompts()
    samples = jax.jit(make(Rollout(1, temperature=0.0)))(
        PARAMETERS, asked, decode.make_uniforms(jax.random.key(0), P, 1, T), jnp.int32(0))
    for p in range(P):
        prompt = np.asarray(asked.tokens)[p, :asked.lengths[p]]
        every = oracle.logp(NETWORK.shape, oracle.float64(PARAMETERS), prompt, np.asarray(samples.tokens)[p])
        length = int(samples.mask[p].sum())
        np.testing.assert_array_equal(samples.tokens[p, :length], every.argmax(axis=1)[:length])
    np.testing.assert_array_equal(samples.rollout_logp, 0.0)


def test_a_sample_is_the_same_whatever_is_drawn_beside_it(drawn):
    """Sample g of prompt p: in a larger group, with other prompts around it, with more prompts, with a longer budget."""
    key, asked = jax.random.key(5), prompts()
    few = drawn(PARAMETERS, asked, decode.make_uniforms(key, P, G, T), jnp.int32(0))
    wide, longer = G + 3, T + 2
    more = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), asked, prompts(2, seed=9))
    more = dataclasses.replace(more, tokens=more.tokens.at[1].set(jnp.array([6, 5, 4, 3])))
    run = jax.jit(make(Rollout(wide), completion_length=longer))
    many = run(PARAMETERS, more, decode.make_uniforms(key, P + 2, wide, longer), jnp.int32(0))
    few, many = (np.asarray(s.tokens).reshape(-1, g, s.tokens.shape[1]) for s, g in ((few, G), (many, wide)))
    for p in (0, 2):
        np.testing.assert_array_equal(many[p, :G, :T], few[p])


def test_no_two_steps_samples_or_prompts_share_their_random_numbers():
    key = jax.random.key(5)
    numbers = np.stack([decode.make_uniforms(jax.random.fold_in(key, i), P, G, T) for i in range(3)])
    assert len(np.unique(numbers)) == numbers.size
    assert 0 <= numbers.min() and numbers.max() < 1


def test_a_group_that_is_too_large_to_number_is_refused():
    with pytest.raises(ValueError, match="group_size=5000: at most 4096"):
        decode.make_uniforms(jax.random.key(0), 1, 5000, 1)


def equations(jaxpr):
    """Every equation of a program, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda a: hasattr(a, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_prompts_cache_is_never_copied_for_the_group(scan_layers):
    """No array of the whole program has the prompt's positions, the group and a head's numbers together."""
    s, g, e = 11, 5, 14
    shape = Shape(vocabulary=V, width=16, layers=2, heads=2, key_heads=1, head_size=e, inner=24, scan_layers=scan_layers)
    network, asked = Network(shape), jax.tree.map(lambda a: a, prompts())
    asked = dataclasses.replace(asked, tokens=jnp.ones((P, s), jnp.int32))
    parameters = network.initialise(jax.random.key(0))

    def copies(function, *arguments):
        shapes = [v.aval.shape for q in equations(jax.make_jaxpr(function)(*arguments).jaxpr) for v in q.outvars]
        assert any(s in shape and e in shape for shape in shapes)
        return [shape for shape in shapes if {s, g, e} <= set(shape)]

    numbers = decode.make_uniforms(jax.random.key(1), P, g, T)
    assert copies(make(Rollout(g), network), parameters, asked, numbers, jnp.int32(0)) == []
    copied = copies(lambda p, t: jax.tree.map(lambda a: jnp.stack([a] * g), network.prefill(p, t)), parameters, asked.tokens)
    assert copied  # the search finds a copy where there is one
