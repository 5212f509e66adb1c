"""GTPO, APO, Q-Hawkeye, TempSamp-R1 and PF-PPO as whole algorithms.

Losses against loops over Python floats written from the formula sheets, what the sheets say each
reduces to, and the checks of the catalogue of papers.
"""
import dataclasses
import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.learner import assemble, update
from rl_jax.recipe import Rollout, replace
from rl_jax.recipes.advantage import apo_asymmetric, q_hawkeye
from rl_jax.recipes.baselines import grpo, ppo
from rl_jax.recipes.rollout import tempsamp_mixed_group
from rl_jax.recipes.selection import pf_ppo
from rl_jax.recipes.weighting import gtpo_trajectory
from rl_jax.schedule import first
from rl_jax.selection import resample
from rl_jax.types import Evaluated
from rl_jax.weighting import aggregate
from tests.recipes import test_oracles, toy


class Batch(test_oracles.Batch):
    """The toy batch with what more these recipes read."""

    def __init__(self, recipe, **fields):
        super().__init__(recipe)
        x, policy = self.arrays
        self.arrays = dataclasses.replace(x, **fields), policy
        self.token_ids, self.entropy = np.asarray(x.tokens), np.asarray(x.rollout_entropy, np.float64)
        self.of |= {name: np.asarray(values, np.float64) for name, values in (x.views or {}).items()}

    def k3(self, i, t, other):
        away = self.of["logp"][i, t] - self.of[other][i, t]
        return math.exp(-away) + away - 1

    def centred(self, i):
        of = [self.score[j] for j in self.peers(i)]
        return self.score[i] - (statistics.mean(of) if len(of) > 1 else 0.0)

    def zscore(self, i, epsilon):
        of = [self.score[j] for j in self.peers(i)]
        return self.centred(i) / (statistics.stdev(of) + epsilon if len(of) > 1 else 1.0)

    def mean_over(self, i, number):
        numbers = [number(i, t) for t in self.tokens(i)]
        return sum(numbers) / max(len(numbers), 1)

    def mean_of_means(self, number):
        return sum(self.mean_over(i, number) for i in self.rows) / len(self.rows)


def in_run(batch, i, t):
    """Whether the token stands in a run of conflict tokens from the answer's start or end."""
    def answer(j, step):
        return [int(batch.token_ids[j, place]) for place in batch.tokens(j)][::step]

    for step in (1, -1):
        rank = batch.tokens(i)[::step].index(t)
        for position in range(rank + 1):
            same = [j for j in batch.peers(i) if answer(j, step)[position:position + 1]
                    == answer(i, step)[position:position + 1]]
            if not any(batch.centred(j) > 0 for j in same) or not any(batch.centred(j) < 0 for j in same):
                break
        else:
            return True
    return False


def oracle_gtpo(batch, initial=None, boost=2.0, gamma=0.1, threshold=math.log(2)):
    def mean_entropy(i):
        return batch.mean_over(i, lambda i, t: batch.entropy[i, t])

    initial = batch.token_mean(lambda i, t: batch.entropy[i, t]) if initial is None else initial
    total, found = 0.0, {"shared": 0, "left out": 0}
    for i in batch.rows:
        if initial <= threshold < mean_entropy(i):
            found["left out"] += 1
            continue
        for t in batch.tokens(i):
            weight = 1.0
            if in_run(batch, i, t) and batch.centred(i):
                found["shared"] += 1
                weight = boost if batch.centred(i) > 0 else 0.0
            total -= weight * (batch.centred(i) - gamma * mean_entropy(i)) / len(batch.tokens(i))
    assert found["shared"] > 10 and (found["left out"] > 5) == (initial <= threshold)
    return total / len(batch.rows)


