"""Gates of every family of the library, batches for them, and recipes on whole arrays."""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.policy_gate import blocks
from kernels_pallas.policy_gate.op import policy_gate
from rl_jax.learner import assemble
from rl_jax.loss import bounds, divergence, entropy, fiber, gate, likelihood, ratio, reject, score, value, variance
from rl_jax.recipes.baselines import grpo
from rl_jax.recipes.loss import fiberpo, gspo, sapo_soft_gate
from rl_jax.types import Evaluated

ROWS, TOKENS = 5, 300
PASSES = "xla", "pallas"
IMPLEMENTATIONS = "reference", *PASSES


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 2 rows and 128 tokens: three in each direction. Whole rows: one at a time."""
    monkeypatch.setitem(blocks.NUMBERS, "cpu", 256)
    monkeypatch.setitem(blocks.TOKENS, "cpu", 128)


def per_token(policy, given):
    return ratio.per_token(policy["logp"], given["rollout_logp"])


def per_sequence(policy, given):
    return ratio.per_sequence(policy["logp"], given["rollout_logp"], given["mask"])


def grpo_gate(policy, given):
    return (gate.ppo_clip(per_token(policy, given), given["advantage"], 0.2, 0.28)
            + 0.04 * divergence.k3(policy["logp"], given["reference_logp"]))


def ppo_gate(policy, given):
    error = value.clipped(policy["values"], given["values_then"], given["returns"], 0.5)
    clipped = gate.ppo_clip(per_token(policy, given), given["advantage"], 0.2, 0.2)
    return clipped + error - 0.01 * policy["entropy"], {"loss/value": error}


def named_terms(policy, given):
    clipped = gate.dual_clip(per_token(policy, given), given["advantage"], 0.2, 0.2, 3.0)
    return {"policy": clipped, "entropy": entropy.bonus(policy["entropy"], 0.01)}, {"clipped": clipped > 0}


def r2vpo(policy, given):
    r = per_token(policy, given)
    return variance.penalised(r, given["advantage"], given["price"]), {"change": variance.squared_change(r)}


def by_probability(policy, given):
    low, high = bounds.by_probability(given["rollout_logp"], 0.16, 0.2, 10.0)
    return gate.dual_clip(per_token(policy, given), given["advantage"], low, high, 10.0)


def band_per_row(policy, given):
    high = jnp.broadcast_to(given["high"], given["mask"].shape)
    return gate.two_sided_clip(per_token(policy, given), given["advantage"], 0.2, high, 1.5)


def ring_gate(policy, given):
    r = per_token(policy, given)
    kept = reject.ring(r, given["advantage"], 0.2, 0.2, far_low=0.6, far_high=1.0)
    return reject.policy_gradient(policy["logp"], given["advantage"], 1.0, kept)


def fiber_gate(policy, given):
    change = fiber.log_ratios(policy["logp"], given["rollout_logp"], given["mask"])
    weight = fiber.trajectory_weight(change, given["mask"], positive=0.12, negative=0.1)
    return gate.unclipped(fiber.gated_ratio(change, given["mask"], weight, 0.2), given["advantage"])


def mixture(policy, given):
    s = ratio.per_sequence_token(policy["logp"], given["rollout_logp"], given["mask"])
    return gate.ppo_clip_of_mixture(per_token(policy, given), s, given["advantage"], 0.3, clip=0.2,
                                    sequence_low=0.02, sequence_high=0.03)


def displacement(policy, given):
    fall = likelihood.displacement(policy["logp"], given["rollout_logp"], given["advantage"], given["mask"])
    clipped = gate.ppo_clip(per_token(policy, given), given["advantage"], 0.2, 0.2)
    return {"policy": clipped, "entropy": 0.1 * fall}


def geometric(policy, given):
    s = ratio.clipped_geometric_mean(policy["logp"], given["rollout_logp"], given["advantage"], given["mask"], 0.1, 0.2)
    return gate.unclipped(s, given["advantage"])


FAMILIES = {
    "ppo_clip_and_k3": (grpo_gate, "token"),
    "value_and_entropy": (ppo_gate, "token"),
    "named_terms": (named_terms, "token"),
    "scalar_price": (r2vpo, "token"),
    "bound_per_token": (by_probability, "token"),
    "bound_per_row": (band_per_row, "token"),
    "ring": (ring_gate, "token"),
    "unclipped": (lambda policy, given: gate.unclipped(per_token(policy, given), given["advantage"]), "token"),
    "soft": (lambda policy, given: gate.soft(per_token(policy, given), given["advantage"], 1.0, 1.05), "token"),
    "detached": (lambda policy, given: score.weighted_by_capped_ratio(
        policy["logp"], per_token(policy, given), given["advantage"], 1.2), "token"),
    "k2": (lambda policy, given: divergence.k3_straight_through(policy["logp"], given["reference_logp"]), "token"),
    "per_sequence": (lambda policy, given: gate.ppo_clip(
        per_sequence(policy, given), given["advantage"], 0.02, 0.03), "row"),
    "per_sequence_token": (lambda policy, given: gate.ppo_clip(ratio.per_sequence_token(
        policy["logp"], given["rollout_logp"], given["mask"]), given["advantage"], 0.02, 0.03), "row"),
    "geometric_mean": (geometric, "row"),
    "fiber": (fiber_gate, "row"),
    "mixture": (mixture, "row"),
    "displacement": (displacement, "row"),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


class Batch(NamedTuple):
    """Arguments of `policy_gate` without the gate."""

    policy: dict
    given: dict
    mask: jax.Array
    weight: jax.Array
    share: jax.Array


def batch(rows: int = ROWS, tokens: int = TOKENS, seed: int = 0) -> Batch:
    """Row 1 chose nothing; advantages are now and then 0; ratios between about 1/2 and 2; old tokens among fresh."""
    random = np.random.default_rng(seed)
    normal = lambda scale, shape=(rows, tokens): jnp.asarray(random.normal(size=shape) * scale, jnp.float32)
    mask = random.random((rows, tokens)) < 0.7
    mask[1 % rows] = rows == 1
    rollout_logp = -jnp.abs(normal(1.0))
    logp = rollout_logp + normal(0.2) + 0.1 * normal(1.0, (rows, 1))
    advantage = jnp.where(jnp.asarray(random.random((rows, tokens)) < 0.1), 0.0, normal(1.0))
    policy = {"logp": logp, "entropy": jnp.abs(normal(1.0)), "values": normal(1.0)}
    given = {"rollout_logp": rollout_logp, "reference_logp": logp + normal(0.3), "advantage": advantage,
             "values_then": normal(0.7), "returns": normal(1.0), "high": jnp.abs(normal(0.2, (rows, 1))),
             "price": jnp.float32(0.4), "fresh": jnp.asarray(random.random((rows, tokens)) < 0.8)}
    return Batch(policy, given, jnp.asarray(mask), jnp.abs(normal(0.01)), jnp.asarray(mask / mask.sum(), jnp.float32))


def weights(family: str, batch: Batch):
    return {"policy": batch.weight, "entropy": 2 * batch.weight} if FAMILIES[family][0] in (named_terms, displacement) \
        else batch.weight


def run(family: str, implementation: str | None, batch: Batch, policy=None):
    """Gated, and the gradient of its loss."""
    return compiled(family, implementation, batch if policy is None else batch._replace(policy=policy))


@functools.partial(jax.jit, static_argnums=(0, 1))
def compiled(family, implementation, batch):
    function, level = FAMILIES[family]

    def loss(policy):
        gated = policy_gate(function, policy, batch.given, batch.mask, weights(family, batch), batch.share,
                            level=level, implementation=implementation)
        return gated.loss, gated

    gradient, gated = jax.grad(loss, has_aux=True)(batch.policy)
    return gated, gradient


def same(found, expected, relative=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=relative, atol=relative * np.max(np.abs(y), initial=1e-6))


RECIPES = {"grpo": (grpo.grpo, "token"), "sapo": (sapo_soft_gate.sapo_soft_gate, "token"),
           "gspo": (gspo.gspo, "row"), "fiberpo": (fiberpo.fiberpo, "row")}


def experience(recipe, batch: Batch, rows: int):
    """What a learner has before its loss, and what the policy says: two prompts, two domains."""
    group = jnp.asarray(np.arange(rows) // 4)
    reward = jnp.asarray(np.random.default_rng(7).random(rows), jnp.float32)
    named = {name: batch.given[name] for name in ("fresh", "reference_logp")}
    x = assemble.of_arrays(batch.given["rollout_logp"], batch.mask, reward, group, domain=group // 2, **named)
    return assemble.with_advantage(recipe, x), Evaluated(logp=batch.policy["logp"], entropy=batch.policy["entropy"])


def on_whole_arrays(recipe, x, policy, weight, share):
    """Loss, metrics and gradient of a recipe's loss slot, written out once more on whole arrays."""
    def loss_of(policy):
        hidden = jax.tree.map(lambda a: jnp.where(x.mask, a, 0.0), policy)
        return recipe.loss(hidden, x)

    def total(policy):
        out = loss_of(policy)
        terms, extras = out if isinstance(out, tuple) else (out, {})
        extras = {name: (jnp.where(x.mask, value, 0.0) * share).sum() for name, value in extras.items()}
        return (jnp.where(x.mask, terms, 0.0) * weight).sum(), extras

    def unweighted(policy):
        out = loss_of(policy)
        return jnp.where(x.mask, out[0] if isinstance(out, tuple) else out, 0.0).sum()

    (loss, extras), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(policy)
    k3 = lambda log: (jnp.where(x.mask, jnp.exp(log) - 1 - log, 0.0) * share).sum()
    change = jnp.where(x.mask, policy.logp - x.rollout_logp, 0.0)
    held = (jax.jit(jax.grad(unweighted))(policy).logp == 0) & (x.advantage != 0)
    metrics = {
        **extras, "policy/entropy": (jnp.where(x.mask, policy.entropy, 0.0) * share).sum(),
        "policy/kl_rollout": k3(change), "rollout/logp_gap_nats": jnp.where(x.fresh, jnp.abs(change), 0.0).max(),
        "policy/ratio_max": jnp.where(x.mask, jnp.exp(change), 0.0).max(),
        "policy/ratio_min": jnp.where(x.mask, jnp.exp(change), jnp.inf).min(),
        "policy/clip_share": (held * share).sum(),
        "policy/kl_reference": k3(x.reference_logp - policy.logp)}
    return loss, metrics, {"logp": gradient.logp, "entropy": gradient.entropy}


def shapes(rows, tokens):
    numbers = jax.ShapeDtypeStruct((rows, tokens), jnp.float32)
    flags, per_row = jax.ShapeDtypeStruct((rows, tokens), jnp.bool_), jax.ShapeDtypeStruct((rows, 1), jnp.float32)
    policy = dict.fromkeys(("logp", "entropy", "values"), numbers)
    given = dict.fromkeys(("rollout_logp", "reference_logp", "advantage", "values_then", "returns"), numbers)
    price = jax.ShapeDtypeStruct((), jnp.float32)
    return policy, {**given, "high": per_row, "price": price, "fresh": flags}, flags, numbers, numbers
