"""From hidden states to loss and gradients: one sweep, two steps and the definition are the same."""
import functools

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.linear_logprob import blocks as linear_blocks
from kernels_pallas.linear_logprob.support import pack_support
from kernels_pallas.linear_policy_loss import blocks
from kernels_pallas.linear_policy_loss.op import linear_policy_loss
from kernels_pallas.linear_policy_loss.reference import Batch, Head

IMPLEMENTATIONS = "xla", "two_step", "pallas"


def clipped(policy, given):
    """PPO's minimum with a tensor bound, k3 to a reference, and the ratio as an extra."""
    ratio = jnp.exp(policy["logp"] - given["rollout_logp"])
    away = given["reference_logp"] - policy["logp"]
    band = jnp.clip(ratio, 1 - given["low"], 1 + 0.3)
    loss = -jnp.minimum(ratio * given["advantage"], band * given["advantage"])
    return loss + given["beta"] * (jnp.exp(away) - 1 - away), {"ratio": ratio}


def of_entropy(policy, given):
    """A policy gradient with an entropy bonus of its own weight, and a critic's error."""
    return {"policy": -policy["logp"] * given["advantage"] - 0.1 * policy["entropy"] ** 2,
            "value": (policy["values"] - given["target"]) ** 2}


def of_rows(policy, given):
    """A sequence-level ratio."""
    change = jnp.where(given["mask"], policy["logp"] - given["rollout_logp"], 0.0)
    mean = change.sum(axis=1, keepdims=True) / jnp.maximum(given["mask"].sum(axis=1, keepdims=True), 1)
    return -jnp.exp(mean) * given["advantage"]


def arrays(gate, n=4, t=6, size=37, width=8, dtype=jnp.float32, truncated=False):
    """Floats (hidden, vocabulary, values) and the other arguments; row 1 and some tokens are masked."""
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    mask = random.random((n, t)) < 0.8
    mask[1] = False
    targets = random.integers(0, size, n * t).astype(np.int32)
    kept = random.random((n * t, size)) < 0.5
    kept[np.arange(n * t), targets] = True
    targets[~mask.reshape(-1)] = -100
    given = {"rollout_logp": -jnp.abs(normal(n, t)) - 3, "advantage": normal(n, t), "low": 0.1 + jnp.abs(normal(n, t)),
             "reference_logp": -jnp.abs(normal(n, t)) - 3, "beta": jnp.float32(0.04), "target": normal(n, t)}
    weight = jnp.abs(normal(n, t))
    floats = normal(n * t, width).astype(dtype), normal(size, width).astype(dtype), normal(n, t)
    rest = {"targets": jnp.asarray(targets), "support": pack_support(jnp.asarray(kept)) if truncated else None}
    share = jnp.asarray(mask / mask.sum(), jnp.float32)
    weights = {"policy": weight, "value": 0.3 * weight} if gate is of_entropy else weight
    return floats, rest, given, jnp.asarray(mask), weights, share


def call(gate, implementation, rest, given, mask, weight, share, hidden, vocabulary, values, soft_cap=None):
    head = Head(hidden, vocabulary, rest["targets"], 0.8, soft_cap, rest["support"])
    policy = {"values": values} if gate is of_entropy else {}
    return linear_policy_loss(gate, head, Batch(policy, given, mask, weight, share), implementation=implementation)


def value_and_gradient(gate, implementation, rest, *others, soft_cap=None):
    def loss(floats):
        found = call(gate, implementation, rest, *others, *floats, soft_cap=soft_cap)
        return found.loss, found

    return jax.value_and_grad(loss, has_aux=True)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(linear_blocks, "LOGITS", 200)  # six blocks of rows


def compare(found, expected, tolerance):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * np.abs(y).max(initial=0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gate, options", [
    (clipped, {}), (clipped, {"truncated": True}), (of_entropy, {}), (of_entropy, {"truncated": True, "soft_cap": 2.0}),
    (clipped, {"dtype": jnp.bfloat16}), (of_entropy, {"n": 5, "t": 7, "size": 33})],
    ids=["clip", "truncated", "entropy", "capped", "bfloat16", "odd"])
