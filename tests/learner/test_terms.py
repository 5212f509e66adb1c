"""Named terms, marks, resampled rows and steps that follow the gradient's noise, on the policy of `recipes.toy`."""
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_jax import masked
from rl_jax.advantage import group
from rl_jax.learner import assemble, update
from rl_jax.recipe import Recipe, Rollout, Schedule, StepScale, replace
from rl_jax.weighting import aggregate
from tests.learner import tiny
from tests.recipes import toy

G = 2


def policy_term(policy, x):
    return -x.advantage * policy.logp


def value_term(policy, x):
    return (policy.values - x.reward[:, None]) ** 2


def recipe(**slots):
    return Recipe(**{"rollout": Rollout(G), "loss": policy_term,
                     "advantage": lambda x: group.centred(x.reward, x.group),
                     "weighting": lambda x: aggregate.token_mean(x.mask), "name": "terms"} | slots)


POLICY = recipe()
VALUE = recipe(loss=value_term, weighting=lambda x: 0.3 * aggregate.sequence_mean_token_mean(x.mask))
BOTH = recipe(loss=lambda policy, x: ({"policy": policy_term(policy, x), "value": value_term(policy, x)},
                                      {"loss/entropy": policy.entropy}),
              weighting=lambda x: {"policy": POLICY.weighting(x), "value": VALUE.weighting(x)})


def gradient(recipe, x, microbatches=1):
    x = assemble.with_advantage(recipe, x)
    return jax.jit(update.make_gradient(recipe, toy.evaluate, microbatches))(toy.parameters(), x)


# Named terms


def test_named_terms_add_up_to_the_recipes_of_one_term():
    """Loss and gradient of the sum; each term's own weight; each term's value among the metrics."""
    x = toy.experience(BOTH)
    (found, metrics), (policy, policy_metrics), (value, value_metrics) = (gradient(r, x) for r in (BOTH, POLICY, VALUE))
    tiny.same(found, jax.tree.map(jnp.add, policy, value), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["loss/policy"], policy_metrics["loss/total"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/value"], value_metrics["loss/total"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/total"], metrics["loss/policy"] + metrics["loss/value"], rtol=1e-5)
    mask = np.asarray(x.mask)
    entropy = np.asarray(toy.evaluate(toy.parameters(), x).entropy)[mask].mean()
    np.testing.assert_allclose(metrics["loss/entropy"], entropy, rtol=1e-5)
    loss, extras = update.batch_loss(BOTH, toy.evaluate(toy.parameters(), x), x)
    np.testing.assert_allclose([loss, extras["loss/policy"], extras["loss/value"]],
                               [metrics["loss/total"], metrics["loss/policy"], metrics["loss/value"]], rtol=1e-5)


def test_microbatches_of_named_terms_add_up():
    x = toy.experience(BOTH)
    whole, parts = (gradient(BOTH, x, pieces) for pieces in (1, 3))
    tiny.same(parts, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss, weighting, said", [
    (BOTH.loss, lambda x: {"policy": x.mask, "values": x.mask},
     r"'terms': the loss slot has the terms \['policy', 'value'\] and .* weights for \['policy', 'values'\]"),
    (BOTH.loss, lambda x: {"policy": x.mask}, r"terms \['policy', 'value'\] .* weights for \['policy'\]"),
    (BOTH.loss, lambda x: 1.0 * x.mask, r"terms \['policy', 'value'\] .* weights for no name"),
    (policy_term, BOTH.weighting, r"terms of no name .* weights for \['policy', 'value'\]")])
def test_terms_and_weights_of_other_names_are_refused_with_both_lists(loss, weighting, said):
    made = recipe(loss=loss, weighting=weighting)
    x = toy.experience(made)
    with pytest.raises(ValueError, match=said):
        update.batch_loss(made, toy.policy(x), x)


# Marks