def oracle_apo(batch, clip=0.2, beta=1e-3, rate=math.e, base=1.00001):
    def credit(i):
        right = [j for j in batch.peers(i) if batch.score[j] >= 1]
        a = batch.zscore(i, 1e-9)
        excess = len(batch.tokens(i)) - statistics.mean(len(batch.tokens(j)) for j in right) if right else 0.0
        return a * (2 - base**-excess) if batch.score[i] < 1 and excess > 0 else a

    def kappa(i):
        share = sum(batch.score[j] >= 1 for j in batch.peers(i)) / len(batch.peers(i))
        return 1 - math.exp(-rate * share) if batch.zscore(i, 1e-9) > 0 and 0 < share < 1 else 1.0

    policy = batch.token_mean(lambda i, t: batch.clipped(i, t, credit(i), clip, clip))
    return policy + beta * batch.mean_of_means(lambda i, t: kappa(i) * batch.k3(i, t, "reference_logp"))


def oracle_hawkeye(batch, alpha=0.2, beta=0.04, gamma=1e-4, prediction=None, lowest=0.0, highest=1.0):
    said = batch.score if prediction is None else prediction

    def weight(i):
        read = [min(max(said[j], lowest), highest) for j in batch.peers(i) if not math.isnan(said[j])]
        variance = statistics.pvariance(read) if len(read) > 1 else 0.0
        return math.exp(-alpha * min(variance / (0.25 * (highest - lowest) ** 2 + 1e-8), 1.0))

    def policy(i, t):
        return -weight(i) * batch.zscore(i, 1e-4) + beta * batch.k3(i, t, "reference_logp")

    gap = batch.token_mean(lambda i, t: min(batch.k3(i, t, "degraded"), 10.0))
    return batch.mean_of_means(policy) - gamma * gap


def oracle_tempsamp(batch, form=None, threshold=0.8, above=0.01, below=1.0, beta=0.04):
    def reward(r):
        if r >= threshold:
            return threshold + above * math.log(r - threshold + 1)
        return threshold - (math.exp(below * (threshold - r)) - 1) / (math.exp(below) - 1) if below > 0 else r

    def loss(i, t):
        away = beta * batch.k3(i, t, "reference_logp") if beta else 0.0
        return batch.clipped(i, t, batch.zscore(i, 1e-6), 0.2, 0.2) + away

    batch.score = [reward(r) + (0.1 * form[i] if form is not None else 0.0) for i, r in enumerate(batch.score)]
    batch.of["old"] = batch.of["old_logp"]
    return batch.mean_of_means(loss)


def loss_of(recipe, batch):
    x, policy = batch.arrays
    return jax.jit(lambda policy, x: update.batch_loss(recipe, policy, x))(policy, x)[0]


@functools.cache
def numbers(seed):
    return np.random.default_rng(seed).random(64)


ROWS = 8 * toy.PROMPTS
FORMAT = jnp.asarray(numbers(0)[:ROWS] < 0.5, jnp.float32)
PREDICTION = np.where(numbers(1)[:4 * toy.PROMPTS] < 0.2, np.nan, 1 + 4 * numbers(2)[:4 * toy.PROMPTS])


@pytest.mark.parametrize("recipe, fields, oracle, options", [
    (gtpo_trajectory.gtpo_trajectory(), {}, oracle_gtpo, {}),
    (gtpo_trajectory.gtpo_trajectory(boost=3.0, gamma=0.5), {"coefficients": {"initial_entropy": jnp.float32(0.5)}},
     oracle_gtpo, {"initial": 0.5, "boost": 3.0, "gamma": 0.5}),
    (apo_asymmetric.apo_asymmetric(), {}, oracle_apo, {}),
    (apo_asymmetric.apo_asymmetric(beta=0.5, base=1.5, rate=1.0), {}, oracle_apo,
     {"beta": 0.5, "base": 1.5, "rate": 1.0}),
    (q_hawkeye.q_hawkeye(), {}, oracle_hawkeye, {}),
    (q_hawkeye.q_hawkeye(alpha=1.0, gamma=0.5, prediction="quality", lowest=1.0, highest=5.0),
     {"parts": {"quality": jnp.asarray(PREDICTION, jnp.float32)}}, oracle_hawkeye,
     {"alpha": 1.0, "gamma": 0.5, "prediction": PREDICTION.tolist(), "lowest": 1.0, "highest": 5.0}),
    (tempsamp_mixed_group.tempsamp_mixed_group(), {}, oracle_tempsamp, {}),
    (tempsamp_mixed_group.tempsamp_mixed_group(threshold=0.5, below=3.0, beta=0.0), {"parts": {"format": FORMAT}},
     oracle_tempsamp, {"form": FORMAT.tolist(), "threshold": 0.5, "below": 3.0, "beta": 0.0}),
], ids=lambda value: getattr(value, "name", None))
def test_the_loss_is_that_of_the_formula_sheet(recipe, fields, oracle, options):
    batch = Batch(recipe, **fields)
    np.testing.assert_allclose(loss_of(recipe, batch), oracle(batch, **options), rtol=1e-5, atol=1e-6)


