"""What holds for every algorithm. Recipes are found by walking the package: a new file is tested as it is."""
import dataclasses
import importlib
import inspect
import pkgutil
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_jax import recipes
from rl_jax.learner import assemble, update
from rl_jax.recipe import Recipe
from rl_jax.types import Samples, Verdict
from tests.recipes import toy

MODULES = {found.name.removeprefix("rl_jax.recipes."): importlib.import_module(found.name)
           for found in pkgutil.walk_packages(recipes.__path__, "rl_jax.recipes.") if not found.ispkg}
every_recipe = pytest.mark.parametrize("name", MODULES)


def factory(name):
    return getattr(MODULES[name], name.rsplit(".", 1)[-1])


def loss_and_gradient(recipe):
    """(policy, x) -> ((loss, extras), gradient in what the policy says)."""
    def run(policy, x):
        return jax.value_and_grad(lambda policy: update.batch_loss(recipe, policy, x), has_aux=True)(policy)

    return run


@pytest.fixture(scope="module", params=MODULES)
def case(request):
    """Recipe, its compiled loss and gradient, a batch, a policy, and what comes out."""
    recipe = factory(request.param)()
    x = toy.experience(recipe)
    chex.clear_trace_counter()
    policy, run = toy.policy(x), jax.jit(chex.assert_max_traces(loss_and_gradient(recipe), 1))
    return recipe, run, x, policy, run(policy, x)


def same(found, expected):
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-7)


@every_recipe
def test_one_factory_with_the_files_name(name):
    module = MODULES[name]
    made_here = [n for n, value in vars(module).items()
                 if inspect.isfunction(value) and value.__module__ == module.__name__ and not n.startswith("_")]
    assert made_here == [name.rsplit(".", 1)[-1]]
    assert module.__doc__ and factory(name).__doc__


def test_names_are_unique_ignoring_case():
    names = [name.rsplit(".", 1)[-1].lower().replace("_", "") for name in MODULES]
    assert len(names) == len(set(names)) > 0


@every_recipe
def test_says_what_it_is(name):
    recipe = factory(name)()
    assert isinstance(recipe, Recipe) and recipe.name == name.rsplit(".", 1)[-1]
    assert re.search(r"arXiv:\d{4}\.\d{5}|\b(19|20)\d\d\b", recipe.paper)
    defaults = {n: p.default for n, p in inspect.signature(factory(name)).parameters.items()}
    assert recipe.hyperparameters == defaults


def test_finite_loss_and_gradient(case):
    _, _, _, _, ((loss, extras), gradient) = case
    chex.assert_tree_all_finite((loss, extras, gradient))
    assert np.abs(gradient.logp).max() > 0


def test_what_was_not_chosen_is_never_read(case):
    recipe, run, x, policy, (out, gradient) = case

    def scrambled(values):
        return jnp.where(x.mask, values, jnp.nan)

    scrambled_x = dataclasses.replace(
        x, tokens=jnp.where(x.mask, x.tokens, 3), rollout_logp=scrambled(x.rollout_logp),
        rollout_entropy=scrambled(x.rollout_entropy), given={n: scrambled(v) for n, v in x.given.items()},
        views=jax.tree.map(scrambled, x.views))
    found, found_gradient = run(jax.tree.map(scrambled, policy), scrambled_x)
    same(found, out)
    same(found_gradient, gradient)
    for values in jax.tree.leaves(found_gradient):
        np.testing.assert_array_equal(np.asarray(values)[~np.asarray(x.mask)], 0.0)


def test_what_is_constant_gets_no_gradient(case):
    recipe, _, x, policy, _ = case

    def loss(constant):
        return update.batch_loss(recipe, policy, dataclasses.replace(x, **constant))[0]

    names = ("given", "views", "rollout_logp", "rollout_entropy", "score", "reward")
    constant = {name: getattr(x, name) for name in names}
    for values in jax.tree.leaves(jax.jit(jax.grad(loss))(constant)):
        np.testing.assert_array_equal(values, 0.0)


