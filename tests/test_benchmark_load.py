"""The tables of loading and of memory, at toy size, and that they are right about what can be counted."""
import dataclasses
import pathlib
import sys

import jax
import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parents[1] / "scripts"
sys.path.append(str(SCRIPTS))

import benchmark_load  # noqa: E402  (scripts are no package)
import benchmark_memory  # noqa: E402
import benchmark_table  # noqa: E402

SHAPE = dataclasses.replace(benchmark_load.SIZES.shape, vocabulary=64, width=32, layers=2, heads=2, key_heads=1,
                            head_size=16, inner=48)
LOAD = benchmark_load.Sizes(SHAPE, 20_000)
MEMORY = benchmark_memory.Sizes(dataclasses.replace(SHAPE, scan_layers=True), 2, 2, 6, 4, 2)
MIB, GIB = 2**20, 2**30
NUMBERS = 64 * 32 + 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32 + 2 * 16)  # of the tied network
ADAPTERS = 16 * 2 * ((32 + 32) * 2 + (32 + 16) * 2 + 3 * (32 + 48))  # of every projection, rank 16


def number(cell):
    return float(cell.replace(",", ""))


def test_loading_is_measured_in_a_process_of_its_own():
    """What it holds before and at most are those of a process; the parameters are next to nothing."""
    table, = benchmark_load.tables(LOAD, lambda name: name == "float32, unrolled")
    row, = table.rows
    assert row[0] == "float32, unrolled" and len(row) == len(table.columns)
    assert number(row[1]) > 0 and 100 < number(row[4]) <= number(row[5]) < 2_000
    assert "in 2 files of bfloat16 (2 layers of width 32, V = 64)" in table.caption


def test_what_needs_too_much_is_named(monkeypatch):
    """It may need the largest file, 20,480 bytes at most and a header, and the embedding: 64 x 32 numbers."""
    found = {"seconds": 2.0, "before": 10 * MIB, "parameters": MIB, "peak": 11 * MIB + 10_000}
    monkeypatch.setattr(benchmark_load, "_load", lambda folder, dtype, layers: found | (
        {"peak": 20 * MIB} if layers == "scanned" else {}))
    table, = benchmark_load.tables(LOAD, lambda name: name.startswith("bfloat16"))
    assert [row[0] for row in table.rows] == ["bfloat16, unrolled", "bfloat16, scanned"]
    assert table.missed == ("bfloat16, scanned: 9 MiB beyond the parameters",)
    assert table.rows[1][3:7] == ("1", "10", "20", "9")


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="(?s)loading float32, unrolled failed:.*config.json: give the folder"):
        benchmark_load._load(tmp_path, "float32", "unrolled")


@pytest.mark.parametrize("name, trained, frozen", [
    ("all weights", 4 * NUMBERS, 4 * NUMBERS), ("adapters, rank 16", 4 * ADAPTERS, 4 * NUMBERS),
    ("adapters, rank 16, on bfloat16", 4 * ADAPTERS, 2 * NUMBERS)])
def test_what_is_held_is_counted_by_hand(name, trained, frozen):
    """The reference is a copy of all weights, or the base beside the adapters; AdamW keeps two numbers for each."""
    _, state = benchmark_memory.start(MEMORY, *benchmark_memory.VARIANTS[name])
    found = benchmark_memory.held(state)
    assert found[:2] == (trained, frozen)
    assert 2 * trained <= found[2] < 2 * trained + 100


def test_temporaries_are_those_of_compiled_programs(monkeypatch):
    monkeypatch.setattr(benchmark_memory, "GIB", 1)
    table, = benchmark_memory.tables(MEMORY, lambda name: name == "adapters, rank 16")
    row, = table.rows
    _, trained, frozen, optimiser, draw, update, whole = row[0], *map(number, row[1:])
    assert (trained, frozen) == (4 * ADAPTERS, 4 * NUMBERS)
    assert min(draw, update) > 1_000 and whole == trained + frozen + optimiser + max(draw, update)
    assert ("float32 copies" in table.caption) == (jax.default_backend() == "cpu")


def test_nothing_wanted_is_no_table():
    assert benchmark_load.tables(LOAD, lambda name: False) == []
    assert benchmark_memory.tables(MEMORY, lambda name: False) == []


@pytest.mark.parametrize("name", ["load", "memory"])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_benchmarks_file_has_a_place_for_both(name, platform, tmp_path):
    path = tmp_path / "BENCHMARKS.md"
    path.write_text(benchmark_table.BENCHMARKS.read_text())
    benchmark_table.write(f"{name} {platform}", [benchmark_table.Table("here", ("a",), ())], path)
    assert "here" in path.read_text()