def pf_batch(**options):
    recipe = pf_ppo.pf_ppo(**options)
    return recipe, Batch(recipe)


@pytest.mark.parametrize("options", [{}, {"best": 0.4, "worst": 0.1, "rest": 0.1}])
def test_pf_ppo_is_ppo_on_the_rows_that_it_draws(options):
    # Formula sheet of PF-PPO: after the draw ordinary PPO, without any weight for what was drawn how often.
    recipe, batch = pf_batch(**options)
    x, policy = batch.arrays
    row = np.asarray(recipe.selection(x))
    np.testing.assert_array_equal(batch.group[row], batch.group)
    if not options:
        for i in row:
            of = [batch.score[j] for j in batch.peers(i)]
            assert batch.score[i] in (max(of), min(of))
    found = loss_of(recipe, batch)
    batch.mask, batch.score = batch.mask[row], [batch.score[j] for j in row]
    batch.of = {name: values[row] for name, values in batch.of.items()}
    np.testing.assert_allclose(found, test_oracles.oracle_ppo(batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("selection", [lambda x: jnp.ones(x.reward.shape, bool),
                                       lambda x: jnp.arange(x.reward.shape[0])])
def test_a_filter_that_keeps_all_is_ppo(selection):
    recipe, batch = pf_batch()
    plain = replace(ppo.ppo(), rollout=Rollout(5))
    x, policy = batch.arrays
    found, expected = (jax.value_and_grad(lambda policy, r=r: update.batch_loss(r, policy, x)[0])(policy)
                       for r in (replace(recipe, selection=selection), plain))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_filter_without_repetition_leaves_two_answers_per_prompt():
    recipe, batch = pf_batch()
    x, policy = batch.arrays
    recipe = replace(recipe, selection=lambda x: resample.best_and_another(x.reward, x.group, x.seed))
    gradient = jax.grad(lambda policy: update.batch_loss(recipe, policy, x)[0])(policy)
    taught = np.abs(gradient.logp).sum(axis=1) > 0
    for i in batch.rows:
        assert taught[batch.peers(i)].sum() <= 2
    assert taught.sum() > toy.PROMPTS


def values_and_gradient(recipe, x, policy):
    # not compiled as a whole: the same operations in the same order give the same bits
    return jax.value_and_grad(lambda policy: update.batch_loss(recipe, policy, x)[0])(policy)


def test_apo_without_its_two_shapings_is_grpo_with_a_kl_bit_for_bit():
    recipe = apo_asymmetric.apo_asymmetric(rate=math.inf, base=1.0)
    plain = grpo.grpo(beta=0.0, epsilon=1e-9)
    named = replace(recipe, advantage=plain.advantage, weighting=lambda x: {
        "policy": aggregate.token_mean(x.mask), "kl": aggregate.sequence_mean_token_mean(x.mask)})
    batch = Batch(recipe)
    found, expected = (values_and_gradient(r, *batch.arrays) for r in (recipe, named))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_apo_without_its_two_shapings_is_grpo_with_a_token_mean_where_lengths_are_equal():
    # Formula sheet of APO, "reduces to".
    recipe = apo_asymmetric.apo_asymmetric(rate=math.inf, base=1.0)
    plain = replace(grpo.grpo(beta=1e-3, epsilon=1e-9), weighting=lambda x: aggregate.token_mean(x.mask))
    batch = Batch(recipe)
    x, policy = batch.arrays
    x = dataclasses.replace(x, mask=jnp.ones_like(x.mask))
    found, expected = (values_and_gradient(r, x, policy) for r in (recipe, plain))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), found, expected)


