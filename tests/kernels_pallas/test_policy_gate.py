"""Values, gradients and diagnostics of every family of gates, in every implementation."""
import functools
import math
import types

import contract
import jax
import jax.numpy as jnp
import numpy as np
import policy_gate_cases as cases
import pytest
from policy_gate_cases import small_blocks  # noqa: F401  (a fixture for every test here)

from kernels_pallas.policy_gate.op import policy_gate
from rl_jax.learner import update
from rl_jax.loss import gate, ratio


@cases.every_family
def test_every_family_is_its_reference(family):
    batch = cases.batch()
    expected = cases.run(family, "reference", batch)
    for implementation in cases.PASSES:
        found = cases.run(family, implementation, batch)
        cases.same(found, expected)
        assert "policy/clip_share" in found[0].diagnostics and found[0].loss != 0


@pytest.mark.parametrize("family, implementation", [("ppo_clip_and_k3", "xla"), ("per_sequence", "pallas")])
def test_contract(family, implementation):
    batch, (function, level) = cases.batch(5, 140), cases.FAMILIES[family]

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


def _loops(logp, batch: cases.Batch):
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


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_values_are_those_of_loops_over_floats(implementation):
    batch = cases.batch()
    loss, numbers = _loops(batch.policy["logp"], batch)
    gated, _ = cases.run("ppo_clip_and_k3", implementation, batch)
    assert gated.terms == {} and gated.extras == {} and sorted(gated.diagnostics) == sorted(numbers)
    np.testing.assert_allclose(gated.loss, loss, rtol=1e-5)
    for name, expected in numbers.items():
        np.testing.assert_allclose(gated.diagnostics[name], expected, rtol=2e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_gradient_is_the_central_difference_in_float64(implementation):
    batch = cases.batch(seed=3)
    _, gradient = cases.run("ppo_clip_and_k3", implementation, batch)
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
    for implementation in cases.IMPLEMENTATIONS:
        clipped = lambda policy, given: gate.ppo_clip(cases.per_token(policy, given), given["advantage"], 0.2, 0.2)
        call = jax.jit(functools.partial(policy_gate, clipped, implementation=implementation))
        gated = call({"logp": logs}, given, jnp.ones((1, 4), bool), weight, share)
        np.testing.assert_allclose(gated.diagnostics["policy/clip_share"], 0.5)
        assert "policy/entropy" not in gated.diagnostics and "policy/kl_reference" not in gated.diagnostics


def test_what_is_hidden_does_not_say_that_its_row_learns():
    """Without credit only hidden tokens would teach, through the row's ratio: the chosen ones are all held back."""
    batch = cases.batch(2, 20)
    batch.given["advantage"] = jnp.ones_like(batch.weight)
    of_others = lambda policy, given: jnp.where(given["advantage"] == 0, cases.per_sequence(policy, given), 0.0)
    for implementation in cases.IMPLEMENTATIONS:
        call = jax.jit(functools.partial(policy_gate, of_others, level="row", implementation=implementation))
        np.testing.assert_allclose(call(*batch).diagnostics["policy/clip_share"], 1.0, rtol=1e-6)


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_a_gate_that_forgets_the_mask_gives_hidden_tokens_no_gradient(implementation):
    batch = cases.batch(2, 20)
    forgetful = lambda policy, given: jnp.broadcast_to(policy["logp"].sum(axis=1, keepdims=True), given["mask"].shape)
    gradient = jax.jit(jax.grad(lambda policy: policy_gate(forgetful, policy, *batch[1:], level="row",
                                                           implementation=implementation).loss))(batch.policy)
    expected = jnp.where(batch.mask, jnp.where(batch.mask, batch.weight, 0.0).sum(axis=1, keepdims=True), 0.0)
    np.testing.assert_allclose(gradient["logp"], expected, rtol=1e-5)
    assert (np.asarray(gradient["logp"])[~np.asarray(batch.mask)] == 0).all()


@pytest.mark.parametrize("name", cases.RECIPES)
def test_recipes_have_the_loss_and_metrics_of_whole_arrays(name):
    factory, level = cases.RECIPES[name]
    recipe, batch = factory(), cases.batch(8, 140, seed=1)
    x, policy = cases.experience(recipe, batch, 8)
    weight, share = recipe.weighting(x), update.token_share(x)

    def recipe_gate(policy, given):
        return recipe.loss(types.SimpleNamespace(**policy), types.SimpleNamespace(**given))

    def loss(implementation, policy):
        gated = policy_gate(recipe_gate, policy, {"rollout_logp": x.rollout_logp, "fresh": x.fresh, **x.given}, x.mask,
                            weight, share, level=level, implementation=implementation)
        return gated.loss, {**gated.extras, **gated.diagnostics}

    expected = cases.on_whole_arrays(recipe, x, policy, weight, share)
    for implementation in cases.IMPLEMENTATIONS if name == "grpo" else ("pallas",):
        run = jax.jit(jax.value_and_grad(functools.partial(loss, implementation), has_aux=True))
        (total, metrics), gradient = run({"logp": policy.logp, "entropy": policy.entropy})
        cases.same((total, metrics, gradient), expected)


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["value_and_entropy", "bound_per_row", "fiber"])
def test_what_is_behind_the_mask_is_never_read_and_gets_exactly_zero(family, implementation):
    batch = cases.batch()
    clean = cases.run(family, implementation, batch)
    for garbage in (np.nan, np.inf, -1e30):
        def spoilt(x):
            if x.dtype == jnp.bool_:
                return x
            hidden = ~batch.mask if x.shape == batch.mask.shape else ~batch.mask.any(axis=1, keepdims=True)
            return jnp.where(hidden, garbage, x) if x.ndim == 2 else x

        policy, given, weight, share = jax.tree.map(spoilt, (batch.policy, batch.given, batch.weight, batch.share))
        found = cases.run(family, implementation, cases.Batch(policy, given, batch.mask, weight, share))
        cases.same(found, clean, relative=0)
        for gradient in found[1].values():
            assert (np.asarray(gradient)[~np.asarray(batch.mask)] == 0).all()


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_numbers_per_row_in_policy_get_the_sum_over_their_row(implementation):
    batch = cases.batch()
    shift = jnp.linspace(-0.2, 0.2, cases.ROWS)[:, None]
    batch.policy["shift"] = shift

    def shifted(policy, given):
        r = ratio.per_token(policy["logp"] + policy["shift"], given["rollout_logp"])
        return gate.unclipped(r, given["advantage"])

    loss = lambda policy: policy_gate(shifted, policy, *batch[1:], implementation=implementation).loss
    gradient = jax.jit(jax.grad(loss))(batch.policy)
    assert gradient["shift"].shape == (cases.ROWS, 1) and gradient["shift"][1, 0] == 0
    np.testing.assert_allclose(gradient["shift"][:, 0], gradient["logp"].sum(axis=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", cases.PASSES)
def test_only_the_loss_is_differentiable_and_the_gradient_scales(implementation):
    batch, (function, _) = cases.batch(4, 20), cases.FAMILIES["named_terms"]

    def call(policy, batch=batch):
        return policy_gate(function, policy, batch.given, batch.mask, cases.weights("named_terms", batch), batch.share,
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
    cases.same(squared, jax.tree.map(lambda x: 6 * loss * x, gradient), relative=1e-6)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(nothing))


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_nothing_chosen_is_zero(implementation):
    batch = cases.batch()
    batch = batch._replace(mask=jnp.zeros_like(batch.mask), share=jnp.zeros_like(batch.share))
    gated, gradient = cases.run("ppo_clip_and_k3", implementation, batch)
    assert gated.diagnostics.pop("policy/ratio_min") == jnp.inf
    assert all(x == 0 for x in jax.tree.leaves(gated)) and not gradient["logp"].any()


@pytest.mark.parametrize("family, shape", [
    ("bound_per_row", (1, 1)), ("bound_per_row", (3, 1)), ("per_sequence", (3, 1)), ("per_sequence", (1, 130))])
def test_odd_shapes(family, shape):
    batch = cases.batch(*shape)
    cases.same(cases.run(family, "pallas", batch), cases.run(family, "reference", batch))


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_bfloat16_is_computed_in_float32(implementation):
    batch = cases.batch()
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), batch.policy)
    gated, gradient = cases.run("ppo_clip_and_k3", implementation, batch, rounded)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    widened, _ = cases.run("ppo_clip_and_k3", "reference", batch, wide)
    assert gated.loss.dtype == jnp.float32 and gradient["logp"].dtype == jnp.bfloat16
    cases.same(gated, widened)


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_float64_stays_float64(implementation):
    with jax.enable_x64(True):
        batch = cases.batch(3, 40)
        batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if x.dtype == jnp.float32 else x, batch)
        gated, gradient = cases.run("ppo_clip_and_k3", implementation, batch)
        assert gated.loss.dtype == gradient["logp"].dtype == jnp.float64
        loss, numbers = _loops(batch.policy["logp"], batch)
        np.testing.assert_allclose(gated.loss, loss, rtol=1e-12)
        np.testing.assert_allclose([gated.diagnostics[name] for name in numbers], list(numbers.values()), rtol=1e-12)
