import functools

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.prefix_attention import blocks, joint, tiles, visibility, xla
from kernels_pallas.prefix_attention.op import prefix_attention
from kernels_pallas.prefix_attention.operands import by_key_head, by_row
from kernels_pallas.prefix_attention.visibility import Options, Seen

IMPLEMENTATIONS = "reference", "xla", "pallas"
P, G, S, T, H, K, E = 2, 3, 37, 21, 4, 2, 6
LENGTHS = jnp.array([21, 5, 0, 20, 17, 1], jnp.int32)
SEGMENT = jnp.array([[0] * 7 + [1] * 9 + [-1] * 5, [0] * 21, [-1] * 21,
                     [3] * 4 + [-1] * 2 + [2] * 15, [0] + [1] * 20, [5] * 20 + [-1]], jnp.int32)
WHOLE = Seen(jnp.array([30, 37], jnp.int32))
CAPPED = Options(scale=0.7, soft_cap=1.5)
VISIBLE = {
    "all": WHOLE,
    "no_prompt, lengths": Seen(jnp.array([0, 37], jnp.int32), LENGTHS),
    "window, cap, scale": Seen(jnp.array([3, 36], jnp.int32), options=CAPPED._replace(window=9)),
    "packed, lengths, everything": Seen(jnp.array([20, 32], jnp.int32), LENGTHS, SEGMENT, CAPPED._replace(window=7)),
}
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
fast = pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks small enough that little arrays have many: 3 tiles of queries in XLA, 2 x 3 tiles in the kernels."""
    monkeypatch.setattr(blocks, "QUERY_TILE", 8)
    monkeypatch.setattr(blocks, "GPU_TILE", 16)


def shapes(dtype=jnp.float32, p=P, g=G, s=S, t=T, h=H, k=K, e=E):
    """Of query, key, value, prompt_key and prompt_value."""
    sizes = (p * g, t, h, e), (p * g, t, k, e), (p * g, t, k, e), (p, s, k, e), (p, s, k, e)
    return tuple(jax.ShapeDtypeStruct(size, dtype) for size in sizes)


def arrays(dtype=jnp.float32, **sizes):
    random = np.random.default_rng(0)
    return tuple(jnp.asarray(random.normal(size=x.shape), dtype) for x in shapes(**sizes))


def oracle(query, key, value, prompt_key, prompt_value, seen):
    """One softmax per query over the list of keys that it sees, in float64, from the definition alone."""
    arrays64 = [np.asarray(x, np.float64) for x in (query, key, value, prompt_key, prompt_value)]
    query, key, value, prompt_key, prompt_value = arrays64
    (n, t, h, e), (p, _, k) = query.shape, prompt_key.shape[:3]
    scale = e**-0.5 if seen.options.scale is None else seen.options.scale
    cap, window = seen.options.soft_cap, seen.options.window
    out = np.zeros_like(query)
    for row, now, head in np.ndindex(n, t, h):
        prompt, j, shown = row // (n // p), head // (h // k), int(seen.prompt[row // (n // p)])
        segment = np.zeros(t, int) if seen.segment is None else np.asarray(seen.segment[row])
        if segment[now] < 0 or (seen.lengths is not None and now >= seen.lengths[row]):
            continue
        mine = [u for u in range(now + 1) if segment[u] == segment[now]]
        keys = [(i, prompt_key[prompt, i, j], prompt_value[prompt, i, j]) for i in range(shown)]
        keys += [(shown + i, key[row, u, j], value[row, u, j]) for i, u in enumerate(mine)]
        here = keys[-1][0]
        keys = [(b, c) for a, b, c in keys if window is None or here - a < window]
        scores = np.array([scale * (query[row, now, head] @ b) for b, _ in keys])
        weight = np.exp(scores if cap is None else cap * np.tanh(scores / cap))
        out[row, now, head] = sum(w * c for w, (_, c) in zip(weight, keys, strict=True)) / weight.sum()
    return out


@functools.cache
def _reference_value_and_gradient(name):
    seen = VISIBLE[name]
    return jax.tree.map(np.asarray, value_and_gradient(arrays(), seen, "reference"))


def value_and_gradient(given, seen, implementation, weight=None):
    """The output and the cotangents of the five arrays for fixed random cotangents of the output."""
    weight = np.random.default_rng(9).normal(size=given[0].shape) if weight is None else weight

    @jax.jit
    def run(given):
        out, pull = jax.vjp(lambda *x: prefix_attention(*x, seen, implementation), *given)
        return out, pull(jnp.asarray(weight, out.dtype))

    return run(given)


def close(found, expected, relative=1e-5):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=relative, atol=relative * np.abs(y).max(initial=0))


@pytest.mark.parametrize("name", VISIBLE)
def test_value_is_that_of_loops_over_keys(name):
    found = _reference_value_and_gradient(name)[0]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, oracle(*arrays(), VISIBLE[name]), rtol=1e-5, atol=1e-5)


def test_gradient_of_the_reference_is_the_central_difference_in_float64():
    seen = Seen(jnp.array([0, 3]), jnp.array([4, 2, 3, 4]), jnp.array([[0, 0, 1, 1]] * 4), Options(0.7, 2.0, 3))
    given = arrays(p=2, g=2, s=3, t=4, h=4, k=2, e=2)
    weight = np.random.default_rng(1).normal(size=given[0].shape)
    found = value_and_gradient(given, seen, "reference", weight)[1]
    point = [np.asarray(x, np.float64) for x in given]
    for which, gradient in enumerate(found):
        for index in list(np.ndindex(point[which].shape))[::13]:
            step = np.zeros_like(point[which])
            step[index] = 1e-5
            up, down = ([x + sign * step if i == which else x for i, x in enumerate(point)] for sign in (1, -1))
            difference = (weight * (oracle(*up, seen) - oracle(*down, seen))).sum() / 2e-5
            np.testing.assert_allclose(gradient[index], difference, rtol=1e-4, atol=1e-5)


@fast
@pytest.mark.parametrize("name", [name for name in VISIBLE if name != "all"])
def test_value_and_gradient_are_the_reference_s(name, implementation):
    close(value_and_gradient(arrays(), VISIBLE[name], implementation), _reference_value_and_gradient(name))


@pytest.mark.parametrize("keep", [0, 1 << 30])
def test_kept_and_recomputed_weights_agree(monkeypatch, keep):
    monkeypatch.setattr(blocks, "QUERY_TILE", 100)
    monkeypatch.setattr(blocks, "KEPT_WEIGHTS", keep)
    given = by_key_head(*arrays())
    intervals = visibility.intervals(WHOLE, S, G, T)
    assert isinstance(xla.attend(given, intervals, Options())[1], joint.Kept) == (keep > 0)
    close(value_and_gradient(arrays(), WHOLE, "xla"), _reference_value_and_gradient("all"))


@fast
def test_contract(implementation):
    """Row 2 is empty and holds large garbage."""
    seen = VISIBLE["packed, lengths, everything"]
    call = lambda name: lambda *x: (prefix_attention(*x[:5], Seen(*x[5:], seen.options), name),)
    contract.check(contract.Case(
        op=call(implementation), reference=call("reference"),
        floats=tuple(x.at[2].set(1e30) if i < 3 else x for i, x in enumerate(arrays())),
        others=(seen.prompt, seen.lengths, seen.segment), silent=np.arange(P * G) == 2,
        row_inputs=(True, True, True, False, False)))


@fast
def test_bfloat16(implementation):
    given, seen = arrays(jnp.bfloat16), VISIBLE["no_prompt, lengths"]
    found = value_and_gradient(given, seen, implementation)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    close(found, value_and_gradient(given, seen, "reference"), 2.0**-7)


@fast
def test_head_counts_and_sizes_that_are_no_power_of_two(implementation):
    given = arrays(p=1, g=2, s=18, t=17, h=6, k=2, e=20)
    seen = Seen(jnp.array([17]), jnp.array([17, 3]))
    close(value_and_gradient(given, seen, implementation), value_and_gradient(given, seen, "reference"))


def unshared(query, key, value, prompt_key, prompt_value, shown):
    """Plain causal attention over whole texts: each row behind its own copy of the prompt's first `shown` positions."""
    n, t, h, _ = query.shape
    group = n // prompt_key.shape[0]
    many = lambda x: jnp.repeat(x, group, axis=0)
    keys, values = (jnp.concatenate([many(a), b], axis=1) for a, b in ((prompt_key, key), (prompt_value, value)))
    s = prompt_key.shape[1]
    place = jnp.arange(s + t)[None, :]
    seen = (place < many(shown)[:, None]) | (place >= s)
    causal = place[:, None, :] <= s + jnp.arange(t)[None, :, None]
    keys, values = (jnp.repeat(x, h // key.shape[2], axis=2) for x in (keys, values))
    score = jnp.einsum("nthe,nuhe->nhtu", query, keys) / query.shape[-1]**0.5
    weight = jax.nn.softmax(jnp.where((seen[:, None, :] & causal)[:, None], score, -jnp.inf), axis=-1)
    return jnp.einsum("nhtu,nuhe->nthe", weight, values)


@every_implementation
def test_sharing_the_prompt_changes_nothing(implementation):
    """The prompt's gradient is the sum over the copies."""
    given = arrays()
    weight = jnp.asarray(np.random.default_rng(9).normal(size=given[0].shape), jnp.float32)
    alone, pull = jax.vjp(lambda *x: unshared(*x, WHOLE.prompt), *given)
    close(value_and_gradient(given, WHOLE, implementation), (alone, pull(weight)))
    copies = tuple(jnp.repeat(x, G, axis=0) for x in given[3:])
    each = Seen(jnp.repeat(WHOLE.prompt, G))
    out, cotangents = value_and_gradient((*given[:3], *copies), each, implementation)
    summed = tuple(x.reshape(P, G, *x.shape[1:]).sum(axis=1) for x in cotangents[3:])
    close((out, (*cotangents[:3], *summed)), (alone, pull(weight)))


@every_implementation
def test_completions_that_share_a_row_are_as_if_alone(implementation):
    lengths, prompt = (7, 9, 4), jnp.array([30])
    alone = arrays(p=1, t=9)
    start = np.cumsum((0, *lengths))
    pack = lambda x: jnp.concatenate([x[i, :n] for i, n in enumerate(lengths)] + [x[:1, 0]])[None]
    segment = jnp.array([[0] * 7 + [1] * 9 + [2] * 4 + [-1]])
    weight = np.random.default_rng(3).normal(size=alone[0].shape)
    options = Options(window=12)
    apart = value_and_gradient(alone, Seen(prompt, jnp.array(lengths), options=options), implementation, weight)
    given = tuple(pack(x) for x in alone[:3]) + alone[3:]
    together = value_and_gradient(given, Seen(prompt, segment=segment, options=options), implementation,
                                  np.asarray(pack(weight)))
    (out, cotangents), (out_apart, cotangents_apart) = together, apart
    for x, y in zip((out, *cotangents[:3]), (out_apart, *cotangents_apart[:3]), strict=True):
        for i, n in enumerate(lengths):
            close(x[0, start[i]:start[i] + n], y[i, :n])
    close(cotangents[3:], cotangents_apart[3:])


@every_implementation
def test_padding_may_hold_anything_and_gets_exactly_nothing(implementation):
    name = "packed, lengths, everything"
    seen = VISIBLE[name]
    kept = np.asarray(visibility.real(seen, P * G, T))
    shown = np.arange(S) < np.asarray(seen.prompt)[:, None]
    given = tuple(jnp.where((kept if i < 3 else shown)[..., None, None], x, (jnp.nan, jnp.inf, -1e38)[i % 3])
                  for i, x in enumerate(arrays()))
    weight = np.where(kept[..., None, None], np.random.default_rng(9).normal(size=given[0].shape), 1e4)
    out, cotangents = found = value_and_gradient(given, seen, implementation, weight)
    close(found, _reference_value_and_gradient(name))
    assert (np.asarray(out)[~kept] == 0).all()
    for x, heard in zip(cotangents, (kept, kept, kept, shown, shown), strict=True):
        assert (np.asarray(x)[~heard] == 0).all() and np.isfinite(x).all()


@every_implementation
def test_without_a_prompt_it_is_causal_attention(implementation):
    given, nothing = arrays(p=4, g=1, s=0), jnp.zeros(4, jnp.int32)
    out, cotangents = value_and_gradient(given, Seen(nothing), implementation)
    np.testing.assert_allclose(out, unshared(*given, nothing), rtol=1e-5, atol=1e-6)
    assert [x.shape for x in cotangents] == [x.shape for x in given]


@every_implementation
@pytest.mark.parametrize("options", [CAPPED._replace(window=9), Options(window=1)], ids=["window, cap, scale", "itself"])
def test_without_a_prompt_the_options_hold(implementation, options):
    """As a prompt attends to itself, in networks with windows and bounded scores."""
    given, seen = arrays(p=4, g=1, s=0), Seen(jnp.zeros(4, jnp.int32), options=options)
    out, cotangents = value_and_gradient(given, seen, implementation)
    expected, slopes = value_and_gradient(given, seen, "reference")
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    for found, slope in zip(cotangents, slopes, strict=True):
        np.testing.assert_allclose(found, slope, rtol=1e-4, atol=2e-5)


@every_implementation
def test_huge_scores_are_finite(implementation):
    found = jax.jit(lambda *x: prefix_attention(*x, WHOLE, implementation))(*(1e3 * x for x in arrays()))
    assert np.isfinite(found).all()


@pytest.mark.parametrize("name", VISIBLE)
def test_the_kernels_loop_over_exactly_the_tiles_of_which_something_is_seen(name):
    """But for gaps between the first and the last."""
    seen = VISIBLE[name]
    plan = tiles.plan(by_key_head(*arrays()), visibility.intervals(seen, S, G, T))
    near_from, far_from, far_to = np.moveaxis(np.asarray(plan.sees), 2, 0)
    tokens = plan.sees.shape[3]
    for keys, tile, found, sees in (
            (tokens, plan.tile.own, plan.near, lambda p, g, t, u: near_from[p, g, t] <= u <= t),
            (48, plan.tile.prompt, plan.far, lambda p, g, t, u: far_from[p, g, t] <= u < far_to[p, g, t])):
        expected = np.zeros(found.shape, bool)
        for p, g, t, u in np.ndindex(P, G, tokens, keys):
            expected[p, g, t // plan.tile.own, u // tile] |= sees(p, g, t, u)
        np.testing.assert_array_equal(found, expected)
        for meet in (expected, expected.swapaxes(2, 3)):
            bounds = np.asarray(tiles.ranges(jnp.asarray(meet))).reshape(*meet.shape[:3], 2)
            for index in np.ndindex(meet.shape[:3]):
                inside = np.flatnonzero(meet[index])
                assert tuple(bounds[index]) == ((inside[0], inside[-1] + 1) if inside.size else (0, 0))
    assert plan.far.sum() < plan.far.size and plan.near.sum() < plan.near.size


def test_the_layout_has_an_inverse():
    query, *others = arrays()
    np.testing.assert_array_equal(by_row(by_key_head(query, *others).query), query)


def test_it_is_a_kernel_that_runs():
    given = arrays(s=2, t=3)
    loss = lambda *x: prefix_attention(*x, Seen(jnp.array([1, 2])), "pallas").sum()
    contract.check_runs_kernel(loss, *given)
    contract.check_runs_kernel(jax.grad(loss, (0, 1, 2, 3, 4)), *given)


def _temporaries_and_flops(implementation, differentiate):
    given = shapes(p=1, g=2, s=64, t=1024, h=2, k=1, e=32)
    loss = lambda *x: (prefix_attention(*x[:5], Seen(jnp.array([64])), implementation) * x[5]).sum()
    run = jax.grad(loss, (0, 1, 2, 3, 4)) if differentiate else loss
    compiled = jax.jit(run).lower(*given, given[0]).compile()
    return compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]


def test_long_rows_need_less_memory_and_skip_what_is_ahead(monkeypatch):
    """XLA's own analysis: scores of half a square (and of the short prompt) instead of a whole one.

    The gradient makes the scores a second time: 7 products for the reference's 5. On a CPU jax 0.10 makes 6.
    """
    monkeypatch.setattr(blocks, "QUERY_TILE", 128)
    recomputed = jax.__version_info__ >= (0, 11)
    for differentiate, share in (False, 0.7), (True, 0.82 if recomputed else 0.7):
        memory, flops = _temporaries_and_flops("xla", differentiate)
        all_memory, all_flops = _temporaries_and_flops("reference", differentiate)
        assert memory < 0.8 * all_memory and flops < share * all_flops


MODELS = {"Qwen3-0.6B": (16, 8, 128), "Qwen3-4B and Llama-3.1-8B": (32, 8, 128), "Gemma-3-4B": (8, 4, 256),
          "Qwen2.5-0.5B": (14, 2, 64)}


def _model_shapes(h, k, e, dtype, g=8, s=1024, t=1024):
    numbers = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (2, 2 * g))
    return *shapes(dtype, p=2, g=g, s=s, t=t, h=h, k=k, e=e), *numbers


@pytest.fixture
def real_blocks(monkeypatch):
    monkeypatch.undo()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("model", MODELS)
def test_lowering(real_blocks, model, dtype, platform):
    options = Options(soft_cap=50.0, window=512) if model.startswith("Gemma") else Options()

    def loss(query, key, value, prompt_key, prompt_value, prompt, lengths):
        seen = Seen(prompt, lengths, options=options)
        out = prefix_attention(query, key, value, prompt_key, prompt_value, seen)
        return out.astype(jnp.float32).sum(), out

    both = jax.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True)
    contract.check_lowering(platform, both, *_model_shapes(*MODELS[model], dtype))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowering_of_packed_rows_of_odd_sizes_under_vmap(real_blocks, platform):
    def loss(query, key, value, prompt_key, prompt_value, prompt, segment):
        seen = Seen(prompt, segment=segment)
        return prefix_attention(query, key, value, prompt_key, prompt_value, seen).astype(jnp.float32).sum()

    *given, prompt, _ = _model_shapes(6, 2, 80, jnp.bfloat16, g=3, s=5, t=300)
    one = (*given, prompt, jax.ShapeDtypeStruct((6, 300), jnp.int32))
    several = tuple(jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in one)
    contract.check_lowering(platform, jax.vmap(jax.grad(loss, (0, 1, 2, 3, 4))), *several)


