"""Schedules, clipping and weight decay against their formulas."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.learner import optimiser
from rl_jax.learner.optimiser import Optimiser
from rl_jax.models.network import Network
from rl_jax.models.shape import Shape

PEAK, STEPS, WARMUP = 0.4, 10, 4


def rate(numbers, count):
    return float(optimiser.learning_rate(numbers, STEPS)(jnp.int32(count)))


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize(("decay", "share"), [
    ("constant", lambda done: 1.0), ("linear", lambda done: 1 - 0.75 * done),
    ("cosine", lambda done: 0.25 + 0.75 * (1 + math.cos(math.pi * done)) / 2)])
def test_schedules(decay, share, warmup):
    numbers = Optimiser(learning_rate=PEAK, warmup_steps=warmup, decay=decay, final_share=0.25)
    for count in range(STEPS + 1):
        rising = count < warmup
        expected = PEAK * (count / warmup if rising else share((count - warmup) / (STEPS - warmup)))
        assert rate(numbers, count) == pytest.approx(expected, rel=1e-5)


def test_clipping_scales_by_the_global_norm():
    """Adam's second step sees the sizes that clipping left: 0.5 of the first gradient of norm 2, all of the second."""
    numbers = Optimiser(learning_rate=PEAK, clip_norm=1.0, beta1=0.5, beta2=0.5, epsilon=1e-12)
    transform, at = optimiser.transform(numbers, STEPS), {"weight": jnp.zeros((1, 1))}
    state = transform.init(at)
    for gradient in (2.0, 0.8):
        update, state = transform.update({"weight": jnp.full((1, 1), gradient)}, state, at)
    first, second = 1.0, 0.8
    mean = (0.5 * 0.5 * first + 0.5 * second) / 0.75
    square = (0.5 * 0.5 * first**2 + 0.5 * second**2) / 0.75
    assert float(update["weight"][0, 0]) == pytest.approx(-PEAK * mean / math.sqrt(square), rel=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_weight_decay_is_on_matrices_only(scan_layers):
    """Stacked for a scan over layers, a scale or a bias has two axes and still is none."""
    shape = Shape(vocabulary=5, width=8, layers=2, heads=1, key_heads=1, head_size=4, inner=8, query_bias=True,
                  query_norm=True, scan_layers=scan_layers)
    shapes = jax.eval_shape(Network(shape).initialise, jax.random.key(0))
    parameters, zero = (jax.tree.map(lambda a, n=n: np.full(a.shape, n, np.float32), shapes) for n in (1, 0))
    transform = optimiser.transform(Optimiser(learning_rate=PEAK, weight_decay=0.1), STEPS)
    update = jax.jit(lambda g, p: transform.update(g, transform.init(p), p)[0])(zero, parameters)
    for path, change in jax.tree_util.tree_leaves_with_path(update):
        matrix = path[-1].key in ("weight", "embedding")
        np.testing.assert_allclose(change, -PEAK * 0.1 if matrix else 0.0, err_msg=str(path), rtol=1e-6)


@pytest.mark.parametrize(("wrong", "says"), [
    ({"decay": "exponential"}, "allowed are .'constant', 'linear', 'cosine'."), ({"learning_rate": 0.0}, "must be positive"),
    ({"clip_norm": -1.0}, "not negative"), ({"warmup_steps": -1}, "not negative")])
def test_what_cannot_be_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Optimiser(**wrong)
