"""Operations counted by hand, and against XLA's count where there is no loop."""
import jax
import jax.numpy as jnp
import pytest

from rl_jax.models.network import Network
from rl_jax.models.shape import Shape
from rl_jax.train import flops

N = 16


def count(function, *arguments):
    return flops.count(jax.jit(function).trace(*arguments).jaxpr)


def through(x, weights):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]


def test_every_round_of_a_scan_counts():
    x, weights = jnp.zeros((N, N)), jnp.zeros((5, N, N))
    assert count(through, x, weights) == 5 * 2 * N**3


def test_a_backward_pass_is_two_more_products_and_recomputing_one():
    x, weights = jnp.zeros((N, N)), jnp.zeros((5, N, N))

    def loss(function):
        return lambda x, w: (function(x, w) ** 2).sum()

    one = 2 * N**3
    plain = count(jax.grad(loss(through), (0, 1)), x, weights)
    again = count(jax.grad(loss(jax.checkpoint(through)), (0, 1)), x, weights)
    assert plain == pytest.approx(3 * 5 * one, rel=0.05) and again - plain == pytest.approx(5 * one, rel=0.05)


def test_the_dearest_branch_counts():
    def either(x, yes):
        return jax.lax.cond(yes, lambda x: x @ x @ x, lambda x: x + 1, x)

    assert count(either, jnp.zeros((N, N)), True) == 2 * 2 * N**3


def test_it_is_near_what_xla_counts_without_loops():
    def function(x):
        return jnp.exp(jax.nn.relu(x @ x) @ x).sum()

    x = jnp.zeros((N, N))
    assert count(function, x) == pytest.approx(jax.jit(function).lower(x).cost_analysis()["flops"], rel=0.1)


def test_scanned_layers_count_as_much_as_unrolled_ones():
    found = []
    for scanned in (False, True):
        network = Network(Shape(vocabulary=32, width=16, layers=4, heads=2, key_heads=1, head_size=8, inner=32,
                                scan_layers=scanned))
        parameters = jax.eval_shape(network.initialise, jax.random.key(0))
        found.append(count(lambda p, t, network=network: network.prefill(p, t)[0], parameters,
                           jax.ShapeDtypeStruct((4, 8), jnp.int32)))
    assert found[0] == pytest.approx(found[1], rel=0.01) and found[0] > 0