def test_what_does_not_fit_a_tpu_runs_in_xla_or_is_refused(real_blocks):
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=contract.DEVICES["tpu"])
    *given, prompt, lengths = _model_shapes(16, 8, 128, jnp.bfloat16, s=8192, t=8192)
    with jax.sharding.use_abstract_mesh(mesh):
        assert blocks.best(4096, 4096, 128, jnp.bfloat16) == "pallas"
        assert blocks.best(8192, 8192, 128, jnp.bfloat16) == "xla"
        with pytest.raises(ValueError, match="do not fit; allowed are None and 'xla'"):
            jax.eval_shape(lambda *x: prefix_attention(*x[:5], Seen(*x[5:]), "pallas"), *given, prompt, lengths)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=contract.DEVICES["cuda"])):
        assert blocks.best(8192, 8192, 256, jnp.float32) == "pallas"
    assert blocks.best(64, 64, 32, jnp.float32) == "xla"


@pytest.mark.parametrize("tokens, count", [(1, 1), (128, 1), (129, 2), (2048, 16), (2049, 16), (10_000, 16)])
def test_there_are_at_most_16_tiles_of_queries(real_blocks, tokens, count):
    assert -(-tokens // blocks.query_tile(tokens)) == count


def test_what_is_wrong_is_said():
    given = arrays()
    for change, seen, implementation, message in [
            (lambda x: x, WHOLE, "fast", "allowed are None and .*pallas.*reference.*xla"),
            (lambda x: (*(y[:5] for y in x[:3]), *x[3:]), WHOLE, None, "do not fit, with P a divisor of N"),
            (lambda x: (x[0][:, :, :3], *x[1:]), WHOLE, None, "and K of H"),
            (lambda x: x, Seen(LENGTHS), None, r"seen.prompt \[P\] must be integers \(2,\)"),
            (lambda x: x, Seen(jnp.array([1.0, 2.0])), None, "must be integers"),
            (lambda x: x, WHOLE._replace(lengths=LENGTHS[:1]), None, r"seen.lengths \[N\] must be integers \(6,\)"),
            (lambda x: x, WHOLE._replace(segment=LENGTHS), None, r"seen.segment \[N, T\]"),
            (lambda x: x, WHOLE._replace(options=Options(window=0)), None, "window must be positive or None, not 0"),
            (lambda x: x, WHOLE._replace(options=Options(soft_cap=-1.0)), None, "soft_cap must be positive")]:
        with pytest.raises(ValueError, match=message):
            prefix_attention(*change(given), seen, implementation)