def test_q_hawkeye_without_its_two_parts_is_grpo_before_the_policy_moves():
    # Formula sheet of Q-Hawkeye, "reduces to": alpha = gamma = 0.
    recipe = q_hawkeye.q_hawkeye(alpha=0.0, gamma=0.0)
    x, policy = Batch(recipe).arrays
    policy = dataclasses.replace(policy, logp=x.rollout_logp)
    found, expected = (values_and_gradient(r, x, policy) for r in (recipe, grpo.grpo(epsilon=1e-4)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), found, expected)


def test_the_perception_term_is_zero_where_both_prompts_say_the_same():
    recipe = q_hawkeye.q_hawkeye(share=0.0)
    x, policy = Batch(recipe).arrays
    clean = toy.prompts(5)
    np.testing.assert_array_equal(recipe.views["degraded"](clean, jnp.arange(5, dtype=jnp.uint32)).tokens, clean.tokens)
    _, extras = update.batch_loss(recipe, policy, dataclasses.replace(x, views={"degraded": policy.logp}))
    assert extras["loss/perception"] == 0.0
    assert update.batch_loss(recipe, policy, x)[1]["loss/perception"] < 0.0


def test_the_perception_weight_falls_to_zero():
    control = q_hawkeye.q_hawkeye(gamma=0.3, batches=4).schedule.controls["gamma"]
    state, found = control.init(64), []
    for _ in range(6):
        found.append(float(control.read(state)))
        state = control.update(state, None, None, {})
    np.testing.assert_allclose(found, [0.3 * (1 + math.cos(math.pi * min(k, 4) / 4)) / 2 for k in range(6)], atol=1e-8)


def test_gtpo_runs_no_other_model():
    recipe = gtpo_trajectory.gtpo_trajectory()
    assert recipe.models == () and not recipe.views


def gtpo_of(recipe, tokens, entropy, reward, initial=0.5):
    """Gradient in the log-probability for answers to one prompt of 4 tokens each."""
    mask, zero = jnp.ones((4, 4), bool), jnp.zeros((4, 4))
    x = assemble.of_arrays(zero, mask, jnp.asarray(reward), jnp.zeros(4, int), tokens=jnp.asarray(tokens),
                           rollout_entropy=jnp.broadcast_to(jnp.asarray(entropy)[:, None], (4, 4)))
    x = dataclasses.replace(x, coefficients={"initial_entropy": jnp.float32(initial)})
    return values_and_gradient(recipe, x, Evaluated(logp=zero, entropy=zero))[1].logp


def test_gtpo_on_a_group_with_a_shared_beginning():
    # By hand: two right and two wrong answers, (A - gamma H) lambda / (n G). The second wrong one was drawn in doubt:
    # it is left out, and the tokens that it shares are in conflict all the same.
    found = gtpo_of(gtpo_trajectory.gtpo_trajectory(), [[1, 2, 3, 4], [1, 2, 5, 6], [1, 9, 7, 8], [1, 2, 7, 7]],
                    [0.2, 0.4, 0.3, 0.9], [1.0, 1.0, 0.0, 0.0])
    weight = [[2, 2, 1, 1], [2, 2, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]]
    credit = np.array([0.5 - 0.02, 0.5 - 0.04, -0.5 - 0.03, -0.5 - 0.09])
    np.testing.assert_allclose(found, -credit[:, None] * weight / 16, rtol=1e-5)


