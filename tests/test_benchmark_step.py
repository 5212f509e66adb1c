"""What the floors of a step, of drawing and of its growth count, and their tables at toy size."""
import dataclasses
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval

from configs.benchmark import shared_toy
from rl_jax.models.network import Network
from rl_jax.models.shape import Shape
from rl_jax.train import flops
from tests.clock import clock, number

SCRIPTS = pathlib.Path(__file__).resolve().parents[1] / "scripts"
sys.path.append(str(SCRIPTS))

import benchmark_floor  # noqa: E402  (scripts are no package)
import benchmark_rollout  # noqa: E402
import benchmark_scaling  # noqa: E402
import benchmark_step  # noqa: E402
import benchmark_table  # noqa: E402

SHAPE = Shape(vocabulary=10, width=6, layers=2, heads=2, key_heads=1, head_size=4, inner=5)
WORK = benchmark_floor.Work(SHAPE, prompts=2, group=3, prompt_tokens=4, tokens=3)
THIN = dataclasses.replace(WORK, shape=dataclasses.replace(SHAPE, layers=1))
RATES = benchmark_floor.Rates(products=1e9, weights=1e9, moments=2e9, parameters=10**9)


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    monkeypatch.setattr(benchmark_floor, "SQUARE", 16)
    monkeypatch.setattr(benchmark_step, "SHORTEST_PHASE_S", 0.0)
    monkeypatch.setattr(benchmark_step, "SHORTEST_STEPS_S", 0.0)
    monkeypatch.setattr(benchmark_scaling, "SHORTEST_S", 0.0)


def test_flops_are_those_counted_token_by_token():
    """Loops over what the data path multiplies: D=6, H=2, K=1, E=4, inner 5, two layers."""
    full = 2 * (6 * 8 + 6 * 4 + 6 * 4 + 8 * 6 + 3 * 6 * 5)  # query, key, value, output, inner
    pair = 2 * 2 * 4 + 2 * 2 * 4  # a score and its share of the mix, of two heads
    prompts = answers = 0
    for _ in range(2):
        for position in range(4):
            prompts += full + pair * (position + 1) + 2 * (6 * 4 + 6 * 4)  # of the last layer only keys and values
        for _ in range(3):
            for token in range(3):
                answers += 2 * (full + pair * (3 + token + 1)) + 2 * 6 * 10
    assert benchmark_floor.of_step(WORK) == {
        "prefill": prompts, "decoding": answers, "reference pass": prompts + answers,
        "forward and backward": 3 * (prompts + answers)}


def test_bytes_are_those_counted_step_by_step():
    """Matrices of 4-byte numbers, and keys and values: one copy of what is seen of each prompt, one for each answer."""
    matrices, token = 2 * (6 * 8 + 6 * 4 + 6 * 4 + 8 * 6 + 3 * 6 * 5) + 10 * 6, 2 * 2 * 4
    read = sum(4 * (matrices + 2 * 3 * token + 2 * 3 * (step + 1) * token) for step in range(3))
    assert benchmark_floor.read_while_drawing(WORK) == read
    assert benchmark_floor.moved_by_adamw(100) == 2800


def products(function, *shapes):
    """FLOPs of the matrix products of what a function returns, nothing else."""
    traced = jax.make_jaxpr(function)(*shapes)
    needed, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    return flops.count(traced.replace(jaxpr=needed))


@pytest.fixture
def only_products(monkeypatch):
    monkeypatch.setattr(flops, "ARITHMETIC", set())
    monkeypatch.setattr(flops, "REDUCTIONS", set())


