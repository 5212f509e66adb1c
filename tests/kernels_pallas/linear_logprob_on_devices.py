"""Prints, as JSON, how `sharded.linear_logprob` on up to 8 devices differs from the op on one, and what they exchange.

Run as a process: XLA makes its devices when it starts.
"""
import functools
import json
import math
import os
import re

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

with jaxtyping.install_import_hook("kernels_pallas", "beartype.beartype"):
    from kernels_pallas.linear_logprob import blocks, sharded
    from kernels_pallas.linear_logprob.op import linear_logprob
    from kernels_pallas.linear_logprob.support import pack_support
from tests.kernels_pallas import contract

ROWS, WIDTH = 32, 8
# By name: the mesh, and which of its axes cut rows and vocabulary.
LAYOUTS = {"1x8": ({"data": 1, "model": 8}, ("data",), "model"), "2x4": ({"data": 2, "model": 4}, ("data",), "model"),
           "8x1": ({"data": 8, "model": 1}, ("data",), "model"), "4x1": ({"data": 4, "model": 1}, ("data",), "model"),
           "2x2x2": ({"data": 2, "fsdp": 2, "model": 2}, ("data", "fsdp"), "model"),
           "rows": ({"data": 8}, ("data",), None), "vocabulary": ({"data": 2, "model": 4}, (), "model")}
# By name: V, which of 4 and 8 devices share with and without a cut inside a word of the support; and options.
CASES = {"plain": (512, {}), "whole words": (512, {"truncated": True, "soft_cap": 2.0}),
         "cut words": (360, {"truncated": True}), "bfloat16": (512, {"dtype": jnp.bfloat16})}


def arrays(size, truncated=False, dtype=jnp.float32, soft_cap=None):
    """Hidden, vocabulary, targets and support: one row keeps nothing, two targets are no token, one is not kept."""
    random = np.random.default_rng(0)
    hidden, vocabulary = random.normal(size=(ROWS, WIDTH)), random.normal(size=(size, WIDTH))
    targets = random.integers(0, size, ROWS)
    kept = random.random((ROWS, size)) < 1 / 3
    kept[np.arange(ROWS), targets] = True
    kept[3], kept[4, targets[4]], targets[5], targets[6] = False, False, -1, size
    support = pack_support(jnp.asarray(kept)) if truncated else None
    return jnp.asarray(hidden, dtype), jnp.asarray(vocabulary, dtype), jnp.asarray(targets, jnp.int32), support


def value_and_cotangents(call, hidden, vocabulary, targets, support):
    """(logp, entropy, d_hidden, d_vocabulary) at fixed cotangents."""
    random = np.random.default_rng(1)
    given = tuple(jnp.asarray(random.normal(size=ROWS), jnp.float32) for _ in range(2))
    results, pull = jax.vjp(lambda h, w: call(h, w, targets, support=support), hidden, vocabulary)
    return *results, *pull(given)


def difference(found, expected):
    """The largest difference as a share of the largest finite entry; infinite where what is not finite differs."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(found[~finite], expected[~finite]) or not np.isfinite(found[finite]).all():
        return float("inf")
    return float(np.abs(found[finite] - expected[finite]).max() / np.abs(expected[finite]).max())


def exchanges(program):
    """What the devices of a compiled program exchange: [kind, numbers on each device, whether inside a loop]."""
    found, bodies = [], set(re.findall(r"body=%?([\w.-]+)", program))
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
    for computation in re.split(r"\n(?=%|ENTRY)", program):
        name = re.match(r"(?:ENTRY )?%?([\w.-]*)", computation).group(1)
        for shape, kind in re.findall(rf"= \w+\[([\d,]*)\]\S* ({kinds})(?:-start)?\(", computation):
            found.append([kind, int(np.prod([int(n) for n in shape.split(",")])), name in bodies])
    assert len(found) == len(re.findall(rf" (?:{kinds})(?:-start)?\(", program))
    return sorted(found)


def placed(layout, hidden, vocabulary, targets, support):
    put = lambda x, *axes: jax.device_put(x, NamedSharding(layout.mesh, PartitionSpec(*axes)))
    return (put(hidden, layout.rows), put(vocabulary, layout.vocabulary), put(targets, layout.rows),
            None if support is None else put(support, layout.rows))


def layout_of(name, implementation):
    axes, rows, vocabulary = LAYOUTS[name]
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes),
                         devices=jax.devices()[:math.prod(axes.values())])
    return sharded.Layout(mesh, rows, vocabulary, implementation)


def options_of(case):
    return {"temperature": 0.9, "soft_cap": CASES[case][1].get("soft_cap")}


@functools.cache
def expected_of(case):
    size, options = CASES[case]
    call = functools.partial(linear_logprob, **options_of(case))
    return jax.jit(functools.partial(value_and_cotangents, call))(*arrays(size, **options))


def measured(name, case, implementation):
    """Differences of the four arrays, exchanges of the forward and of both passes, and the weight gradient's scale."""
    layout = layout_of(name, implementation)
    size, options = CASES[case]
    call = functools.partial(sharded.linear_logprob, layout=layout, **options_of(case))
    expected, there = expected_of(case), placed(layout, *arrays(size, **options))
    assert len(there[0].sharding.device_set) == layout.mesh.size
    forward = jax.jit(lambda h, w, t, s: call(h, w, t, support=s)).lower(*there).compile()
    both = jax.jit(functools.partial(value_and_cotangents, call)).lower(*there).compile()
    found = both(*there)
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    weights = [np.asarray(x[3], np.float64) for x in (found, expected)]
    return {"layout": name, "case": case, "implementation": implementation,
            "difference": [difference(x, y) for x, y in zip(found, expected, strict=True)],
            "forward": exchanges(forward.as_text()), "both": exchanges(both.as_text()),
            "scale": float((weights[0] * weights[1]).sum() / (weights[1] ** 2).sum())}


def check_contract(name, implementation):
    """Under jit, vmap and scan as the reference; rows that a mask leaves out get exactly 0."""
    hidden, vocabulary, targets, support = arrays(360, truncated=True)
    rows = np.arange(ROWS)
    contract.check(contract.Case(
        op=lambda h, w, t, s: sharded.linear_logprob(h, w, t, layout_of(name, implementation), support=s),
        reference=lambda h, w, t, s: linear_logprob(h, w, t, support=s, implementation="reference"),
        floats=(hidden, vocabulary), others=(targets, support), silent=(rows >= 3) & (rows <= 6),
        row_inputs=(True, False)))


def main():
    blocks.ONE_TILE, blocks.TILE, blocks.LOGITS = 40, 32, 64  # little arrays have many blocks
    check_contract("2x4", "xla")
    runs = [(name, "plain", "xla") for name in LAYOUTS]
    runs += [(name, "cut words", "xla") for name in ("1x8", "2x4", "2x2x2")]
    runs += [("2x4", "whole words", "xla"), ("2x4", "bfloat16", "xla")]
    runs += [("2x4", "plain", "pallas"), ("1x8", "cut words", "pallas")]
    print(json.dumps([measured(*run) for run in runs]))


if __name__ == "__main__":
    main()