def test_marks_see_the_whole_batch_under_microbatches():
    """The largest reward of the batch is in one micro-batch and must reach the others; the mark is a constant."""
    def marks(x):
        return {"share": jnp.broadcast_to(x.reward[:, None] / x.reward.max(), x.mask.shape),
                "mean": jnp.broadcast_to(masked.mean(x.rollout_logp, x.mask), x.mask.shape)}

    made = recipe(marks=marks, loss=lambda policy, x: -x.mark.share * policy.logp + x.mark.mean * policy.values)
    x = toy.experience(made)
    whole, parts = (gradient(made, x, pieces) for pieces in (1, 3))
    tiny.same(parts, whole, rtol=1e-5, atol=1e-6)
    in_the_loss = recipe(loss=lambda policy, x: -marks(x)["share"] * policy.logp + marks(x)["mean"] * policy.values)
    tiny.same(gradient(in_the_loss, x)[0], whole[0], rtol=1e-5, atol=1e-6)
    cut = gradient(in_the_loss, x, 3)[0]
    assert np.abs(np.asarray(cut["logits"] - whole[0]["logits"])).max() > 1e-3, "the batch is one where it shows"
    policy = toy.policy(x)
    slope = jax.grad(lambda reward: update.batch_loss(made, policy, dataclasses.replace(x, reward=reward))[0])(x.reward)
    np.testing.assert_array_equal(slope, 0.0)


def test_marks_run_after_selection_and_advantage():
    """They read the credit and the mask of what is learned from."""
    made = recipe(selection=lambda x: x.score > 0.5, marks=lambda x: {"credit": x.advantage * x.mask},
                  loss=lambda policy, x: x.mark.credit * policy.logp)
    x = assemble.with_advantage(made, toy.experience(made))
    np.testing.assert_array_equal(x.mark.credit, np.asarray(x.advantage) * np.asarray(x.mask))
    assert 0 < np.asarray(x.mask).any(axis=1).sum() < len(x.mask)
    np.testing.assert_array_equal(x.fresh, x.mask)


# Resampled rows


ROWS = jnp.asarray([0, 0, 3, 3, 5, 4, 6, 7, 9, 9, 10, 10])


def test_rows_taken_by_selection_are_those_rows_everywhere():
    """Loss and gradient of the batch that holds them; a row taken twice moves the weights twice."""
    made = recipe(selection=lambda x: ROWS)
    x = toy.experience(made)
    by_hand = jax.tree.map(lambda a: a[ROWS], dataclasses.replace(x, prompts=None, coefficients=None))
    by_hand = dataclasses.replace(by_hand, prompts=x.prompts, coefficients=x.coefficients)
    tiny.same(gradient(made, x), gradient(recipe(), by_hand), rtol=1e-6)
    policy = toy.policy(x)
    found, slope = jax.value_and_grad(lambda policy: update.batch_loss(made, policy, x)[0])(policy)
    expected, rows_slope = jax.value_and_grad(lambda policy: update.batch_loss(recipe(), policy, by_hand)[0])(
        jax.tree.map(lambda a: a[ROWS], policy))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(slope.logp, jnp.zeros_like(slope.logp).at[ROWS].add(rows_slope.logp), rtol=1e-6)
    np.testing.assert_array_equal(assemble.with_advantage(made, x).row, ROWS)


def test_microbatches_of_taken_rows_add_up():
    made = recipe(selection=lambda x: ROWS)
    whole, parts = (gradient(made, toy.experience(made), pieces) for pieces in (1, 3))
    tiny.same(parts, whole, rtol=1e-5, atol=1e-6)


# The gradient's noise


def one_token(advantage, tokens):
    """One token per prompt; credit and token given, [P]."""
    count = len(advantage)
    made = recipe(rollout=Rollout(1))
    x = jax.tree.map(lambda a: a[:count], dataclasses.replace(toy.experience(made), coefficients=None))
    mask = jnp.broadcast_to(jnp.arange(toy.TIME)[None] == 0, (count, toy.TIME))
    credit = jnp.broadcast_to(advantage[:, None], mask.shape)
    return dataclasses.replace(x, mask=mask, fresh=mask, failed=jnp.zeros(count, bool), coefficients={},
                               tokens=jnp.broadcast_to(tokens[:, None], mask.shape), given={"advantage": credit})


