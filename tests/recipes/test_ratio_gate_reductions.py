"""What the formula sheets say a baseline, ratio or gate recipe reduces to, in value and gradient, and their numbers."""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.advantage import group, temporal
from rl_jax.learner import assemble, update
from rl_jax.loss import gate, ratio, score
from rl_jax.recipe import replace
from rl_jax.recipes.baselines import dr_grpo, grpo, ppo, ppo_dual_clip, reinforce, reinforce_pp, reinforce_pp_baseline
from rl_jax.recipes.loss import cispo, dhpo, dhpo_entropy, gmpo, gspo, gspo_token, sapo_soft_gate
from rl_jax.recipes.weighting import luspo
from rl_jax.types import Evaluated
from tests.recipes import toy
from tests.recipes.test_ratio_gate_oracles import Batch

# Recipes on the same batch, groups of four. Bands in the middle of what the policy has moved.
FOUR = {"group_size": 4}
BAND = {"clip_low": 0.1, "clip_high": 0.15}
GRPO = grpo.grpo(**FOUR, beta=0.0)
HERE, FAR = 0.0, 1.0


def answers(far, tokens=None):
    """The toy batch and a policy; each answer's first `tokens` positions, or the drawn ones."""
    x, policy = Batch(GRPO, far).arrays
    if tokens is not None:
        mask = jnp.broadcast_to(jnp.arange(toy.TIME)[None] < tokens, x.mask.shape)
        x = dataclasses.replace(x, mask=mask, fresh=mask)
    return x, policy


def value_and_slope(recipe, x, policy):
    return jax.jit(jax.value_and_grad(
        lambda logp: update.batch_loss(recipe, dataclasses.replace(policy, logp=logp), x)[0]))(policy.logp)


def same(one, other, x, policy, times=1.0):
    """Both give the same loss and the same gradient, `times` as large; returns them."""
    found, expected = value_and_slope(one, x, policy), value_and_slope(other, x, policy)
    np.testing.assert_allclose(found[0], times * expected[0], rtol=1e-5, atol=1e-6)
    same_slope(found[1], times * expected[1])
    return found


def same_slope(found, expected):
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)


def surrogate(of, form, **options):
    """The recipe with another loss of ratio (`form`) and credit."""
    def loss(policy, x):
        return options.get("clip", gate.unclipped)(form(policy, x), x.advantage)

    return replace(of, loss=loss)


def token_ratio(policy, x):
    return ratio.per_token(policy.logp, x.rollout_logp)


def sequence_ratio(policy, x):
    return ratio.per_sequence(policy.logp, x.rollout_logp, x.mask)


def as_reinforce(of):
    return replace(of, loss=lambda policy, x: score.policy_gradient(policy.logp, x.advantage))


@pytest.mark.parametrize("far", [HERE, FAR])
def test_gspo_token_is_gspo_for_one_credit_per_answer(far):
    _, slope = same(gspo_token.gspo_token(**FOUR, **BAND), gspo.gspo(**FOUR, **BAND), *answers(far))
    clipped = (np.asarray(slope) == 0).all(axis=1)
    assert far == HERE or clipped[2:-1].any() and not clipped[2:-1].all()


def test_gspo_of_one_token_is_grpo():
    same(gspo.gspo(**FOUR, clip_low=0.2, clip_high=0.2), GRPO, *answers(FAR, 1))


def dhpo_of(share, form):
    return replace(dhpo.dhpo(**FOUR), loss=lambda policy, x: form(
        token_ratio(policy, x), ratio.per_sequence_token(policy.logp, x.rollout_logp, x.mask), x.advantage, share,
        clip=0.2, sequence_low=0.1, sequence_high=0.15))


@pytest.mark.parametrize("form", [gate.ppo_clip_of_mixture, gate.mixture_of_ppo_clips])
@pytest.mark.parametrize("share, end", [(1.0, GRPO), (0.0, gspo_token.gspo_token(**FOUR, **BAND))])
def test_dhpo_ends_in_grpo_and_in_gspo_token(form, share, end):
    same(dhpo_of(share, form), end, *answers(FAR))


@pytest.mark.parametrize("share, end", [(1.0, GRPO), (0.0, gspo_token.gspo_token(**FOUR))])
def test_the_dhpo_recipes_end_there_too(share, end):
    x, policy = answers(FAR)
    same(dhpo.dhpo(**FOUR, share=share), end, x, policy)
    # All tokens as uncertain as the most uncertain of them, or none uncertain at all: then the share is 0.
    even = dataclasses.replace(x, rollout_entropy=jnp.full(x.mask.shape, 0.7 * share))
    same(dhpo_entropy.dhpo_entropy(**FOUR), end, even, policy)


@pytest.mark.parametrize("recipe", [
    GRPO, dr_grpo.dr_grpo(**FOUR, length=6), reinforce_pp_baseline.reinforce_pp_baseline(**FOUR), gspo.gspo(**FOUR),
    gspo_token.gspo_token(**FOUR), gmpo.gmpo(**FOUR), cispo.cispo(**FOUR), sapo_soft_gate.sapo_soft_gate(**FOUR),
    dhpo.dhpo(**FOUR), luspo.luspo(**FOUR)], ids=lambda recipe: recipe.name)