def test_they_are_those_of_the_program(only_products):
    """The traced network multiplies as much where attention is a small part: it makes hidden scores, too."""
    shape = Shape(vocabulary=96, width=32, layers=3, heads=2, key_heads=1, head_size=8, inner=64)
    work = benchmark_floor.Work(shape, prompts=2, group=3, prompt_tokens=8, tokens=8)
    network = Network(shape)
    weights = jax.eval_shape(network.initialise, jax.random.key(0))
    ids = tuple(jax.ShapeDtypeStruct(axes, jnp.int32) for axes in ((2, 8), (2,), (6, 8)))

    def score(weights, prompts, lengths, completions):
        hidden = network.hidden(weights, prompts, lengths, completions).reshape(48, 32)
        logp, _ = network.logprob(hidden, network.vocabulary(weights), completions.reshape(-1), implementation="reference")
        return logp.sum()

    expected = benchmark_floor.of_step(work)
    prefill = products(lambda weights, ids: network.prefill(weights, ids)[0], weights, ids[0])
    forward, backward = (products(function, weights, *ids) for function in (score, jax.grad(score)))
    assert expected["prefill"] <= prefill <= 1.05 * expected["prefill"]
    assert expected["reference pass"] <= forward <= 1.05 * expected["reference pass"]
    assert expected["forward and backward"] <= backward <= 1.05 * expected["forward and backward"]


@pytest.mark.parametrize("given", [{"window": 4, "reach": ("window",)}, {"compute": "bfloat16"}])
def test_other_networks_are_refused(given):
    with pytest.raises(ValueError, match="floors are counted for dense layers without a window in float32"):
        dataclasses.replace(WORK, shape=dataclasses.replace(SHAPE, **given))


def test_the_table_of_a_step_adds_up():
    """Drawing holds the prefill; what the host adds is what the loop takes beyond its program."""
    seconds = {"prefill": 1.0, "draw": 5.0, "reward": 0.5, "reference pass": 2.0, "forward and backward": 6.0,
               "optimiser": 0.25, "program": 14.0, "step": 15.0}
    floor = benchmark_step.floors(WORK, RATES)
    rows = {row.name: row for row in benchmark_step.phases(seconds, floor)}
    assert rows["decoding"].seconds == 4.0 and rows["host gap"].seconds == 1.0
    assert rows["sum of phases"].seconds == 1.0 + 4.0 + 0.5 + 2.0 + 6.0 + 0.25 + 1.0 and rows["step"].seconds == 15.0
    assert rows["optimiser"].floor == 14.0 and rows["optimiser"].bound == "bandwidth"
    products = sum(benchmark_floor.of_step(WORK).values()) / 1e9
    assert rows["step"].floor == pytest.approx(14.0 + products) and math.isnan(rows["reward"].floor)


def test_the_larger_of_two_floors_holds():
    slow = dataclasses.replace(RATES, weights=1.0)
    assert benchmark_step.floors(WORK, slow)["decoding"] == (benchmark_floor.read_while_drawing(WORK), "bandwidth")
    assert benchmark_step.floors(WORK, dataclasses.replace(RATES, products=1.0))["decoding"][1] == "arithmetic"


def toy():
    config = shared_toy.get_config("tiny").copy_and_resolve_references().unlock()
    config.task.args.update(vocabulary=16, prompt_length=3, completion_length=4)
    config.model.update(width=8, layers=1, heads=2, key_heads=1, head_size=4, inner=8)
    config.scale.update(prompts_per_step=2, steps_per_call=2)
    return config


def test_a_step_is_measured_and_a_missed_target_named(monkeypatch):
    monkeypatch.setattr(benchmark_step, "TARGETS", {"toy": benchmark_step.Targets(step=0.0, gap=-1e9)})
    table, = benchmark_step.tables({"toy": toy(), "other": None}, clock, lambda name: name == "toy")
    rows = {row[0]: row for row in table.rows}
    assert list(rows) == ["prefill", "decoding", "reward", "reference pass", "forward and backward", "optimiser", "host gap",
                          "sum of phases", "step"]
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert all(number(rows[name][1]) > 0 for name in rows if name not in ("decoding", "host gap"))
    assert all(number(rows[name][3]) > 0 for name in ("prefill", "forward and backward", "optimiser", "step"))
    assert rows["step"][4:6] == ("100.0%", "0x")
    assert len(table.missed) == 2 and "of its floor; target 0x" in table.missed[0] and "the host gap is" in table.missed[1]
    assert "2 x 8 answers of 4 tokens to prompts of 3, 2 steps a dispatch" in table.caption


def test_every_workload_has_targets():
    assert set(benchmark_step.workloads()) == set(benchmark_step.TARGETS)