def test_gtpo_where_all_rewards_are_equal_lowers_its_own_tokens_by_their_entropy():
    # Formula sheet of GTPO, "degenerate".
    entropy = np.array([0.2, 0.4, 0.3, 0.6])
    found = gtpo_of(gtpo_trajectory.gtpo_trajectory(), np.ones((4, 4), int), entropy, [1.0] * 4)
    np.testing.assert_allclose(found, np.outer(0.1 * entropy / 16, np.ones(4)), rtol=1e-5)


def test_gtpo_without_its_parts_is_a_centred_reward_with_a_mean_per_answer():
    # Formula sheet of GTPO, "reduces to": gamma = 0, lambda = 1 (answers that share nothing), no filter.
    recipe = gtpo_trajectory.gtpo_trajectory(gamma=0.0, threshold=math.inf)
    found = gtpo_of(recipe, np.arange(16).reshape(4, 4), [0.2, 5.0, 0.3, 0.6], [1.0, 0.5, 0.0, 0.0])
    credit = np.array([1.0, 0.5, 0.0, 0.0]) - 0.375
    np.testing.assert_allclose(found, np.outer(-credit / 16, np.ones(4)), rtol=1e-5)


def test_gtpo_remembers_the_entropy_of_the_first_batch():
    control = gtpo_trajectory.gtpo_trajectory().schedule.controls["initial_entropy"]
    x, _ = Batch(gtpo_trajectory.gtpo_trajectory()).arrays
    plain = first.token_mean(lambda x: x.rollout_entropy)
    assert control.read(control.init(8)) == jnp.inf
    state = control.update(control.init(8), x, None, {})
    np.testing.assert_array_equal(state, plain.update(plain.init(8), x, None, {}))
    np.testing.assert_allclose(state, np.asarray(x.rollout_entropy)[np.asarray(x.mask)].mean(), rtol=1e-5)


def tempsamp_advantage(score, recipe=None):
    recipe = tempsamp_mixed_group.tempsamp_mixed_group(group_size=len(score)) if recipe is None else recipe
    x = assemble.of_arrays(jnp.zeros((len(score), 1)), jnp.ones((len(score), 1), bool), jnp.asarray(score),
                           jnp.zeros(len(score), int))
    return assemble.with_advantage(recipe, x).advantage[:, 0]


def test_a_group_of_all_poor_answers_learns_from_the_given_one():
    found = tempsamp_advantage([0.2, 0.2, 0.2, 1.0])
    assert (found[:3] < -0.4).all() and found[3] > 1.4
    np.testing.assert_array_equal(tempsamp_advantage([0.2] * 4), 0.0)  # formula sheet, "degenerate"


def test_a_near_perfect_answer_is_worth_a_given_one():
    # What the bend is for: with plain scores .9 beside 1 has hardly any credit, with bent ones almost the same.
    plain = replace(tempsamp_mixed_group.tempsamp_mixed_group(group_size=4), reward=None)
    bent, unbent = tempsamp_advantage([0.0, 0.4, 0.9, 1.0]), tempsamp_advantage([0.0, 0.4, 0.9, 1.0], plain)
    assert bent[3] - bent[2] < 0.01 < unbent[3] - unbent[2]


def test_tempsamp_without_its_parts_is_grpo():
    # Formula sheet of TempSamp-R1, "reduces to": no given answer, the identity map.
    recipe = replace(tempsamp_mixed_group.tempsamp_mixed_group(), reward=None, rollout=Rollout(8))
    x, policy = Batch(recipe).arrays
    x = dataclasses.replace(x, given={**x.given, "old_logp": x.rollout_logp})
    found, expected = (values_and_gradient(r, x, policy) for r in (recipe, grpo.grpo()))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9), found, expected)


def test_a_group_of_one_has_no_room_for_a_given_answer():
    with pytest.raises(ValueError, match="group_size"):
        tempsamp_mixed_group.tempsamp_mixed_group(group_size=1)