def test_where_the_policy_has_not_moved_the_gradient_is_reinforces(recipe):
    """REINFORCE with the recipe's own credit and weights; the values differ."""
    x, policy = answers(HERE)
    found, expected = value_and_slope(recipe, x, policy), value_and_slope(as_reinforce(recipe), x, policy)
    same_slope(found[1], expected[1])


def test_sapo_with_a_small_temperature_is_the_surrogate_without_a_gate():
    x, policy = answers(FAR)
    soft = sapo_soft_gate.sapo_soft_gate(**FOUR, positive=1e-3, negative=1e-3)
    np.testing.assert_allclose(value_and_slope(soft, x, policy)[1],
                               value_and_slope(surrogate(GRPO, token_ratio), x, policy)[1], rtol=1e-4, atol=1e-7)


def test_one_wild_token_closes_sapos_gate_for_itself_and_gspos_for_all():
    x, policy = answers(HERE, toy.TIME)
    policy = dataclasses.replace(policy, logp=policy.logp.at[:, 2].add(3.0))
    credit = np.asarray(group.zscore(x.reward, x.group))
    good = np.flatnonzero(credit > 0.1)
    others = np.array([0, 1, 3, 4, 5])
    soft, hard = (np.asarray(value_and_slope(one, x, policy)[1])[good]
                  for one in (sapo_soft_gate.sapo_soft_gate(**FOUR), gspo.gspo(**FOUR)))
    np.testing.assert_array_equal(hard, 0.0)
    np.testing.assert_allclose(soft[:, others] * x.mask.size, -credit[good, None] * np.ones(5), rtol=1e-4)
    assert (np.abs(soft[:, 2]) < 1e-3 * np.abs(soft[:, 0])).all()


def test_luspo_is_n_times_gspo_when_all_answers_have_n_tokens():
    same(luspo.luspo(**FOUR, **BAND), gspo.gspo(**FOUR, **BAND), *answers(FAR, toy.TIME), times=toy.TIME)


def test_gmpo_without_bounds_is_gspo_without_a_clip():
    without = gmpo.gmpo(**FOUR, clip_low=math.inf, clip_high=math.inf)
    same(without, surrogate(gspo.gspo(**FOUR), sequence_ratio), *answers(FAR))


def test_gmpo_of_one_token_is_the_clip_with_the_band_in_nats():
    band = functools.partial(gate.ppo_clip, low=1 - math.exp(-0.1), high=math.exp(0.2) - 1)
    same(gmpo.gmpo(**FOUR, clip_low=0.1, clip_high=0.2), surrogate(GRPO, token_ratio, clip=band), *answers(FAR, 1))


def test_cispo_without_a_cap_is_reinforce_with_importance_sampling():
    """In the gradient, which is that of the surrogate without a clip; where PPO's is 0, CISPO's is not."""
    x, policy = answers(FAR)
    capless = cispo.cispo(**FOUR, cap=math.inf)
    without = surrogate(capless, token_ratio)
    same_slope(value_and_slope(capless, x, policy)[1], value_and_slope(without, x, policy)[1])
    capped, clipped = (np.asarray(value_and_slope(one, x, policy)[1]) for one in (cispo.cispo(**FOUR, cap=1.1), GRPO))
    assert (clipped[np.asarray(x.mask)] == 0).any() and (capped[np.asarray(x.mask)] != 0).all()


def test_dr_grpo_is_grpo_with_each_credit_times_its_groups_spread():
    """Where all answers are as long as the budget; epsilon 0, no KL."""
    scaled = replace(grpo.grpo(**FOUR, beta=0.0, epsilon=0.0), advantage=lambda x: group.std(x.reward, x.group)
                     * group.zscore(x.reward, x.group, epsilon=0.0))
    same(dr_grpo.dr_grpo(**FOUR, length=toy.TIME), scaled, *answers(FAR, toy.TIME))


def test_reinforce_is_ppos_first_step():
    """With the same credit and weights: the gradients agree, the values (-A logp, -A) do not."""
    x, policy = answers(HERE)
    one = reinforce.reinforce(**FOUR, baseline=0.3)
    clip_of_it = surrogate(one, token_ratio, clip=functools.partial(gate.ppo_clip, low=0.2, high=0.2))
    found, expected = value_and_slope(clip_of_it, x, policy), value_and_slope(one, x, policy)
    same_slope(found[1], expected[1])
    assert abs(found[0] - expected[0]) > 0.1


def test_ppo_with_decay_1_and_a_constant_critic_is_reinforce_with_that_baseline():
    """At ratio 1, before whitening, with the same weights."""
    def credit(x):
        return temporal.gae(temporal.at_last_token(x.reward, x.mask), x.values, x.mask, 1.0, 1.0)

    one = replace(ppo.ppo(decay=1.0), advantage=credit)
    other = replace(reinforce.reinforce(baseline=0.4), weighting=one.weighting)
    x, policy = Batch(one, HERE).arrays
    x = dataclasses.replace(x, given={"values": jnp.full(x.mask.shape, 0.4)})
    same_slope(value_and_slope(one, x, policy)[1], value_and_slope(other, x, policy)[1])


