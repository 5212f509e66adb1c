import functools
import math

import contract
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode_attention import blocks, forward, kernel, reference
from kernels_pallas.decode_attention.blocks import Blocks
from kernels_pallas.decode_attention.op import decode_attention
from kernels_pallas.decode_attention.reference import Cache
from kernels_pallas.prefix_attention.visibility import Options

WALK = Blocks(heads=2, rows=16, tile=8, splits=1, walk=True)
CUTS = {"split": Blocks(heads=1, rows=16, tile=16, splits=2, walk=False), "walk": WALK}
WAYS = ["xla", "ragged", *CUTS]
OPTIONS = {"plain": Options(), "all options": Options(scale=0.3, soft_cap=1.5, window=9)}
with_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(params=WAYS)
def implementation(request, monkeypatch):
    """Every way to cut the work, with tiles so small that little caches have many."""
    monkeypatch.setattr(blocks, "TILE_ON_CPU", 8)
    if request.param in CUTS:
        monkeypatch.setattr(blocks, "choose", lambda *shape: CUTS[request.param])
        return "pallas"
    return request.param


def _arrays(g=3, p=2, r=2, k=2, e=4, s=37, t=21, dtype=jnp.float32):
    """Queries, own caches and prompts' caches, with garbage behind the lengths; one prompt shows nothing."""
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)
    lengths, prompt_lengths = random.integers(1, t + 1, (g, p)), random.integers(1, s + 1, p)
    prompt_lengths[0], lengths[0, 0], lengths[-1, -1] = 0, 1, t

    def cache(lengths, positions):
        key, value = normal(*lengths.shape, k, positions, e), normal(*lengths.shape, k, positions, e)
        hidden = np.arange(positions) >= lengths[..., None]
        for a in key, value:
            np.moveaxis(a, -3, -2)[hidden] = 1e4
        return Cache(jnp.asarray(key, dtype), jnp.asarray(value, dtype), jnp.asarray(lengths, jnp.int32))

    return jnp.asarray(normal(g, p, k * r, e), dtype), cache(lengths, t), cache(prompt_lengths, s)


def _loops(query, own, prompt, options=Options()):
    """Oracle: the definition in loops over Python floats (float64), from the formula alone.

    The text is the prompt's shown positions and then the own ones; the query is the last of it.
    """
    scale, cap = 1 / math.sqrt(query.shape[3]) if options.scale is None else options.scale, options.soft_cap
    query, *caches = jax.tree.map(lambda a: np.asarray(a, np.float64), (query, prompt, own))
    found = np.zeros_like(query)
    for g, p, h in np.ndindex(query.shape[:3]):
        head = h // (query.shape[2] // own.key.shape[2])
        text = zip(caches, [p, (g, p)], strict=True)
        pairs = [(cache.key[at][head, j], cache.value[at][head, j]) for cache, at in text
                 for j in range(int(cache.lengths[at]))]
        pairs = [pair for back, pair in enumerate(reversed(pairs)) if options.window is None or back < options.window]
        dots = [scale * math.fsum(a * b for a, b in zip(query[g, p, h], key, strict=True)) for key, _ in pairs]
        weights = [math.exp(x if cap is None else cap * math.tanh(x / cap)) for x in dots]
        for e in range(query.shape[3]):
            mixed = math.fsum(w * v[e] for w, (_, v) in zip(weights, pairs, strict=True))
            found[g, p, h, e] = mixed / math.fsum(weights)
    return found


def _run(name, *arrays, options=Options()):
    return jax.jit(functools.partial(decode_attention, options=options, implementation=name))(*arrays)


def _close(found, expected, relative=1e-5):
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(expected, np.float32), rtol=relative,
                               atol=relative * np.abs(expected).max())


@pytest.mark.parametrize("r, k, s, t", [(2, 2, 37, 21), (1, 4, 16, 16), (3, 2, 5, 40)])
def test_value_is_that_of_loops_over_floats(implementation, r, k, s, t):
    arrays = _arrays(r=r, k=k, s=s, t=t)
    _close(_run(implementation, *arrays), _loops(*arrays))


