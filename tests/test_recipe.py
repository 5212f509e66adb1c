"""The recipe record: what the decorator writes, what replace exchanges, what is refused."""
import pytest

from rl_jax.recipe import Recipe, Rollout, Schedule, recipe, replace
from rl_jax.recipes.baselines import grpo, rloo
from rl_jax.recipes.loss import dapo_decoupled_clip


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
                                    {"min_p": 1.0}, {"resample": -1}])
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


def test_given_answers_have_a_group_of_one():
    assert Recipe(rollout=None, loss=nothing, weighting=nothing).group_size == 1


@pytest.mark.parametrize("factory", [grpo.grpo, rloo.rloo])
def test_the_reference_is_asked_for_only_when_a_term_needs_it(factory):
    assert factory(beta=0.0).models == ()
    assert factory(beta=0.1).models == ("reference",)