def test_ppo_with_a_dual_clip_is_ppo_below_the_ceiling():
    one, other = ppo_dual_clip.ppo_dual_clip(ceiling=1e9), ppo.ppo()
    same(one, other, *Batch(one, 6).arrays)


def test_reinforce_pp_of_equal_rewards_teaches_nothing():
    """Formula sheet: a batch of identical tokens has no contrast."""
    for one in (reinforce_pp.reinforce_pp(**FOUR, beta=0.0), reinforce_pp_baseline.reinforce_pp_baseline(**FOUR)):
        x, policy = answers(FAR)
        x = dataclasses.replace(x, score=jnp.ones_like(x.score), reward=jnp.ones_like(x.reward))
        np.testing.assert_allclose(value_and_slope(one, x, policy)[1], 0.0, atol=1e-6)


# Worked examples of the formula sheets, as whole batches.
def of_arrays(mask, reward, prompt):
    mask = jnp.asarray(mask, bool)
    x = assemble.of_arrays(-jnp.ones(mask.shape), mask, jnp.asarray(reward, jnp.float32), jnp.asarray(prompt))
    return x, Evaluated(logp=x.rollout_logp, entropy=jnp.zeros(mask.shape))


def test_reinforce_worked_example():
    # Two arms, logits 0, arm 0 drawn, R = 1.
    x, policy = of_arrays([[1]], [1.0], [0])

    def loss(logits):
        logp = jax.nn.log_softmax(logits)[:1][None]
        return update.batch_loss(reinforce.reinforce(), dataclasses.replace(policy, logp=logp), x)[0]

    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(2)), [-0.5, 0.5])


@pytest.mark.parametrize("recipe, value, slopes", [
    (luspo.luspo(group_size=2), 2.0, (-0.5, 0.5)), (gspo.gspo(group_size=2), 0.0, (-0.25, 1 / 12))])
def test_luspo_worked_example(recipe, value, slopes):
    # On-policy, lengths (2, 6), A = (1, -1).
    recipe = replace(recipe, advantage=lambda x: x.reward)
    loss, slope = value_and_slope(recipe, *of_arrays(np.arange(6)[None] < [[2], [6]], [1.0, -1.0], [0, 0]))
    np.testing.assert_allclose(loss, value, atol=1e-6)
    np.testing.assert_allclose(slope, [[slopes[0]] * 2 + [0] * 4, [slopes[1]] * 6], rtol=1e-5)


def test_reinforce_pp_baseline_worked_example():
    # Two groups (1, 0) and (5, 5), one token each: spread over the batch, not per group (+-.7071).
    recipe = reinforce_pp_baseline.reinforce_pp_baseline(group_size=2)
    _, slope = value_and_slope(recipe, *of_arrays(np.ones((4, 1)), [1.0, 0.0, 5.0, 5.0], [0, 0, 1, 1]))
    np.testing.assert_allclose(-4 * slope[:, 0], [1.2247, -1.2247, 0, 0], atol=1e-4)


def test_reinforce_pp_carries_the_reward_through_tool_output():
    """What earlier turns earn does not stop at a tool's tokens, and these take no time."""
    x, _ = of_arrays([[1, 0, 0, 1], [1, 1, 1, 1]], [1.0, 0.0], [0, 1])
    recipe = reinforce_pp.reinforce_pp(beta=0.0, discount=0.5)
    returns = np.array([0.5, 1.0, 0.0, 0.0, 0.0, 0.0])  # of both turns of the first, then of the second answer
    white = (returns - returns.mean()) / (returns.var(ddof=1) + 1e-8) ** 0.5
    found = assemble.with_advantage(recipe, x).advantage
    np.testing.assert_allclose(found, [[white[0], 0, 0, white[1]], white[2:]], rtol=1e-5)


def test_dr_grpo_does_not_see_the_padding_and_doubles_with_the_tokens():
    def loss(recipe, tokens, width):
        mask = np.arange(width)[None] < np.array(tokens)[:, None]
        return value_and_slope(recipe, *of_arrays(mask, [1.0, 0.0], [0, 0]))[0]

    one = dr_grpo.dr_grpo(group_size=2, length=8)
    np.testing.assert_allclose(loss(one, (2, 3), 6), loss(one, (2, 3), 3), rtol=1e-6)
    np.testing.assert_allclose(loss(one, (4, 6), 6), 2 * loss(one, (2, 3), 3), rtol=1e-6)
    mean = replace(grpo.grpo(group_size=2, beta=0.0), advantage=lambda x: x.reward)
    np.testing.assert_allclose(loss(mean, (4, 6), 6), loss(mean, (2, 3), 3), rtol=1e-6)
    assert abs(loss(one, (2, 3), 3)) > 0.01 and abs(loss(mean, (2, 3), 3)) > 0.01
