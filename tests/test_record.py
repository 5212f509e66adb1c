"""Records are frozen pytrees that survive every rebuilding that jax does."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.types import Evaluated, Experience, Samples

EVALUATED = Evaluated(logp=jnp.ones((2, 3)), entropy=jnp.zeros((2, 3)))


def test_a_record_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EVALUATED.logp = jnp.zeros((2, 3))
    with pytest.raises(TypeError):
        Evaluated(jnp.ones((2, 3)), jnp.zeros((2, 3)))


def test_leaves_come_in_field_order_with_their_names():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(EVALUATED)[0]]
    assert paths == [".logp", ".entropy"]


def test_rebuilding_never_checks_shapes():
    assert jax.tree.map(lambda x: x.shape, EVALUATED).logp == (2, 3)
    assert jax.tree.map(lambda x: None, EVALUATED).logp is None
    stacked = jax.vmap(lambda scale: jax.tree.map(lambda x: x * scale, EVALUATED))(jnp.arange(4.0))
    assert stacked.logp.shape == (4, 2, 3) and stacked.values is None
    total, _ = jax.lax.scan(lambda carry, part: (carry + part.logp.sum(), None), 0.0, stacked)
    np.testing.assert_allclose(total, 36.0)


def test_construction_by_a_person_checks_shapes():
    with pytest.raises(Exception, match="entropy"):
        Evaluated(logp=jnp.ones((2, 3)), entropy=jnp.zeros((2, 4)))


def test_jit_and_replace_keep_the_type():
    doubled = jax.jit(lambda e: dataclasses.replace(e, logp=2 * e.logp))(EVALUATED)
    assert isinstance(doubled, Evaluated)
    np.testing.assert_array_equal(doubled.logp, 2.0)


def test_samples_without_support_have_no_leaf_for_it():
    two = jnp.zeros((2, 3))
    samples = Samples(tokens=jnp.zeros((2, 3), int), mask=two > 0, rollout_logp=two, rollout_entropy=two,
                      finished=jnp.ones(2, bool), version=jnp.zeros(2, int))
    assert len(jax.tree.leaves(samples)) == 6


@pytest.fixture
def experience():
    n, t = 2, 3
    return Experience(
        tokens=jnp.zeros((n, t), int), mask=jnp.ones((n, t), bool), rollout_logp=jnp.zeros((n, t)),
        rollout_entropy=jnp.zeros((n, t)), finished=jnp.ones(n, bool), version=jnp.zeros(n, int), score=jnp.zeros(n),
        reward=jnp.zeros(n), group=jnp.arange(n), parts={}, failed=jnp.zeros(n, bool),
        given={"old_logp": jnp.full((n, t), -1.0)}, coefficients={"beta": jnp.float32(0.5)})


def test_given_numbers_are_read_by_name(experience):
    np.testing.assert_array_equal(experience.old_logp, -1.0)
    assert experience.coefficient.beta == 0.5


@pytest.mark.parametrize("name, remedy", [("reference_logp", "reference"), ("teacher_logp", "teacher"),
                                          ("values", "critic"), ("advantage", "advantage slot")])
def test_reading_what_was_not_asked_for_names_the_remedy(experience, name, remedy):
    with pytest.raises(ValueError, match=f"x.{name}.*{remedy}.*old_logp"):
        getattr(experience, name)
