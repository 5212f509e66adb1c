"""What can be a kernel and what cannot: lowering, what is loaded, what is refused."""
import functools

import contract
import jax
import jax.numpy as jnp
import numpy as np
import policy_gate_cases as cases
import pytest
from policy_gate_cases import small_blocks  # noqa: F401  (a fixture for every test here)

from kernels_pallas.policy_gate import blocks, portable
from kernels_pallas.policy_gate.op import policy_gate
from rl_jax.learner import update
from rl_jax.learner import gate as slots
from rl_jax.loss import budget


@pytest.mark.parametrize("implementation", cases.PASSES)
def test_values_alone_are_the_same_and_make_no_gradient(implementation):
    batch, (function, level) = cases.batch(), cases.FAMILIES["value_and_entropy"]
    call = lambda policy: policy_gate(function, policy, *batch[1:], level=level, implementation=implementation)
    cases.same(jax.jit(call)(batch.policy), cases.run("value_and_entropy", "reference", batch)[0])
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
    batch, (function, _) = cases.batch(), cases.FAMILIES["unclipped"]

    def mentions_more(policy, given):
        given["returns"] + given["high"] + given["price"] + policy["values"]
        return function(policy, given)

    loss = lambda policy: policy_gate(mentions_more, policy, *batch[1:], implementation="pallas").loss
    assert _kernels(jax.grad(loss), batch.policy) == [(9, 2)]
    gradient = jax.grad(loss)(batch.policy)
    assert not gradient["values"].any() and not gradient["entropy"].any() and gradient["logp"].any()


def test_the_default_on_a_cpu_is_xla_and_pallas_runs_a_kernel():
    batch = cases.batch(2, 20)
    call = lambda implementation, level: lambda policy: policy_gate(
        cases.FAMILIES["unclipped"][0], policy, *batch[1:], implementation=implementation, level=level)
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


def _value(family, *batch):
    function, level = cases.FAMILIES[family]
    batch = cases.Batch(*batch)
    return policy_gate(function, *batch[:3], cases.weights(family, batch), batch.share, level=level)


def _gradient(family, policy, *rest):
    return jax.grad(lambda policy: _value(family, policy, *rest).loss)(policy)


@pytest.mark.parametrize("device", contract.DEVICES)
@cases.every_family
def test_lowers_by_default_on_accelerators(family, device):
    contract.check_lowering(device, functools.partial(_gradient, family), *cases.shapes(512, 4096))


@pytest.mark.parametrize("device", contract.DEVICES)
@pytest.mark.parametrize("shape", [(512, 1024), (100, 1000), (3, 7000)])
@pytest.mark.parametrize("family", ["value_and_entropy", "fiber"])
def test_lowers_at_other_sizes(family, shape, device):
    for function in (_value, _gradient):
        contract.check_lowering(device, functools.partial(function, family), *cases.shapes(*shape))


def _call(function=cases.FAMILIES["unclipped"][0], batch=None, **options):
    return policy_gate(function, *(batch or cases.batch(2, 20)), **options)


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
    (cases.FAMILIES["per_sequence"][0], "joins tokens.*level='row'"),
])
def test_gates_that_cannot_be(function, message):
    with pytest.raises(ValueError, match=message):
        _call(function)


def _cumulative(policy, given):
    return budget.censored(cases.per_token(policy, given), given["advantage"], given["mask"], 0.1)


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
        *cases.batch(2, 20)) for implementation in (None, "reference"))
    cases.same(found, expected)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=contract.DEVICES["cuda"])):
        call = lambda policy, given, *rest: policy_gate(function, policy, given, *rest, level="row")
        jaxpr = jax.make_jaxpr(call)(*cases.shapes(2, 20))
    assert "pallas_call" not in str(jaxpr)


def test_the_level_is_found_where_none_is_given():
    for family in ("ppo_clip_and_k3", "per_sequence"):
        function, level = cases.FAMILIES[family]
        call = lambda level: jax.make_jaxpr(lambda batch: policy_gate(
            function, *batch, level=level, implementation="pallas"))(cases.batch(2, 300))
        assert str(call(None)) == str(call(level))


def test_long_rows_are_refused_with_advice(monkeypatch):
    monkeypatch.setattr(blocks, "LONGEST_ROW", {"cpu": 16})
    with pytest.raises(ValueError, match="at most 16 tokens here, and T = 20.*staged_gate"):
        _call(level="row", implementation="pallas")
    _call(level="row")
    _call(implementation="pallas")


def test_bad_arguments():
    batch = cases.batch(2, 20)
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


@pytest.mark.parametrize("device", ["cuda", "tpu"])
@pytest.mark.parametrize("name", cases.RECIPES)
def test_loss_slots_of_recipes_lower(name, device):
    """As the learner makes them: with a whole record of fields, most of which the slot does not read."""
    recipe, batch = cases.RECIPES[name][0](), cases.batch(8, 128)
    x, policy = cases.experience(recipe, batch, 8)
    slot = slots.of_recipe(recipe, policy, x)
    weight, share = recipe.weighting(x), update.token_share(x)

    def loss(said, given):
        return policy_gate(slot.gate, said, given, x.mask, weight, share, level=None).loss

    contract.check_lowering(device, jax.grad(loss), slots.said(policy), slot.given)