def test_loss_gradients_and_diagnostics_are_those_of_the_definition(small_blocks, gate, options, implementation):
    soft_cap = options.get("soft_cap")
    floats, *others = arrays(gate, **{name: x for name, x in options.items() if name != "soft_cap"})
    run = lambda name: jax.jit(value_and_gradient(gate, name, *others, soft_cap=soft_cap))(floats)
    (_, found), gradients = run(implementation)
    (_, expected), expected_gradients = run("reference")
    compare(found, expected, 1e-5 if floats[0].dtype == jnp.float32 else 2**-7)
    compare(gradients, expected_gradients, 1e-5 if floats[0].dtype == jnp.float32 else 2**-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_behind_the_mask_is_never_read(small_blocks, implementation):
    floats, rest, given, mask, weight, share = arrays(of_entropy)
    run = jax.jit(value_and_gradient(of_entropy, implementation, rest, given, mask, weight, share))
    (_, found), gradients = run(floats)
    noise = lambda x: jnp.where(mask, x, 7.0)
    hidden = jnp.where(mask.reshape(-1, 1), floats[0], 3.0)
    scrambled = {name: noise(x) if x.shape == mask.shape else x for name, x in given.items()}
    again = jax.jit(value_and_gradient(of_entropy, implementation, rest, scrambled, mask, weight, share))
    (_, other), other_gradients = again((hidden, floats[1], noise(floats[2])))
    compare((other, other_gradients), (found, gradients), 1e-6)
    silent = ~np.asarray(mask).reshape(-1)
    assert (np.asarray(gradients[0])[silent] == 0).all() and (np.asarray(gradients[2]).reshape(-1)[silent] == 0).all()


def test_the_gradient_is_scaled_by_what_follows(small_blocks):
    floats, rest, *others = arrays(clipped)
    for implementation in IMPLEMENTATIONS:
        loss = lambda floats, factor, name=implementation: factor * call(clipped, name, rest, *others, *floats).loss
        one, three = (jax.jit(jax.grad(loss))(floats, factor) for factor in (1.0, 3.0))
        compare(three, jax.tree.map(lambda x: 3 * x, one), 1e-6)


@pytest.mark.parametrize("implementation", ["xla", "two_step"])
def test_under_vmap_and_scan(small_blocks, implementation):
    floats, *others = arrays(clipped)
    run = value_and_gradient(clipped, implementation, *others)
    two = jax.tree.map(lambda x: jnp.stack([0.5 * x, x]), floats)
    expected = jax.jit(run)(floats)
    mapped = jax.jit(jax.vmap(run))(two)
    scanned = jax.jit(lambda two: jax.lax.scan(lambda _, floats: (None, run(floats)), None, two)[1])(two)
    for found in mapped, scanned:
        compare(jax.tree.map(lambda x: x[1], found), expected, 1e-5)


def test_one_sweep_makes_each_logit_once():
    """Products over the width: three in one sweep (logits and both gradients), four in two steps."""
    floats, *others = arrays(clipped)
    count = lambda name: str(jax.make_jaxpr(value_and_gradient(clipped, name, *others))(floats)).count("dot_general")
    assert count("xla") == 3 and count("two_step") == 4


@pytest.mark.parametrize("rows", [8192, 8191])
def test_one_sweep_keeps_a_block_of_logits(rows):
    """XLA's own analysis: temporaries at most 10 % of the gradient with all logits in memory, also for a prime."""
    def temporaries(implementation):
        def loss(hidden, vocabulary, targets, old, mask):
            batch = Batch({}, {"rollout_logp": old, "reference_logp": old, "advantage": old, "low": 0.2 + 0 * old,
                               "beta": jnp.float32(0.04)}, mask, old, old)
            head = Head(hidden, vocabulary, targets)
            return linear_policy_loss(clipped, head, batch, implementation=implementation).loss

        shape = jax.ShapeDtypeStruct
        arrays = (shape((rows, 64), jnp.float32), shape((4096, 64), jnp.float32), shape((rows,), jnp.int32),
                  shape((1, rows), jnp.float32), shape((1, rows), jnp.bool_))
        return jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("xla") <= 0.1 * temporaries("reference")


def test_a_loss_without_entropy_makes_no_gradient_of_it():
    floats, *others = arrays(clipped)
    with_entropy = lambda policy, given: clipped(policy, given)[0] + policy["entropy"]
    passes = lambda gate: jax.jit(value_and_gradient(gate, "xla", *others)).lower(floats).compile().cost_analysis()
    assert passes(clipped)["flops"] < passes(with_entropy)["flops"]


def test_the_best_is_one_sweep_for_a_small_vocabulary_and_a_gate_of_tokens():
    assert blocks.best(1024, 128, "token") == "xla"
    assert {blocks.best(*of) for of in ((64, 128, "token"), (151936, 1024, "token"), (1024, 128, "row"))} == {"two_step"}
    floats, *others = arrays(of_rows)
    found, expected = (jax.jit(value_and_gradient(of_rows, name, *others))(floats) for name in (None, "reference"))
    compare(found, expected, 1e-5)


def test_pallas_runs_both_kernels():
    floats, *others = arrays(clipped)
    run = value_and_gradient(clipped, "pallas", *others)
    contract.check_runs_kernel(run, floats)
    assert "policy_gate" in str(jax.make_jaxpr(run)(floats))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_it_lowers_where_it_is_best(platform):
    """Qwen3-0.6B's head, bf16, 8 x 256 tokens."""
    n, t, shape = 8, 256, jax.ShapeDtypeStruct
    tokens = shape((n, t), jnp.float32)
    given = {name: tokens for name in ("rollout_logp", "advantage", "low", "reference_logp")}

    def run(hidden, vocabulary, targets, given, beta, mask, weight):
        rest = {"targets": targets, "support": None}
        others = rest, {**given, "beta": beta}, mask, weight, weight, hidden, vocabulary, None
        return call(clipped, None, *others).loss

    contract.check_lowering(
        platform, jax.grad(run, (0, 1)), shape((n * t, 1024), jnp.bfloat16), shape((151936, 1024), jnp.bfloat16),
        shape((n * t,), jnp.int32), given, shape((), jnp.float32), shape((n, t), jnp.bool_), tokens)


def test_what_is_wrong_is_said():
    floats, rest, *others = arrays(clipped)
    for gate, implementation, message in [(of_rows, "xla", "one token at a time"), (clipped, "fast", "allowed are None")]:
        with pytest.raises(ValueError, match=message):
            call(gate, implementation, rest, *others, *floats)
    with pytest.raises(ValueError, match="a row of the head for every token"):
        call(clipped, None, rest, *others, floats[0][:-1], *floats[1:])
    partial = functools.partial(clipped)
    assert np.isfinite(call(partial, None, rest, *others, *floats).loss)
