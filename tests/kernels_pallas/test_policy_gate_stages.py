"""Gates of sums over rows, in stages: rows of any length, and ratios over groups of rows."""
import functools

import contract
import jax
import jax.numpy as jnp
import numpy as np
import policy_gate_cases as cases
import pytest
from policy_gate_cases import small_blocks  # noqa: F401  (a fixture for every test here)

from kernels_pallas.policy_gate.op import staged_gate
from rl_jax.learner import assemble, update
from rl_jax.loss import fiber, gate
from rl_jax.recipes.loss import fiberpo, fiberpo_domain, gspo


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
    recipe, batch = STAGED[name][0](), cases.batch(16, 290, seed=2)
    x, policy = cases.experience(recipe, batch, 16)
    # Some answers weigh nothing: their tokens are not clipped for that.
    weight, share = jnp.where(jnp.arange(16)[:, None] % 3 == 0, 0.0, recipe.weighting(x)), update.token_share(x)
    arrays = {"logp": policy.logp, "entropy": policy.entropy}

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, x, arrays):
        loss = _staged(name, implementation, x, recipe, arrays, weight, share)
        (total, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(arrays)
        return (total, metrics, gradient), loss(arrays) if name == "gspo" else (total, metrics)

    expected = cases.on_whole_arrays(recipe, x, policy, weight, share)
    assert name != "gspo" or 0 < expected[1]["policy/clip_share"] < 1
    for implementation in cases.IMPLEMENTATIONS if name == "gspo" else cases.PASSES:
        found, values = run(implementation, x, arrays)
        cases.same(found, expected, relative=2e-5)
        cases.same(values, expected[:2], relative=2e-5)


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_stages_sum_over_chosen_tokens_only(implementation):
    """The mean of the ratios of a row's chosen tokens, whose derivative is ratio / number: 1 is not 0 when hidden."""
    batch = cases.batch(3, 140)
    batch = batch._replace(mask=batch.mask.at[1, :3].set(True))
    statistics = lambda policy, given: {"ratio": cases.per_token(policy, given)}
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


@pytest.mark.parametrize("device", contract.DEVICES)
@pytest.mark.parametrize("name", STAGED)
def test_stages_lower(name, device):
    recipe = STAGED[name][0]()

    def run(policy, given, mask, weight, share, group):
        named = {name: given[name] for name in ("fresh", "advantage")}
        x = assemble.of_arrays(given["rollout_logp"], mask, jnp.zeros(512), group, domain=group // 8, **named)
        loss = _staged(name, None, x, recipe, policy, weight, share)
        return loss(policy), jax.grad(loss, has_aux=True)(policy)

    contract.check_lowering(device, run, *cases.shapes(512, 32768), jax.ShapeDtypeStruct((512,), jnp.int32))


def test_bad_stages():
    batch = cases.batch(2, 20)
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
            ({"statistics": cases.FAMILIES["fiber"][0]}, "joins tokens"),
            ({"gated": cases.FAMILIES["fiber"][0]}, "joins tokens"),
            ({"gated": lambda policy, given: jax.lax.erf(policy["logp"]), "implementation": "pallas"}, "'erf'"),
            ({"gated": lambda policy, given: policy["logp"] * batch.weight}, "closes over 'weight'|closes over")):
        with pytest.raises(ValueError, match=message):
            call(**options)
