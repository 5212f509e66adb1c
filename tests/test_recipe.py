"""The recipe record: what the decorator writes, what replace exchanges, what is refused."""
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.learner import assemble, update
from rl_jax.recipe import Recipe, Rollout, Schedule, StepScale, Turns, recipe, replace, with_old_policy
from rl_jax.recipes.baselines import grpo, rloo
from rl_jax.recipes.loss import dapo_decoupled_clip
from rl_jax.types import Evaluated


def nothing(x):
    return x.mask


@recipe(paper="arXiv:0000.00000", title="A paper", confidence="verified")
def example(strength: float = 0.5, group_size: int = 3) -> Recipe:
    """An example."""
    return Recipe(rollout=Rollout(group_size), loss=lambda policy, x: strength * policy.logp, weighting=nothing)


def test_the_decorator_writes_name_paper_and_hyperparameters():
    made = example(group_size=5)
    assert (made.name, made.paper) == ("example", "arXiv:0000.00000")
    assert made.hyperparameters == {"strength": 0.5, "group_size": 5}
    assert example.__doc__ == "An example."


def test_an_unknown_hyperparameter_is_refused():
    with pytest.raises(TypeError, match="strenght"):
        example(strenght=1.0)


def test_replace_exchanges_slots_and_leaves_the_original():
    made = example()
    other = replace(made, weighting=len, name="mine")
    assert (other.weighting, other.name, other.loss) == (len, "mine", made.loss)
    assert (made.weighting, made.name) == (nothing, "example")


@pytest.mark.parametrize("factory", [grpo.grpo, rloo.rloo, dapo_decoupled_clip.dapo_decoupled_clip])
def test_comparing_one_sample_with_itself_is_refused_at_construction(factory):
    with pytest.raises(ValueError, match="group_size=1.*group_size >= 2.*baselines.reinforce"):
        factory(group_size=1)


@pytest.mark.parametrize("option", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5},
                                    {"min_p": 1.0}, {"resample": -1}, {"given": 8}, {"window": -1}, {"replay": -1}])
def test_impossible_sampling_is_refused_by_name(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        Rollout(**option)


@pytest.mark.parametrize("option, truncated", [({}, False), ({"temperature": 0.5}, False), ({"top_k": 5}, True),
                                               ({"top_p": 0.9}, True), ({"min_p": 0.1}, True)])
def test_truncated_says_whether_some_tokens_cannot_be_drawn(option, truncated):
    assert Rollout(**option).truncated is truncated


@pytest.mark.parametrize("option", [{"epochs": 0}, {"minibatches": 0}])
def test_an_empty_schedule_is_refused(option):
    with pytest.raises(ValueError, match="at least 1"):
        Schedule(**option)


def test_an_unknown_model_is_refused_and_the_allowed_ones_are_named():
    with pytest.raises(ValueError, match="refrence.*reference"):
        Recipe(loss=nothing, weighting=nothing, models=("refrence",))


def test_resampling_without_selection_is_refused():
    with pytest.raises(ValueError, match="no selection slot"):
        Recipe(rollout=Rollout(resample=1), loss=nothing, weighting=nothing)


def test_growing_answers_can_be_neither_replaced_nor_given():
    with pytest.raises(ValueError, match="window=4.*resample=1"):
        Rollout(window=4, resample=1)
    with pytest.raises(ValueError, match="window=4.*given=1"):
        Rollout(window=4, given=1)


def test_given_answers_in_groups_need_their_log_probability():
    with pytest.raises(ValueError, match='add "old"'):
        Recipe(rollout=Rollout(given=1), loss=nothing, weighting=nothing)
    made = Recipe(rollout=Rollout(given=1), loss=nothing, weighting=nothing, models=("old",))
    assert made.needs_answers and not Recipe(loss=nothing, weighting=nothing).needs_answers


@pytest.mark.parametrize("order", [(), (1, 1), (0, -1)])
def test_turns_are_numbers_from_0_each_once(order):
    with pytest.raises(ValueError, match="order"):
        Turns(order, factor=len)


def test_a_variance_of_one_piece_is_refused():
    with pytest.raises(ValueError, match="pieces=1"):
        StepScale(scale=len, pieces=1)


def test_optimiser_steps_per_batch_count_turns():
    assert Schedule(epochs=2, minibatches=3, turns=Turns((1, 0), factor=len)).updates == 12


def test_any_recipe_can_be_taken_to_the_old_policy_with_a_weight():
    """Three policies: the ratio is to the old one, the weight says what sampled differently."""
    logp, old, rollout = (jnp.log(jnp.array([[p, 0.5], [0.3, p]])) for p in (0.5, 0.45, 0.4))
    x = assemble.of_arrays(rollout, jnp.ones((2, 2), bool), jnp.array([1.0, 0.0]), jnp.zeros(2, jnp.int32), old_logp=old)
    policy, weight = Evaluated(logp=logp, entropy=-logp), jnp.array([[0.5, 2.0], [1.0, 3.0]])
    base = grpo.grpo(beta=0.0)
    made = with_old_policy(base, lambda x: weight, "grpo_corrected")
    assert made.models == ("old",) and made.name == "grpo_corrected"
    plain = replace(base, weighting=lambda x: base.weighting(x) * weight)
    moved = assemble.of_arrays(old, x.mask, x.reward, x.group)
    np.testing.assert_allclose(update.batch_loss(made, policy, x)[0], update.batch_loss(plain, policy, moved)[0], rtol=1e-6)
    named = replace(base, loss=lambda policy, x: {"policy": base.loss(policy, x), "other": 0 * policy.logp},
                    weighting=lambda x: {"policy": base.weighting(x), "other": base.weighting(x)})
    both = with_old_policy(named, lambda x: weight, "named")
    np.testing.assert_allclose(update.batch_loss(both, policy, x)[0], update.batch_loss(made, policy, x)[0], rtol=1e-6)


def test_given_answers_have_a_group_of_one():
    assert Recipe(rollout=None, loss=nothing, weighting=nothing).group_size == 1


@pytest.mark.parametrize("factory", [grpo.grpo, rloo.rloo])
def test_the_reference_is_asked_for_only_when_a_term_needs_it(factory):
    assert factory(beta=0.0).models == ()
    assert factory(beta=0.1).models == ("reference",)
