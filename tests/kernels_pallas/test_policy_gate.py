import functools
import math
import types
from typing import NamedTuple

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.policy_gate import blocks, portable
from kernels_pallas.policy_gate.op import policy_gate, staged_gate
from rl_jax.learner import assemble, update
from rl_jax.learner import gate as slots
from rl_jax.loss import (bounds, budget, divergence, entropy, fiber, gate, likelihood, ratio, reject, score, value,
                         variance)
from rl_jax.recipes.baselines import grpo
from rl_jax.recipes.loss import fiberpo, fiberpo_domain, gspo, sapo_soft_gate
from rl_jax.types import Evaluated

ROWS, TOKENS = 5, 300
PASSES = "xla", "pallas"
IMPLEMENTATIONS = "reference", *PASSES


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of 2 rows and 128 tokens: three in each direction. Whole rows: one at a time."""
    monkeypatch.setitem(blocks.NUMBERS, "cpu", 256)
    monkeypatch.setitem(blocks.TOKENS, "cpu", 128)


def _per_token(policy, given):
    return ratio.per_token(policy["logp"], given["rollout_logp"])


def _per_sequence(policy, given):
    return ratio.per_sequence(policy["logp"], given["rollout_logp"], given["mask"])


def _grpo(policy, given):
    return (gate.ppo_clip(_per_token(policy, given), given["advantage"], 0.2, 0.28)
            + 0.04 * divergence.k3(policy["logp"], given["reference_logp"]))


def _ppo(policy, given):
    error = value.clipped(policy["values"], given["values_then"], given["returns"], 0.5)
    clipped = gate.ppo_clip(_per_token(policy, given), given["advantage"], 0.2, 0.2)
    return clipped + error - 0.01 * policy["entropy"], {"loss/value": error}


def _named(policy, given):
    clipped = gate.dual_clip(_per_token(policy, given), given["advantage"], 0.2, 0.2, 3.0)
    return {"policy": clipped, "entropy": entropy.bonus(policy["entropy"], 0.01)}, {"clipped": clipped > 0}


def _r2vpo(policy, given):
    r = _per_token(policy, given)
    return variance.penalised(r, given["advantage"], given["price"]), {"change": variance.squared_change(r)}


def _by_probability(policy, given):
    low, high = bounds.by_probability(given["rollout_logp"], 0.16, 0.2, 10.0)
    return gate.dual_clip(_per_token(policy, given), given["advantage"], low, high, 10.0)


def _band_per_row(policy, given):
    high = jnp.broadcast_to(given["high"], given["mask"].shape)
    return gate.two_sided_clip(_per_token(policy, given), given["advantage"], 0.2, high, 1.5)


def _ring(policy, given):
    r = _per_token(policy, given)
    kept = reject.ring(r, given["advantage"], 0.2, 0.2, far_low=0.6, far_high=1.0)
    return reject.policy_gradient(policy["logp"], given["advantage"], 1.0, kept)


def _fiber(policy, given):
    change = fiber.log_ratios(policy["logp"], given["rollout_logp"], given["mask"])
    weight = fiber.trajectory_weight(change, given["mask"], positive=0.12, negative=0.1)
    return gate.unclipped(fiber.gated_ratio(change, given["mask"], weight, 0.2), given["advantage"])


def _mixture(policy, given):
    s = ratio.per_sequence_token(policy["logp"], given["rollout_logp"], given["mask"])
    return gate.ppo_clip_of_mixture(_per_token(policy, given), s, given["advantage"], 0.3, clip=0.2,
                                    sequence_low=0.02, sequence_high=0.03)


def _displacement(policy, given):
    fall = likelihood.displacement(policy["logp"], given["rollout_logp"], given["advantage"], given["mask"])
    clipped = gate.ppo_clip(_per_token(policy, given), given["advantage"], 0.2, 0.2)
    return {"policy": clipped, "entropy": 0.1 * fall}


def _geometric(policy, given):
    s = ratio.clipped_geometric_mean(policy["logp"], given["rollout_logp"], given["advantage"], given["mask"], 0.1, 0.2)
    return gate.unclipped(s, given["advantage"])


FAMILIES = {
    "ppo_clip_and_k3": (_grpo, "token"),
    "value_and_entropy": (_ppo, "token"),
    "named_terms": (_named, "token"),
    "scalar_price": (_r2vpo, "token"),
    "bound_per_token": (_by_probability, "token"),
    "bound_per_row": (_band_per_row, "token"),
    "ring": (_ring, "token"),
    "unclipped": (lambda policy, given: gate.unclipped(_per_token(policy, given), given["advantage"]), "token"),
    "soft": (lambda policy, given: gate.soft(_per_token(policy, given), given["advantage"], 1.0, 1.05), "token"),
    "detached": (lambda policy, given: score.weighted_by_capped_ratio(
        policy["logp"], _per_token(policy, given), given["advantage"], 1.2), "token"),
    "k2": (lambda policy, given: divergence.k3_straight_through(policy["logp"], given["reference_logp"]), "token"),
    "per_sequence": (lambda policy, given: gate.ppo_clip(
        _per_sequence(policy, given), given["advantage"], 0.02, 0.03), "row"),
    "per_sequence_token": (lambda policy, given: gate.ppo_clip(ratio.per_sequence_token(
        policy["logp"], given["rollout_logp"], given["mask"]), given["advantage"], 0.02, 0.03), "row"),
    "geometric_mean": (_geometric, "row"),
    "fiber": (_fiber, "row"),
    "mixture": (_mixture, "row"),
    "displacement": (_displacement, "row"),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


class Batch(NamedTuple):
    """Arguments of `policy_gate` without the gate."""

    policy: dict
    given: dict
    mask: jax.Array
    weight: jax.Array
    share: jax.Array


def _batch(rows: int = ROWS, tokens: int = TOKENS, seed: int = 0) -> Batch:
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


def _weights(family: str, batch: Batch):
    return {"policy": batch.weight, "entropy": 2 * batch.weight} if FAMILIES[family][0] in (_named, _displacement) \
        else batch.weight


def _run(family: str, implementation: str | None, batch: Batch, policy=None):
    """Gated, and the gradient of its loss."""
    return _compiled(family, implementation, batch if policy is None else batch._replace(policy=policy))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(family, implementation, batch):
    function, level = FAMILIES[family]

    def loss(policy):
        gated = policy_gate(function, policy, batch.given, batch.mask, _weights(family, batch), batch.share,
                            level=level, implementation=implementation)
        return gated.loss, gated

    gradient, gated = jax.grad(loss, has_aux=True)(batch.policy)
    return gated, gradient


def _same(found, expected, relative=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=relative, atol=relative * np.max(np.abs(y), initial=1e-6))


@every_family
def test_every_family_is_its_reference(family):
    batch = _batch()
    expected = _run(family, "reference", batch)
    for implementation in PASSES:
        found = _run(family, implementation, batch)
        _same(found, expected)
        assert "policy/clip_share" in found[0].diagnostics and found[0].loss != 0


@pytest.mark.parametrize("family, implementation", [("ppo_clip_and_k3", "xla"), ("per_sequence", "pallas")])
def test_contract(family, implementation):
    batch, (function, level) = _batch(5, 140), FAMILIES[family]

    def with_implementation(name):
        def call(logp, entropy, given, mask, weight, share):
            gated = policy_gate(function, {"logp": logp, "entropy": entropy}, given, mask, weight, share, level=level,
                                implementation=name)
            return jnp.broadcast_to(gated.loss, mask.shape[:1]), jnp.broadcast_to(
                gated.diagnostics["policy/clip_share"], mask.shape[:1])
        return call

    contract.check(contract.Case(
        op=with_implementation(implementation), reference=with_implementation("reference"),
        floats=(batch.policy["logp"], batch.policy["entropy"]), others=(*batch[1:],),
        silent=~np.asarray(batch.mask.any(axis=1)), row_inputs=(True, True)))


def _loops(logp, batch: Batch):
    """Oracle: GRPO's loss, its sums and extremes in loops over Python floats (float64), from the formulas alone."""
    given = {name: np.asarray(x, float) for name, x in batch.given.items()}
    weight, shares_of, logp = (np.asarray(x, float) for x in (batch.weight, batch.share, logp))
    loss, shares, gaps, ratios, kl_rollout, kl_reference = [], [], [0.0], [], [], []
    for i, t in zip(*np.nonzero(np.asarray(batch.mask)), strict=True):
        change = logp[i, t] - given["rollout_logp"][i, t]
        r, credit, share = math.exp(change), given["advantage"][i, t], shares_of[i, t]
        clipped = min(r * credit, min(max(r, 0.8), 1.28) * credit)
        away = given["reference_logp"][i, t] - logp[i, t]
        penalty = math.exp(away) - away - 1
        loss.append(weight[i, t] * (-clipped + 0.04 * penalty))
        slope = (-r * credit if clipped == r * credit else 0.0) + 0.04 * (1 - math.exp(away))
        shares.append(share * (slope == 0 and credit != 0))
        gaps.append(abs(change) * given["fresh"][i, t])
        ratios.append(r)
        kl_rollout.append(share * (r - 1 - change))
        kl_reference.append(share * penalty)
    entropies = np.asarray(batch.policy["entropy"], float)[np.asarray(batch.mask)] * np.asarray(
        batch.share, float)[np.asarray(batch.mask)]
    return math.fsum(loss), {
        "policy/entropy": math.fsum(entropies), "rollout/logp_gap_nats": max(gaps), "policy/ratio_max": max(ratios),
        "policy/ratio_min": min(ratios), "policy/kl_rollout": math.fsum(kl_rollout),
        "policy/kl_reference": math.fsum(kl_reference), "policy/clip_share": math.fsum(shares)}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_are_those_of_loops_over_floats(implementation):
    batch = _batch()
    loss, numbers = _loops(batch.policy["logp"], batch)
    gated, _ = _run("ppo_clip_and_k3", implementation, batch)
    assert gated.terms == {} and gated.extras == {} and sorted(gated.diagnostics) == sorted(numbers)
    np.testing.assert_allclose(gated.loss, loss, rtol=1e-5)
    for name, expected in numbers.items():
        np.testing.assert_allclose(gated.diagnostics[name], expected, rtol=2e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_is_the_central_difference_in_float64(implementation):
    batch = _batch(seed=3)
    _, gradient = _run("ppo_clip_and_k3", implementation, batch)
    point, step = np.asarray(batch.policy["logp"], float), 1e-6
    for index in list(np.ndindex(point.shape))[::67]:
        move = np.zeros_like(point)
        move[index] = step
        difference = (_loops(point + move, batch)[0] - _loops(point - move, batch)[0]) / (2 * step)
        np.testing.assert_allclose(gradient["logp"][index], difference, rtol=1e-3, atol=1e-7)


def test_clip_share_counts_the_gate_and_not_the_weights():
    """Two of three tokens with credit left the band where it is gained; no weight, and no credit, is no clip."""
    logs = jnp.log(jnp.array([[1.5, 0.5, 1.0, 1.5]]))
    given = {"rollout_logp": jnp.zeros((1, 4)), "advantage": jnp.array([[1.0, -1.0, 1.0, 0.0]])}
    weight, share = jnp.array([[1.0, 1.0, 0.0, 1.0]]), jnp.full((1, 4), 0.25)
    for implementation in IMPLEMENTATIONS:
        clipped = lambda policy, given: gate.ppo_clip(_per_token(policy, given), given["advantage"], 0.2, 0.2)
        call = jax.jit(functools.partial(policy_gate, clipped, implementation=implementation))
        gated = call({"logp": logs}, given, jnp.ones((1, 4), bool), weight, share)
        np.testing.assert_allclose(gated.diagnostics["policy/clip_share"], 0.5)
        assert "policy/entropy" not in gated.diagnostics and "policy/kl_reference" not in gated.diagnostics


def test_what_is_hidden_does_not_say_that_its_row_learns():
    """Without credit only hidden tokens would teach, through the row's ratio: the chosen ones are all held back."""
    batch = _batch(2, 20)
    batch.given["advantage"] = jnp.ones_like(batch.weight)
    of_others = lambda policy, given: jnp.where(given["advantage"] == 0, _per_sequence(policy, given), 0.0)
    for implementation in IMPLEMENTATIONS:
        call = jax.jit(functools.partial(policy_gate, of_others, level="row", implementation=implementation))
        np.testing.assert_allclose(call(*batch).diagnostics["policy/clip_share"], 1.0, rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_gate_that_forgets_the_mask_gives_hidden_tokens_no_gradient(implementation):
    batch = _batch(2, 20)
    forgetful = lambda policy, given: jnp.broadcast_to(policy["logp"].sum(axis=1, keepdims=True), given["mask"].shape)
    gradient = jax.jit(jax.grad(lambda policy: policy_gate(forgetful, policy, *batch[1:], level="row",
                                                           implementation=implementation).loss))(batch.policy)
    expected = jnp.where(batch.mask, jnp.where(batch.mask, batch.weight, 0.0).sum(axis=1, keepdims=True), 0.0)
    np.testing.assert_allclose(gradient["logp"], expected, rtol=1e-5)
    assert (np.asarray(gradient["logp"])[~np.asarray(batch.mask)] == 0).all()


RECIPES = {"grpo": (grpo.grpo, "token"), "sapo": (sapo_soft_gate.sapo_soft_gate, "token"),
           "gspo": (gspo.gspo, "row"), "fiberpo": (fiberpo.fiberpo, "row")}


def _experience(recipe, batch: Batch, rows: int):
    """What a learner has before its loss, and what the policy says: two prompts, two domains."""
    group = jnp.asarray(np.arange(rows) // 4)
    reward = jnp.asarray(np.random.default_rng(7).random(rows), jnp.float32)
    named = {name: batch.given[name] for name in ("fresh", "reference_logp")}
    x = assemble.of_arrays(batch.given["rollout_logp"], batch.mask, reward, group, domain=group // 2, **named)
    return assemble.with_advantage(recipe, x), Evaluated(logp=batch.policy["logp"], entropy=batch.policy["entropy"])


def _on_whole_arrays(recipe, x, policy, weight, share):
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


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_loss_and_metrics_of_whole_arrays(name):
    factory, level = RECIPES[name]
    recipe, batch = factory(), _batch(8, 140, seed=1)
    x, policy = _experience(recipe, batch, 8)
    weight, share = recipe.weighting(x), update.token_share(x)

    def recipe_gate(policy, given):
        return recipe.loss(types.SimpleNamespace(**policy), types.SimpleNamespace(**given))

    def loss(implementation, policy):
        gated = policy_gate(recipe_gate, policy, {"rollout_logp": x.rollout_logp, "fresh": x.fresh, **x.given}, x.mask,
                            weight, share, level=level, implementation=implementation)
        return gated.loss, {**gated.extras, **gated.diagnostics}

    expected = _on_whole_arrays(recipe, x, policy, weight, share)
    for implementation in IMPLEMENTATIONS if name == "grpo" else ("pallas",):
        run = jax.jit(jax.value_and_grad(functools.partial(loss, implementation), has_aux=True))
        (total, metrics), gradient = run({"logp": policy.logp, "entropy": policy.entropy})
        _same((total, metrics, gradient), expected)


def _change(policy, given):
    return jnp.clip(policy["logp"] - given["rollout_logp"], -20.0, 20.0)


def _both_ways(policy, given):
    change = _change(policy, given)
    return {"rise": jnp.where(change >= 0, change, 0.0), "fall": jnp.where(change >= 0, 0.0, -change)}


def _fiber_gate(of_token, policy, given):
    change, rise, fall = _change(policy, given), policy["rise_mean"], policy["fall_mean"]
    own, other = jnp.where(change >= 0, rise, -fall), jnp.where(change >= 0, fall, -rise)
    residual = jnp.clip(change - own, -of_token, of_token) + jnp.clip(other, -of_token, of_token)
    return gate.unclipped(jnp.exp(policy["log_weight"] + residual), given["advantage"])


def _stages_gspo(recipe, x):
    low, high = recipe.hyperparameters["clip_low"], recipe.hyperparameters["clip_high"]

    def combine(sums, rows):
        return {"s": jnp.exp(jnp.clip(sums["change"] / jnp.maximum(rows["chosen"], 1), -20.0, 10.0))}

    def clipped(policy, given):
        s = jnp.broadcast_to(policy["s"], given["mask"].shape)
        return gate.ppo_clip(s, given["advantage"], low, high)

    return lambda policy, given: {"change": policy["logp"] - given["rollout_logp"]}, combine, clipped


def _stages_fiber(recipe, x):
    of = recipe.hyperparameters

    def combine(sums, rows):
        length = rows["chosen"].astype(jnp.float32)
        rise, fall = (sums[name] / jnp.maximum(length, 1) for name in ("rise", "fall"))
        return {"rise_mean": rise, "fall_mean": fall, "log_weight": fiber.rollback(rise, of["positive"], length)
                - fiber.rollback(fall, of["negative"], length)}

    return _both_ways, combine, functools.partial(_fiber_gate, of["residual"])


def _stages_domain(recipe, x):
    """`fiber.tree_weight` from the sums."""
    of, rows = recipe.hyperparameters, x.group.shape[0]

    def mean(values, place, counted):
        total = lambda x: jax.ops.segment_sum(x, place, num_segments=rows)
        return total(values * counted) / jnp.maximum(total(counted), 1), total(counted)

    def combine(sums, rows_):
        length = rows_["chosen"].astype(jnp.float32)
        home = jnp.zeros(rows, x.group.dtype).at[x.group].set(x.domain)

        def channel(mean_change):
            of_group, answers = mean(mean_change, x.group, (length > 0).astype(jnp.float32))
            of_domain, groups = mean(of_group, home, (answers > 0).astype(jnp.float32))
            down = (fiber.rollback(of_domain, of["of_domain"], groups)[home]
                    + fiber.rollback(of_group - of_domain[home], of["of_group"], answers))
            return down[x.group] + fiber.rollback(mean_change - of_group[x.group], of["of_answer"], length)

        rise, fall = (sums[name] / jnp.maximum(length, 1) for name in ("rise", "fall"))
        return {"rise_mean": rise, "fall_mean": fall, "log_weight": channel(rise) - channel(fall)}

    return _both_ways, combine, functools.partial(_fiber_gate, of["of_token"])


STAGED = {"gspo": (gspo.gspo, _stages_gspo), "fiberpo": (fiberpo.fiberpo, _stages_fiber),
          "fiberpo_domain": (fiberpo_domain.fiberpo_domain, _stages_domain)}


def _staged(name, implementation, x, recipe, policy, weight, share):
    statistics, combine, gated = STAGED[name][1](recipe, x)
    given = {"rollout_logp": x.rollout_logp, "fresh": x.fresh, **x.given}

    def loss(policy):
        found = staged_gate(statistics, combine, gated, policy, given, x.mask, weight=weight, share=share,
                            implementation=implementation)
        return found.loss, {**found.extras, **found.diagnostics}

    return loss


@pytest.mark.parametrize("name", STAGED)
def test_stages_have_the_loss_and_metrics_of_the_whole(name):
    recipe, batch = STAGED[name][0](), _batch(16, 290, seed=2)
    x, policy = _experience(recipe, batch, 16)
    # Some answers weigh nothing: their tokens are not clipped for that.
    weight, share = jnp.where(jnp.arange(16)[:, None] % 3 == 0, 0.0, recipe.weighting(x)), update.token_share(x)
    arrays = {"logp": policy.logp, "entropy": policy.entropy}

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, x, arrays):
        loss = _staged(name, implementation, x, recipe, arrays, weight, share)
        (total, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(arrays)
        return (total, metrics, gradient), loss(arrays) if name == "gspo" else (total, metrics)

    expected = _on_whole_arrays(recipe, x, policy, weight, share)
    assert name != "gspo" or 0 < expected[1]["policy/clip_share"] < 1
    for implementation in IMPLEMENTATIONS if name == "gspo" else PASSES:
        found, values = run(implementation, x, arrays)
        _same(found, expected, relative=2e-5)
        _same(values, expected[:2], relative=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_stages_sum_over_chosen_tokens_only(implementation):
    """The mean of the ratios of a row's chosen tokens, whose derivative is ratio / number: 1 is not 0 when hidden."""
    batch = _batch(3, 140)
    batch = batch._replace(mask=batch.mask.at[1, :3].set(True))
    statistics = lambda policy, given: {"ratio": _per_token(policy, given)}
    combine = lambda sums, rows: {"mean": sums["ratio"] / rows["chosen"] * rows["high"]}
    loss = lambda policy: staged_gate(
        statistics, combine, lambda policy, given: policy["mean"] * given["advantage"], policy, batch.given, batch.mask,
        weight=batch.weight, share=batch.share, implementation=implementation).loss
    mask, credit, weight, high = (np.asarray(x, float) for x in (
        batch.mask, batch.given["advantage"], batch.weight, batch.given["high"]))
    ratios = mask * np.exp(np.asarray(batch.policy["logp"], float) - np.asarray(batch.given["rollout_logp"], float))
    means = ratios.sum(axis=1, keepdims=True) / mask.sum(axis=1, keepdims=True) * high
    taught = (mask * credit * weight).sum(axis=1, keepdims=True) * high / mask.sum(axis=1, keepdims=True)
    found, gradient = jax.jit(jax.value_and_grad(loss))(batch.policy)
    np.testing.assert_allclose(found, (mask * means * credit * weight).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient["logp"], taught * ratios, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("implementation", PASSES)
def test_values_alone_are_the_same_and_make_no_gradient(implementation):
    batch, (function, level) = _batch(), FAMILIES["value_and_entropy"]
    call = lambda policy: policy_gate(function, policy, *batch[1:], level=level, implementation=implementation)
    _same(jax.jit(call)(batch.policy), _run("value_and_entropy", "reference", batch)[0])
    if implementation == "pallas":
        assert _kernels(call, batch.policy) == [(12, 1)]
        assert _kernels(jax.grad(lambda policy: call(policy).loss), batch.policy) == [(12, 4)]


def _kernels(function, *arguments):
    """(operands, results) of every pallas_call."""
    found = []

    def look(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                found.append((len(equation.invars), len(equation.outvars)))
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr)):
                if isinstance(inner, jax.extend.core.ClosedJaxpr) and equation.primitive.name != "pallas_call":
                    look(inner.jaxpr)

    look(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


def test_a_kernel_loads_what_is_read_and_differentiates_what_the_terms_depend_on():
    """Mask, weight, share, logp, rollout_logp, advantage, fresh, reference_logp for its KL, entropy for its mean."""
    batch, (function, _) = _batch(), FAMILIES["unclipped"]

    def mentions_more(policy, given):
        given["returns"] + given["high"] + given["price"] + policy["values"]
        return function(policy, given)

    loss = lambda policy: policy_gate(mentions_more, policy, *batch[1:], implementation="pallas").loss
    assert _kernels(jax.grad(loss), batch.policy) == [(9, 2)]
    gradient = jax.grad(loss)(batch.policy)
    assert not gradient["values"].any() and not gradient["entropy"].any() and gradient["logp"].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["value_and_entropy", "bound_per_row", "fiber"])
def test_what_is_behind_the_mask_is_never_read_and_gets_exactly_zero(family, implementation):
    batch = _batch()
    clean = _run(family, implementation, batch)
    for garbage in (np.nan, np.inf, -1e30):
        def spoilt(x):
            if x.dtype == jnp.bool_:
                return x
            hidden = ~batch.mask if x.shape == batch.mask.shape else ~batch.mask.any(axis=1, keepdims=True)
            return jnp.where(hidden, garbage, x) if x.ndim == 2 else x

        policy, given, weight, share = jax.tree.map(spoilt, (batch.policy, batch.given, batch.weight, batch.share))
        found = _run(family, implementation, Batch(policy, given, batch.mask, weight, share))
        _same(found, clean, relative=0)
        for gradient in found[1].values():
            assert (np.asarray(gradient)[~np.asarray(batch.mask)] == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_numbers_per_row_in_policy_get_the_sum_over_their_row(implementation):
    batch = _batch()
    shift = jnp.linspace(-0.2, 0.2, ROWS)[:, None]
    batch.policy["shift"] = shift

    def shifted(policy, given):
        r = ratio.per_token(policy["logp"] + policy["shift"], given["rollout_logp"])
        return gate.unclipped(r, given["advantage"])

    loss = lambda policy: policy_gate(shifted, policy, *batch[1:], implementation=implementation).loss
    gradient = jax.jit(jax.grad(loss))(batch.policy)
    assert gradient["shift"].shape == (ROWS, 1) and gradient["shift"][1, 0] == 0
    np.testing.assert_allclose(gradient["shift"][:, 0], gradient["logp"].sum(axis=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", PASSES)
def test_only_the_loss_is_differentiable_and_the_gradient_scales(implementation):
    batch, (function, _) = _batch(4, 20), FAMILIES["named_terms"]

    def call(policy, batch=batch):
        return policy_gate(function, policy, batch.given, batch.mask, _weights("named_terms", batch), batch.share,
                           implementation=implementation)

    @jax.jit
    def gradients(policy, weight, price):
        changed = lambda weight, price: batch._replace(weight=weight, given={**batch.given, "price": price})
        squared = lambda policy: 3 * call(policy).loss ** 2
        numbers = lambda policy: sum(jax.tree.leaves(call(policy)[1:]))
        constants = lambda weight, price: call(policy, changed(weight, price)).loss
        return (jax.value_and_grad(lambda policy: call(policy).loss)(policy), jax.grad(squared)(policy),
                jax.grad(numbers)(policy), jax.grad(constants, (0, 1))(weight, price))

    (loss, gradient), squared, *nothing = gradients(batch.policy, batch.weight, batch.given["price"])
    _same(squared, jax.tree.map(lambda x: 6 * loss * x, gradient), relative=1e-6)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(nothing))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_chosen_is_zero(implementation):
    batch = _batch()
    batch = batch._replace(mask=jnp.zeros_like(batch.mask), share=jnp.zeros_like(batch.share))
    gated, gradient = _run("ppo_clip_and_k3", implementation, batch)
    assert gated.diagnostics.pop("policy/ratio_min") == jnp.inf
    assert all(x == 0 for x in jax.tree.leaves(gated)) and not gradient["logp"].any()


@pytest.mark.parametrize("family, shape", [
    ("bound_per_row", (1, 1)), ("bound_per_row", (3, 1)), ("per_sequence", (3, 1)), ("per_sequence", (1, 130))])
def test_odd_shapes(family, shape):
    batch = _batch(*shape)
    _same(_run(family, "pallas", batch), _run(family, "reference", batch))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_computed_in_float32(implementation):
    batch = _batch()
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), batch.policy)
    gated, gradient = _run("ppo_clip_and_k3", implementation, batch, rounded)
    widened, _ = _run("ppo_clip_and_k3", "reference", batch, jax.tree.map(lambda x: x.astype(jnp.float32), rounded))
    assert gated.loss.dtype == jnp.float32 and gradient["logp"].dtype == jnp.bfloat16
    _same(gated, widened)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64_stays_float64(implementation):
    with jax.enable_x64(True):
        batch = _batch(3, 40)
        batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if x.dtype == jnp.float32 else x, batch)
        gated, gradient = _run("ppo_clip_and_k3", implementation, batch)
        assert gated.loss.dtype == gradient["logp"].dtype == jnp.float64
        loss, numbers = _loops(batch.policy["logp"], batch)
        np.testing.assert_allclose(gated.loss, loss, rtol=1e-12)
        np.testing.assert_allclose([gated.diagnostics[name] for name in numbers], list(numbers.values()), rtol=1e-12)


def test_the_default_on_a_cpu_is_xla_and_pallas_runs_a_kernel():
    batch = _batch(2, 20)
    call = lambda implementation, level: lambda policy: policy_gate(
        FAMILIES["unclipped"][0], policy, *batch[1:], implementation=implementation, level=level)
    assert _kernels(call(None, "token"), batch.policy) == []
    for level in ("token", "row"):
        contract.check_runs_kernel(call("pallas", level), batch.policy)
        contract.check_runs_kernel(jax.grad(lambda policy: call("pallas", level)(policy).loss), batch.policy)


@pytest.mark.parametrize("name, function", {
    "expm1": lambda x: jnp.expm1(x), "any": lambda x: (x > 0).any(axis=1, keepdims=True) * x,
    "all": lambda x: (x > -1).all(axis=1)[:, None] * x, "jitted": jax.jit(lambda x: jax.nn.softplus(x))}.items(),
    ids=lambda x: x if isinstance(x, str) else "")
def test_rewritten_operations_are_the_same(name, function):
    x = jnp.concatenate([jnp.linspace(-20, 20, 400), jnp.geomspace(1e-20, 1.0, 400), -jnp.geomspace(1e-20, 1.0, 400)])
    x = x.reshape(-1, 4)
    written = portable.portable(function)
    np.testing.assert_allclose(jax.jit(written)(x), function(x), rtol=1e-6)
    assert not any(word in str(jax.make_jaxpr(written)(x)) for word in ("expm1 ", "reduce_or", "reduce_and"))


def _shapes(rows, tokens):
    numbers = jax.ShapeDtypeStruct((rows, tokens), jnp.float32)
    flags, per_row = jax.ShapeDtypeStruct((rows, tokens), jnp.bool_), jax.ShapeDtypeStruct((rows, 1), jnp.float32)
    policy = dict.fromkeys(("logp", "entropy", "values"), numbers)
    given = dict.fromkeys(("rollout_logp", "reference_logp", "advantage", "values_then", "returns"), numbers)
    price = jax.ShapeDtypeStruct((), jnp.float32)
    return policy, {**given, "high": per_row, "price": price, "fresh": flags}, flags, numbers, numbers


def _value(family, *batch):
    function, level = FAMILIES[family]
    batch = Batch(*batch)
    return policy_gate(function, *batch[:3], _weights(family, batch), batch.share, level=level)


def _gradient(family, policy, *rest):
    return jax.grad(lambda policy: _value(family, policy, *rest).loss)(policy)


@pytest.mark.parametrize("device", contract.DEVICES)
@every_family
def test_lowers_by_default_on_accelerators(family, device):
    contract.check_lowering(device, functools.partial(_gradient, family), *_shapes(512, 4096))


@pytest.mark.parametrize("device", contract.DEVICES)
@pytest.mark.parametrize("shape", [(512, 1024), (100, 1000), (3, 7000)])
@pytest.mark.parametrize("family", ["value_and_entropy", "fiber"])
def test_lowers_at_other_sizes(family, shape, device):
    for function in (_value, _gradient):
        contract.check_lowering(device, functools.partial(function, family), *_shapes(*shape))


@pytest.mark.parametrize("device", contract.DEVICES)
@pytest.mark.parametrize("name", STAGED)
def test_stages_lower(name, device):
    recipe = STAGED[name][0]()

    def run(policy, given, mask, weight, share, group):
        named = {name: given[name] for name in ("fresh", "advantage")}
        x = assemble.of_arrays(given["rollout_logp"], mask, jnp.zeros(512), group, domain=group // 8, **named)
        loss = _staged(name, None, x, recipe, policy, weight, share)
        return loss(policy), jax.grad(loss, has_aux=True)(policy)

    contract.check_lowering(device, run, *_shapes(512, 32768), jax.ShapeDtypeStruct((512,), jnp.int32))


def _call(function=FAMILIES["unclipped"][0], batch=None, **options):
    return policy_gate(function, *(batch or _batch(2, 20)), **options)


def test_a_gate_may_not_close_over_arrays():
    table, number = jnp.ones((2, 20)), jnp.float32(0.2)
    constants = np.ones((2, 20), np.float32)
    plain = lambda policy, given, scale=1.0: policy["logp"] * scale
    inner = lambda policy: policy["logp"] * table
    for function, name in {
            lambda policy, given: policy["logp"] * table: "'table'",
            lambda policy, given: policy["logp"] * number: "'number'",
            lambda policy, given: policy["logp"] * constants: "'constants'",
            functools.partial(plain, scale=table): "'scale'",
            lambda policy, given: inner(policy): "'table'"}.items():
        with pytest.raises(ValueError, match=f"closes over {name}.*pass it in given"):
            _call(function)
    traced = []
    for transform in (jax.jit, jax.vmap, jax.grad):
        with pytest.raises(ValueError, match="closes over 'coefficient'"):
            transform(lambda coefficient: _call(lambda policy, given: policy["logp"] * coefficient).loss)(
                jnp.ones(2) if transform is jax.vmap else 1.0)
    assert not traced
    _call(functools.partial(plain, scale=2.0))


@pytest.mark.parametrize("function, message", [
    (lambda policy, given: policy["logp"].sum(axis=1, keepdims=True), "one number per token"),
    (lambda policy, given: {"a": policy["logp"]}, "terms \\['a'\\].*weights for no name"),
    (lambda policy, given: policy["logp"] * given["old_logp"], "reads 'old_logp', which is in neither"),
    (lambda policy, given: (policy["logp"], policy["logp"]), "extras a dict"),
    (lambda policy, given: (policy["logp"], {"a": jnp.ones(3)}), "extras must have one number per token"),
    (lambda policy, given: policy["logp"] * policy["logp"].sum(axis=1, keepdims=True), "joins tokens.*level='row'"),
    (FAMILIES["per_sequence"][0], "joins tokens.*level='row'"),
])
def test_gates_that_cannot_be(function, message):
    with pytest.raises(ValueError, match=message):
        _call(function)


def _cumulative(policy, given):
    return budget.censored(_per_token(policy, given), given["advantage"], given["mask"], 0.1)


@pytest.mark.parametrize("function, message", [
    (_cumulative, "'cumsum'.*cannot be in a kernel"),
    (lambda policy, _: policy["logp"] * policy["logp"].sum(axis=0, keepdims=True), "reduces over rows.*staged_gate"),
    (lambda policy, _: policy["logp"] * policy["logp"].mean(axis=1, keepdims=True), "counts positions by the shape"),
    (lambda policy, _: policy["logp"] * jnp.broadcast_to(policy["entropy"], (2, 20)), "depends on the number of rows"),
])
def test_gates_that_cannot_be_in_a_kernel_are_refused_there_and_run_in_xla(function, message):
    with pytest.raises(ValueError, match=message):
        _call(function, level="row", implementation="pallas")
    found, expected = (jax.jit(functools.partial(policy_gate, function, level="row", implementation=implementation))(
        *_batch(2, 20)) for implementation in (None, "reference"))
    _same(found, expected)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=contract.DEVICES["cuda"])):
        call = lambda policy, given, *rest: policy_gate(function, policy, given, *rest, level="row")
        jaxpr = jax.make_jaxpr(call)(*_shapes(2, 20))
    assert "pallas_call" not in str(jaxpr)


def test_the_level_is_found_where_none_is_given():
    for family in ("ppo_clip_and_k3", "per_sequence"):
        function, level = FAMILIES[family]
        call = lambda level: jax.make_jaxpr(lambda batch: policy_gate(
            function, *batch, level=level, implementation="pallas"))(_batch(2, 300))
        assert str(call(None)) == str(call(level))


def test_long_rows_are_refused_with_advice(monkeypatch):
    monkeypatch.setattr(blocks, "LONGEST_ROW", {"cpu": 16})
    with pytest.raises(ValueError, match="at most 16 tokens here, and T = 20.*staged_gate"):
        _call(level="row", implementation="pallas")
    _call(level="row")
    _call(implementation="pallas")


def test_bad_arguments():
    batch = _batch(2, 20)
    for change, message in (
            ({"policy": {"entropy": batch.mask * 1.0}}, "must have 'logp'"),
            ({"given": {"mask": batch.mask}}, "no 'mask'"),
            ({"given": {"logp": batch.weight}}, "in policy and in given"),
            ({"given": {"row": jnp.ones((1, 20))}}, r"given\['row'\] \(1, 20\)"),
            ({"given": {"row": jnp.ones(2)}}, r"given\['row'\] \(2,\)"),
            ({"weight": jnp.ones((2, 2))}, "weight"),
            ({"share": jnp.ones((2, 2))}, "share"),
            ({"weight": {"a": batch.weight}}, "terms of no name")):
        with pytest.raises((ValueError, TypeError), match=message):
            _call(batch=batch._replace(**change))
    with pytest.raises(ValueError, match="level='batch'"):
        _call(level="batch")
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        _call(implementation="cuda")


def test_bad_stages():
    batch = _batch(2, 20)
    sums, made = lambda policy, given: {"x": policy["logp"]}, lambda sums, rows: {"y": sums["x"]}
    of_row = lambda policy, given: policy["logp"] * policy["y"]

    def call(statistics=sums, combine=made, gated=of_row, **options):
        return staged_gate(statistics, combine, gated, batch.policy, batch.given, batch.mask, weight=batch.weight,
                           share=batch.share, **options)

    call()
    for options, message in (
            ({"combine": lambda sums, rows: sums["x"]}, "combine must return a dict"),
            ({"combine": lambda sums, rows: {"y": jnp.ones(3)}}, "combine must return a dict"),
            ({"combine": lambda sums, rows: {"logp": sums["x"]}}, "which policy has already"),
            ({"statistics": lambda policy, given: policy["logp"]}, "statistics must be a dict"),
            ({"statistics": FAMILIES["fiber"][0]}, "joins tokens"),
            ({"gated": FAMILIES["fiber"][0]}, "joins tokens"),
            ({"gated": lambda policy, given: jax.lax.erf(policy["logp"]), "implementation": "pallas"}, "'erf'"),
            ({"gated": lambda policy, given: policy["logp"] * batch.weight}, "closes over 'weight'|closes over")):
        with pytest.raises(ValueError, match=message):
            call(**options)


@pytest.mark.parametrize("device", ["cuda", "tpu"])
@pytest.mark.parametrize("name", RECIPES)
def test_loss_slots_of_recipes_lower(name, device):
    """As the learner makes them: with a whole record of fields, most of which the slot does not read."""
    recipe, batch = RECIPES[name][0](), _batch(8, 128)
    x, policy = _experience(recipe, batch, 8)
    slot = slots.of_recipe(recipe, policy, x)
    weight, share = recipe.weighting(x), update.token_share(x)

    def loss(said, given):
        return policy_gate(slot.gate, said, given, x.mask, weight, share, level=None).loss

    contract.check_lowering(device, jax.grad(loss), slots.said(policy), slot.given)