def test_drawing_is_measured_by_rows():
    sizes = benchmark_rollout.Sizes(THIN.shape, 4, 3, (2, 6), group=3)
    table, = benchmark_rollout.tables(sizes, clock, lambda name: name == "6 rows")
    row, = table.rows
    assert row[:2] == ("6", "2 x 3") and number(row[3]) > 0 and number(row[4]) > 0
    assert benchmark_rollout.work_of(sizes, 2).group == 2
    assert benchmark_rollout.tables(sizes, clock, lambda name: False) == []


def test_the_smaller_bound_holds():
    """18 tokens at the rate of 1e9 FLOP/s or bytes/s."""
    row = benchmark_rollout.row(WORK, 1.0, RATES)
    bandwidth, arithmetic = 18e9 / benchmark_floor.read_while_drawing(WORK), 18e9 / benchmark_floor.of_answers(WORK)
    assert row[2:5] == ("18", f"{bandwidth:,.0f}", f"{arithmetic:,.0f}")
    slow = dataclasses.replace(RATES, weights=2.0 * benchmark_floor.read_while_drawing(WORK))  # 36 tokens/s
    assert benchmark_rollout.row(WORK, 1.0, slow)[5] == "50.0%"


def test_growth_beyond_its_prediction_is_named(monkeypatch):
    """Three times the time for twice the FLOPs; and as much time for half as much more."""
    growth = benchmark_scaling.Growth("prompts", (2, 4, 8), (1.0, 3.0, 3.0), (10, 20, 30))
    monkeypatch.setattr(benchmark_scaling, "_growth", lambda base, axis, clock, made: growth)
    table, = benchmark_scaling.tables(benchmark_scaling.BASE, clock, lambda name: name == "prompts")
    assert table.rows == (("prompts", "2", "4", "1,000.00", "3,000.00", "3.00x", "2.00x", "1.50"),
                          ("prompts", "4", "8", "3,000.00", "3,000.00", "1.00x", "1.50x", "0.67"))
    assert table.missed == ("prompts from 2 to 4: the time grows 3.00x, the FLOPs 2.00x",)


@pytest.mark.parametrize("axis", benchmark_scaling.AXES)
def test_one_size_grows(axis):
    new = benchmark_scaling.grown(WORK, axis, 2)
    assert benchmark_scaling.size(new, axis) == 2 * benchmark_scaling.size(WORK, axis)
    assert all(benchmark_scaling.size(new, other) == benchmark_scaling.size(WORK, other)
               for other in benchmark_scaling.AXES if other != axis)


def test_growth_is_measured(monkeypatch):
    monkeypatch.setattr(benchmark_scaling, "DOUBLINGS", 1)
    table, = benchmark_scaling.tables(THIN, clock, lambda name: name == "answers per prompt")
    row, = table.rows
    assert row[:3] == ("answers per prompt", "3", "6") and all(number(cell) > 0 for cell in row[3:])
    assert 1 < number(row[6]) < 2  # what is done once for each prompt does not grow


def test_growth_is_drawn(monkeypatch, tmp_path):
    growth = benchmark_scaling.Growth("vocabulary", (16, 32), (1.0, 3.0), (10, 20))
    monkeypatch.setattr(benchmark_scaling, "_growth", lambda base, axis, clock, made: growth)
    monkeypatch.setattr(benchmark_scaling, "PLOT", tmp_path / "new" / "scaling.svg")
    benchmark_scaling.tables(THIN, clock, lambda name: name == "vocabulary", plot=True)
    drawn = (tmp_path / "new" / "scaling.svg").read_text()
    assert all(f"<!-- {label} -->" in drawn for label in ("vocabulary", "time", "FLOPs"))


@pytest.mark.parametrize("name", ["step", "rollout", "scaling"])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_benchmarks_file_has_a_place_for_every_table(name, platform, tmp_path):
    path = tmp_path / "BENCHMARKS.md"
    path.write_text(benchmark_table.BENCHMARKS.read_text())
    benchmark_table.write(f"{name} {platform}", [benchmark_table.Table("here", ("a",), ())], path)
    assert "here" in path.read_text()