def test_padding_changes_nothing(case):
    recipe, _, x, policy, (out, gradient) = case

    def padded(values):
        shape = (x.mask.shape[0], x.mask.shape[1] + 3)
        return jnp.zeros(shape, values.dtype).at[:, :x.mask.shape[1]].set(values)

    longer = dataclasses.replace(
        x, tokens=padded(x.tokens), mask=padded(x.mask), rollout_logp=padded(x.rollout_logp),
        rollout_entropy=padded(x.rollout_entropy), given={n: padded(v) for n, v in x.given.items()},
        fresh=padded(x.fresh), turn=padded(x.turn), views=jax.tree.map(padded, x.views))
    found, found_gradient = jax.jit(loss_and_gradient(recipe))(jax.tree.map(padded, policy), longer)
    same(found, out)
    same(found_gradient, jax.tree.map(padded, gradient))


def test_order_changes_nothing(case):
    """Prompts in another order, or the samples of each prompt; groups numbered anew. In float64: a sum of terms that
    cancel, taken in another order, differs in float32 by more than any bound that would show a fault."""
    recipe, _, *batch, _ = case
    with jax.enable_x64(True):
        x, policy = jax.tree.map(lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a,
                                 tuple(batch))
        run = jax.jit(loss_and_gradient(recipe))
        out, gradient = run(policy, x)
        for rows, order, numbers in reordered(x.mask.shape[0]):
            moved = jax.tree.map(lambda a, rows=rows: a[rows], dataclasses.replace(x, prompts=None, coefficients=None))
            moved = dataclasses.replace(moved, group=numbers[moved.group], coefficients=x.coefficients,
                                        prompts=jax.tree.map(lambda a, order=order: a[order], x.prompts))
            found, found_gradient = run(jax.tree.map(lambda a, rows=rows: a[rows], policy), moved)
            chex.assert_trees_all_close(found, out, rtol=1e-9, atol=1e-11)
            chex.assert_trees_all_close(found_gradient, jax.tree.map(lambda a, rows=rows: a[rows], gradient), rtol=1e-9,
                                        atol=1e-11)


def reordered(count):
    """Rows, prompts and numbers of the groups: prompts in another order, then the samples within each."""
    rng, rows = np.random.default_rng(0), np.arange(count).reshape(toy.PROMPTS, -1)
    order = rng.permutation(toy.PROMPTS)
    for rows, order in ((rows[order], order), (rng.permuted(rows, axis=1), np.arange(toy.PROMPTS))):
        yield rows.reshape(-1), order, jnp.asarray(rng.permutation(2 * count))


DEGENERATE = {
    "all rewards are 0": lambda x, policy: (scored(x, 0.0), policy),
    "all rewards are 1": lambda x, policy: (scored(x, 1.0), policy),
    "nothing was chosen": lambda x, policy: (masked(x, False), policy),
    "one answer has tokens": lambda x, policy: (masked(x, jnp.arange(x.mask.shape[0])[:, None] == 3), policy),
    "the policy has not moved": lambda x, policy: (x, moved(x, policy, 0.0)),
    "ratios of e^20": lambda x, policy: (x, moved(x, policy, 20.0)),
    "ratios of e^-20": lambda x, policy: (x, moved(x, policy, -20.0)),
    "ratios of e^-80": lambda x, policy: (x, moved(x, policy, -80.0)),
    "ratios of both kinds": lambda x, policy: (x, moved(x, policy, 20.0 * (-1) ** jnp.arange(x.mask.shape[1])[None])),
    "no entropy": lambda x, policy: (dataclasses.replace(x, rollout_entropy=jnp.zeros(x.mask.shape)),
                                     dataclasses.replace(policy, entropy=jnp.zeros(x.mask.shape))),
}


def scored(x, value):
    score = jnp.full_like(x.score, value)
    return dataclasses.replace(x, score=score, reward=score)


def masked(x, kept):
    return dataclasses.replace(x, mask=x.mask & kept, fresh=x.fresh & kept)


def moved(x, policy, nats):
    return dataclasses.replace(policy, logp=x.rollout_logp + nats)