def scaled(pieces, scale=lambda square, variance: square / (square + variance)):
    return recipe(rollout=Rollout(1), schedule=Schedule(step_scale=StepScale(scale, pieces)))


def test_the_variance_is_estimated_without_bias():
    """All 4^4 batches of four prompts from a population of four: the mean of the estimate is the exact variance of the
    batch's gradient, its trace, whether the batch is cut in two or in four."""
    credit, token = np.array([1.0, -0.5, 2.0, 0.3]), np.array([0, 1, 2, 2])
    logits = np.asarray(toy.parameters()["logits"], np.float64)[0]
    p = np.exp(logits) / np.exp(logits).sum()
    slopes = -credit[:, None] * (np.eye(toy.VOCABULARY)[token] - p[None])
    exact = ((slopes - slopes.mean(axis=0)) ** 2).sum(axis=1).mean() / 4
    batches = np.array(list(itertools.product(range(4), repeat=4)))

    def estimate(pieces):
        run = update.make_gradient(scaled(pieces), toy.evaluate)
        return jax.jit(jax.vmap(lambda rows: run(toy.parameters(), one_token(
            jnp.asarray(credit, jnp.float32)[rows], jnp.asarray(token)[rows]))[1]["gradient/variance"]))(batches)

    for pieces in (2, 4):
        np.testing.assert_allclose(np.asarray(estimate(pieces), np.float64).mean(), exact, rtol=1e-4)


def test_equal_pieces_have_no_noise_and_the_gradient_is_the_whole_ones():
    x = one_token(jnp.ones(4), jnp.full(4, 2))
    found, metrics = jax.jit(update.make_gradient(scaled(4), toy.evaluate))(toy.parameters(), x)
    expected, _ = jax.jit(update.make_gradient(recipe(rollout=Rollout(1)), toy.evaluate))(toy.parameters(), x)
    tiny.same(found, expected, rtol=1e-5, atol=1e-7)
    assert metrics["gradient/variance"] < 1e-6


def test_pieces_and_microbatches_need_not_be_the_same():
    """Three pieces of noise in two micro-batches: the batch is cut in six, and the gradient stays."""
    x = assemble.with_advantage(recipe(), toy.experience(recipe()))
    made = recipe(schedule=Schedule(step_scale=StepScale(lambda square, variance: 1.0, 3)))
    found, metrics = jax.jit(update.make_gradient(made, toy.evaluate, 2))(toy.parameters(), x)
    expected, whole = jax.jit(update.make_gradient(recipe(), toy.evaluate))(toy.parameters(), x)
    tiny.same(found, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["loss/total"], whole["loss/total"], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="6 prompts cannot be cut into 4 pieces"):
        jax.eval_shape(update.make_gradient(scaled(4), toy.evaluate), toy.parameters(), x)


def test_the_step_follows_the_signal_to_noise_ratio():
    """Noise that cancels in the batch leaves the gradient and raises its variance: the same step, but shorter."""
    optimiser, start = optax.sgd(0.5), toy.parameters()
    run = jax.jit(update.make_update(scaled(4), toy.evaluate, optimiser))
    plain = jax.jit(update.make_update(recipe(rollout=Rollout(1)), toy.evaluate, optimiser))
    factors = []
    for noise in (0.0, 0.5, 1.0, 4.0):
        x = one_token(1.0 + noise * jnp.array([1.0, -1.0, 1.0, -1.0]), jnp.full(4, 2))
        parameters, _, metrics = run(start, optimiser.init(start), x)
        whole = plain(start, optimiser.init(start), x)[0]
        norm, variance, factor = (float(metrics[name]) for name in (
            "gradient/norm", "gradient/variance", "optimiser/step_scale"))
        assert factor == pytest.approx(norm**2 / (norm**2 + variance), rel=1e-4)
        moved, expected = (np.asarray(p["logits"] - start["logits"]) for p in (parameters, whole))
        np.testing.assert_allclose(moved, factor * expected, rtol=1e-3, atol=1e-6)
        factors.append(factor)
    assert factors[0] == pytest.approx(1.0) and all(np.diff(factors) < -0.01)