@pytest.mark.parametrize("options", [
    Options(scale=0.3, soft_cap=0.5), Options(0.3, 1.5, 1), Options(soft_cap=0.5, window=20), Options(window=30),
    Options(scale=0.3, window=57)])
def test_value_with_options_is_that_of_loops_over_floats(implementation, options):
    """Of 21 own positions and 37 of the prompt: windows that leave the prompt unseen, and that cross the border."""
    arrays = _arrays()
    _close(_run(implementation, *arrays, options=options), _loops(*arrays, options))


@pytest.mark.parametrize("options", [Options(), Options(0.7, 2.0, 3)])
def test_reference_is_loops_over_floats_and_its_gradient_the_central_difference(options):
    query, own, prompt = _arrays(g=2, r=2, k=1, e=3, s=4, t=3)
    _close(_run("reference", query, own, prompt, options=options), _loops(query, own, prompt, options))
    credit = np.random.default_rng(1).normal(size=query.shape)
    arrays = query, own.key, own.value, prompt.key, prompt.value

    def build(query, key, value, prompt_key, prompt_value):
        return query, Cache(key, value, own.lengths), Cache(prompt_key, prompt_value, prompt.lengths)

    attend = functools.partial(decode_attention, options=options, implementation="reference")
    gradient = jax.grad(lambda *a: (credit * attend(*build(*a))).sum(), range(5))
    for which, slope in enumerate(jax.jit(gradient)(*arrays)):
        point = [np.asarray(a, np.float64) for a in arrays]
        for index in list(np.ndindex(slope.shape))[::5]:
            ends = []
            for sign in 1, -1:
                moved = [a.copy() for a in point]
                moved[which][index] += sign * 1e-5
                ends.append((credit * _loops(*build(*moved), options)).sum())
            np.testing.assert_allclose(slope[index], (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-5)


def _case(implementation, options, **sizes) -> contract.Case:
    """Rows are samples, each of every prompt; the middle one is silent: it sees nothing of its own."""
    query, own, prompt = _arrays(**sizes)
    own = own._replace(lengths=own.lengths.at[1].set(0))
    silent = np.arange(query.shape[0]) == 1

    def with_name(name):
        def call(query, key, value, prompt_key, prompt_value, lengths, prompt_lengths):
            caches = Cache(key, value, lengths), Cache(prompt_key, prompt_value, prompt_lengths)
            return decode_attention(query, *caches, options=options, implementation=name),

        return call

    return contract.Case(
        op=with_name(implementation), reference=with_name("reference"), floats=(query, *own[:2], *prompt[:2]),
        others=(own.lengths, prompt.lengths), silent=silent, row_inputs=(True, True, True, False, False))


@with_options
def test_contract(implementation, options):
    contract.check(_case(implementation, options))


@with_options
@pytest.mark.parametrize("name", ["xla", "pallas"])
def test_contract_in_bfloat16(name, options):
    contract.check(_case(name, options, dtype=jnp.bfloat16))


@pytest.mark.parametrize("name", ["xla", "pallas"])
@pytest.mark.parametrize("window", [None, 100, 200])
def test_value_at_the_real_block_sizes(name, window):
    arrays, options = _arrays(e=16, s=300, t=130), Options(window=window)
    _close(_run(name, *arrays, options=options), _loops(*arrays, options))


def test_a_query_that_sees_nothing_gets_zero_and_gives_no_gradient(implementation):
    query, own, prompt = _arrays()
    own, prompt = (cache._replace(lengths=jnp.zeros_like(cache.lengths)) for cache in (own, prompt))

    @jax.jit
    def run(query, key):
        call = functools.partial(decode_attention, implementation=implementation)
        found, pull = jax.vjp(lambda q, k: call(q, own._replace(key=k), prompt), query, key)
        return found, *pull(jnp.ones_like(found))

    assert all((array == 0).all() for array in run(query, own.key))


@pytest.mark.parametrize("sizes, options", [({}, Options()), ({"s": 13, "t": 6}, OPTIONS["all options"])])
def test_lengths_beyond_the_cache_show_all_of_it(implementation, sizes, options):
    query, own, prompt = _arrays(**sizes)
    whole, beyond = ([c._replace(lengths=jnp.full_like(c.lengths, c.key.shape[-2] + more)) for c in (own, prompt)]
                     for more in (0, 100))
    _close(*(_run(name, query, *c, options=options) for name, c in ((implementation, beyond), ("reference", whole))))


def test_scores_far_beyond_float32s_exponential_are_finite(implementation):
    query, own, prompt = _arrays()
    expected = _run("reference", 1e3 * query, own, prompt)
    assert np.isfinite(expected).all()
    _close(_run(implementation, 1e3 * query, own, prompt), expected)


def test_no_group_axis_and_two_are_one_group(implementation):
    """Of 10 samples, whose 20 rows are two blocks of a kernel."""
    (query, own, prompt), options = _arrays(g=10), OPTIONS["all options"]
    call = functools.partial(_run, implementation, options=options)
    expected = _run("reference", query, own, prompt, options=options)
    _close(call(query[1], jax.tree.map(lambda a: a[1], own), prompt), expected[1])
    two = lambda a: a.reshape(2, 5, *a.shape[1:])
    _close(call(two(query), jax.tree.map(two, own), prompt), two(expected))


# The vmap rule.


def _products(jaxpr) -> list:
    """Shapes of the operands of every dot_general, and of the arguments of every pallas_call, inner jaxprs included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "pallas_call"):
            found.append([v.aval.shape for v in equation.invars])
        if equation.primitive.name != "pallas_call":
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                found += _products(inner)
    return found


def _over_samples(name, options):
    """A sample at a time, mapped over the samples with the prompt's cache held, as the rollout does."""
    return jax.vmap(functools.partial(decode_attention, options=options, implementation=name), in_axes=(0, 0, None))


@with_options
@pytest.mark.parametrize("name", ["xla", "pallas"])
def test_a_vmap_over_samples_asks_the_prompt_once_for_all(name, options):
    """P, G, H, K, E, S, T = 2, 3, 4, 2, 16, 40, 24: the prompt's product has the 6 rows of a group (16 in a kernel)."""
    arrays = _arrays(s=40, t=24, e=16)
    shapes = _products(jax.make_jaxpr(_over_samples(name, options))(*arrays).jaxpr)
    prompt = [shape for shape in shapes if (2, 2, 40, 16) in shape]
    assert len(prompt) == {"xla": 2, "pallas": 1}[name]  # scores and mixture, or the kernel
    rows = {(2, 2, 6, 16), (2, 2, 6, 40)} if name == "xla" else {(2, 2, 16, 16)}
    assert all(rows & set(shape) for shape in prompt)
    own = [shape for shape in shapes if (3, 2, 2, 24, 16) in shape]
    assert len(own) == len(prompt) and len(shapes) == len(own) + len(prompt)
    assert not any((3, 2, 2, 40, 16) in shape for shape in shapes), "the prompt's cache was copied"


@with_options
@pytest.mark.parametrize("name", ["xla", "pallas"])
def test_a_vmap_over_replicas_keeps_the_group_in_one_product(name, options):
    arrays = jax.tree.map(lambda a: jnp.stack([a] * 5), _arrays(s=40, t=24, e=16))
    shapes = _products(jax.make_jaxpr(jax.vmap(_over_samples(name, options)))(*arrays).jaxpr)
    assert len([shape for shape in shapes if (5, 2, 2, 40, 16) in shape]) == {"xla": 2, "pallas": 1}[name]
    assert not any((5, 3, 2, 2, 40, 16) in shape or (3, 5, 2, 2, 40, 16) in shape for shape in shapes)


@with_options
def test_a_vmap_over_samples_is_the_group(implementation, options):
    arrays = _arrays()
    _close(jax.jit(_over_samples(implementation, options))(*arrays), _run("reference", *arrays, options=options))


@with_options
@pytest.mark.parametrize("name", ["xla", "ragged", "pallas"])
def test_every_nesting_of_vmaps_is_right(name, options):
    """Also those that no rollout has: the prompt's cache mapped, or nothing of a sample but its query or lengths."""
    query, own, prompt = _arrays(e=16)
    copied = jax.tree.map(lambda a: jnp.stack([a] * 3), prompt)
    first = jax.tree.map(lambda a: a[0], own)
    lengths = first._replace(lengths=jnp.arange(3)[:, None] + jnp.array([[1, 2]]))
    last = jax.tree.map(lambda a: jnp.moveaxis(a, 0, -1), (query, own))

    def nestings(name):
        call = functools.partial(decode_attention, options=options, implementation=name)
        return (jax.vmap(call)(query, own, copied), jax.vmap(call, (0, None, None))(query, first, prompt),
                jax.vmap(call, (None, Cache(None, None, 0), None))(query[0], lengths, prompt),
                jax.vmap(call, (-1, -1, None), 1)(*last, prompt))

    run = jax.jit(nestings, static_argnums=0)
    for found, expected in zip(run(name), run("reference"), strict=True):
        _close(found, expected)


@with_options
def test_inside_a_while_loop_over_replicas(implementation, options):
    """As a rollout of seeds runs: vmap over samples in the loop's body, a named vmap around the loop."""
    query, own, prompt = _arrays()
    replicas = jax.tree.map(lambda a: jnp.stack([a, a]), (query, own, prompt))

    def draw(step, query, own, prompt):
        def body(carry):
            now, _, out = carry
            grown = own._replace(lengths=jnp.minimum(own.lengths, now + 1))
            return now + 1, out, out + step(query, grown, prompt)

        def unfinished(carry):
            return jax.lax.psum((carry[0] < 3).astype(jnp.int32), "seed") > 0

        return jax.lax.while_loop(unfinished, body, (0, query, jnp.zeros_like(query)))[2]

    run = lambda step: jax.jit(jax.vmap(functools.partial(draw, step), axis_name="seed"))(*replicas)
    expected = run(functools.partial(decode_attention, options=options, implementation="reference"))
    _close(run(_over_samples(implementation, options)), expected)


@with_options
@pytest.mark.parametrize("name", ["reference", "xla", "ragged"])
def test_inside_shard_map(name, options):
    query, own, prompt = _arrays(s=80, t=70)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    first, second = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec(None, "data")
    for check_vma in True, False:
        call = jax.shard_map(functools.partial(decode_attention, options=options, implementation=name), mesh=mesh,
                             in_specs=(second, second, first), out_specs=second, check_vma=check_vma)
        _close(jax.jit(call)(query, own, prompt), _run("reference", query, own, prompt, options=options))


@with_options
def test_pallas_runs_a_kernel_in_both_cuts(monkeypatch, options):
    attend = functools.partial(decode_attention, options=options, implementation="pallas")
    for cut in CUTS.values():
        monkeypatch.setattr(blocks, "choose", lambda *shape, cut=cut: cut)
        contract.check_runs_kernel(attend, *_arrays())


@with_options
def test_what_stands_behind_the_caches_is_never_read(monkeypatch, options):
    """Tiles of 8 of 37 and 21 positions: interpreted, a block reads NaN behind the end of its array."""
    monkeypatch.setattr(blocks, "choose", lambda *shape: WALK)
    query, own, prompt = _arrays()
    whole = [c._replace(lengths=jnp.full_like(c.lengths, c.key.shape[-2])) for c in (own, prompt)]
    assert np.isfinite(_run("pallas", query, *whole, options=options)).all()


@pytest.mark.parametrize("cut", CUTS)
def test_tiles_behind_the_length_do_no_work(monkeypatch, cut):
    """A tile that is worked on would turn its NaN into the sums, also where another sequence still has tiles."""
    monkeypatch.setattr(blocks, "choose", lambda *shape: CUTS[cut])
    query, own, prompt = _arrays(s=48, t=48)

    def poisoned(cache):
        lengths = jnp.full_like(cache.lengths, 10).at[..., 0].set(48)
        clean = cache._replace(lengths=lengths)
        visible_tiles = cache._replace(lengths=jnp.where(lengths == 48, 48, 16))
        behind = ~reference.seen(visible_tiles)[..., None, :, None]
        return clean, clean._replace(key=jnp.where(behind, jnp.nan, cache.key),
                                     value=jnp.where(behind, jnp.nan, cache.value))

    (own, own_poisoned), (prompt, prompt_poisoned) = poisoned(own), poisoned(prompt)
    _close(_run("pallas", query, own_poisoned, prompt_poisoned), _run("reference", query, own, prompt))


@pytest.mark.parametrize("lengths", [[[48, 4], [30, 2], [48, 6]], [[48, 40], [30, 33], [48, 35]]])
def test_tiles_outside_the_window_do_no_work(implementation, lengths):
    """A tile that is worked on would turn its NaN into the sums. XLA's loop is one for all sequences, with no gaps.

    A window of 10: the first prompt, or both, are not seen at all.
    """
    (query, own, prompt), options = _arrays(s=48, t=48), Options(window=10)
    own, prompt = (c._replace(lengths=jnp.array(n)) for c, n in ((own, lengths), (prompt, [48, 40])))
    place, own_lengths = np.arange(48), np.array(lengths)[..., None]
    near = (place < own_lengths) & (place >= own_lengths - 10)
    far = (place < [[48], [40]]) & (place - [[48], [40]] >= own_lengths - 10)

    def poisoned(cache, seen):
        tile = CUTS["split"].tile
        worked = np.repeat(seen.reshape(*seen.shape[:-1], -1, tile).any(axis=-1), tile, axis=-1)
        if implementation in ("xla", "ragged"):
            some = worked.any(axis=tuple(range(worked.ndim - 1)), keepdims=True)
            worked = np.logical_or.accumulate(some, -1) & np.logical_or.accumulate(some[..., ::-1], -1)[..., ::-1]
        poison = lambda a: jnp.where(worked[..., None, :, None], a, jnp.nan)
        return cache._replace(key=poison(cache.key), value=poison(cache.value))

    found = _run(implementation, query, poisoned(own, near), poisoned(prompt, far.any(axis=0)), options=options)
    _close(found, _run("reference", query, own, prompt, options=options))


@pytest.mark.parametrize("name", ["reference", "xla", "pallas"])
def test_a_window_that_hides_nothing_costs_nothing(name):
    arrays = _arrays(s=48, t=24)
    program = lambda window: jax.jit(functools.partial(
        decode_attention, options=Options(window=window), implementation=name)).lower(*arrays).as_text()
    assert program(72) == program(10**10) == program(None) != program(71)


def test_sums_of_nothing_are_neutral(implementation):
    query, own, prompt = _arrays()
    sums = {"xla": forward.tiled, "ragged": forward.ragged, "pallas": kernel.sums}[implementation]
    q = reference.by_key_head(query, 2)
    some = jax.jit(sums)(q, own)
    without = jax.jit(sums)(q, own._replace(lengths=jnp.zeros_like(own.lengths)))
    ahead = jax.jit(functools.partial(sums, options=Options(window=9)))(q, own, jnp.full((3, 2, 2), 21))
    for none in without, ahead:
        assert (none.mixed == 0).all() and (none.total == 0).all()
        for x, y in zip(forward.merged(none, some), some, strict=True):
            np.testing.assert_array_equal(x, y)


def test_what_is_wrong_is_said(monkeypatch):
    query, own, prompt = _arrays()
    with pytest.raises(ValueError, match="allowed are None and .*pallas.*reference.*xla"):
        decode_attention(query, own, prompt, implementation="fast")
    with pytest.raises(ValueError, match="own cache must have"):
        decode_attention(query, own._replace(lengths=own.lengths[:1]), prompt)
    with pytest.raises(ValueError, match="own cache must have"):
        decode_attention(query[0], own, prompt)
    with pytest.raises(ValueError, match="prompt cache must have"):
        decode_attention(query, own, prompt._replace(value=prompt.value[..., :2]))
    with pytest.raises(ValueError, match="must divide"):
        decode_attention(query[:, :, :3], own, prompt)
    for options, message in ((Options(window=0), "window must be positive or None, not 0"),
                             (Options(soft_cap=-1.0), "soft_cap must be positive"), (Options(scale=0.0), "scale must")):
        with pytest.raises(ValueError, match=f"options.{message}"):
            decode_attention(query, own, prompt, options=options)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=contract.DEVICES["cuda"])
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match="powers of two.*Ask for 'xla'"):
        decode_attention(query, own, prompt, implementation="pallas")