@pytest.mark.parametrize("kind", DEGENERATE)
def test_finite_in_every_degenerate_batch(case, kind):
    _, run, x, policy, _ = case
    x, policy = DEGENERATE[kind](x, policy)
    (loss, extras), gradient = run(policy, x)
    chex.assert_tree_all_finite((loss, extras, gradient))
    if kind == "nothing was chosen":
        assert loss == 0 and all((values == 0).all() for values in jax.tree.leaves(gradient))


def test_microbatches_add_up_to_the_same_gradient(case):
    recipe, _, x, _, _ = case
    if recipe.indivisible:
        with pytest.raises(ValueError, match="cannot be cut into 2 pieces"):
            update.make_gradient(recipe, toy.evaluate, 2)
        return
    # drawn by a policy close to that of the parameters: far from it a shared budget of change leaves no gradient at all
    x = dataclasses.replace(x, rollout_logp=0.9 * toy.evaluate(toy.parameters(), x).logp + 0.1 * x.rollout_logp)
    gradients = [update.make_gradient(recipe, toy.evaluate, n) for n in (1, 2)]

    @jax.jit
    def in_one_and_two(parameters, x):
        x = assemble.with_advantage(recipe, x)
        return [gradient(parameters, x) for gradient in gradients]

    whole, parts = in_one_and_two(toy.parameters(), x)
    same(parts[0], whole[0])
    same(parts[1], whole[1])
    assert np.abs(whole[0]["logits"]).max() > 0


def test_the_second_call_does_not_retrace(case):
    recipe, run, *_ = case  # `run` raises if it is traced again
    other = toy.experience(recipe, seed=5)
    chex.assert_tree_all_finite(run(toy.policy(other, seed=6), other))


def test_learns_a_two_armed_bandit(case):
    """One token per answer, arm 1 is right; given answers and teachers know it."""
    recipe, *_ = case
    optimiser = optax.adam(0.1)
    passes = update.make_passes(recipe, toy.evaluate, optimiser)
    start = {"logits": jnp.zeros((1, 2)), "values": jnp.zeros(1)}
    teacher = {"logits": jnp.array([[0.0, 3.0]]), "values": jnp.zeros(1)}
    prompts = toy.prompts(8)

    def step(carry, key):
        parameters, state = carry
        draw, deal = jax.random.split(key)
        n = 8 * recipe.group_size
        tokens = jax.random.categorical(draw, parameters["logits"][0], shape=(n, 1))
        tokens = jnp.ones_like(tokens) if recipe.rollout is None else tokens
        zeros = jnp.zeros((n, 1))
        samples = Samples(tokens=tokens, mask=jnp.ones((n, 1), bool), rollout_logp=zeros, rollout_entropy=zeros,
                          finished=jnp.ones(n, bool), version=jnp.zeros(n, int))
        verdict = Verdict(score=(tokens[:, 0] == 1).astype(jnp.float32), parts={}, failed=jnp.zeros(n, bool))
        x = assemble.experience(prompts, samples, verdict, coefficients=toy.coefficients(recipe))
        now = toy.evaluate(parameters, x)
        probability = jax.nn.softmax(parameters["logits"])[0]
        known = {"reference_logp": toy.evaluate(start, x).logp, "old_logp": now.logp, "values": now.values,
                 "teacher_logp": toy.evaluate(teacher, x).logp, "second_moment": jnp.full((n, 1), (probability**2).sum()),
                 "third_moment": jnp.full((n, 1), (probability**3).sum()), "hidden_square": jnp.ones((n, 1))}
        x = dataclasses.replace(
            x, rollout_logp=now.logp, rollout_entropy=now.entropy, views={name: now.logp for name in recipe.views},
            given={name: known[name] for model in recipe.models for name in toy.GIVEN[model]})
        parameters, state, _ = passes(parameters, state, assemble.with_advantage(recipe, x), deal)
        return (parameters, state), None

    keys = jax.random.split(jax.random.key(0), 60)
    (parameters, _), _ = jax.jit(lambda keys: jax.lax.scan(step, (start, optimiser.init(start)), keys))(keys)
    assert jax.nn.softmax(parameters["logits"][0])[1] > 0.9
