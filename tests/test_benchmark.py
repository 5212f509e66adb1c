"""Every row of the benchmarks of kernels and of shared prompts, at toy size, and how they get into BENCHMARKS.md."""
import dataclasses
import pathlib
import sys

import pytest

from tests.clock import clock, number

SCRIPTS = pathlib.Path(__file__).resolve().parents[1] / "scripts"
sys.path.append(str(SCRIPTS))

import benchmark_kernels  # noqa: E402  (scripts are no package)
import benchmark_lengths  # noqa: E402
import benchmark_prefix  # noqa: E402
import benchmark_refill  # noqa: E402
import benchmark_table  # noqa: E402

KERNELS = dataclasses.replace(
    benchmark_kernels.SIZES["cpu"], square=8, copied=64, linear=((16, 50, 8),),
    loss=((16, 50, 8),), heads=(2, 1, 8), prefix=((2, 2, 5, 4),),
    decode=((2, 2, 6, 4),), gate=((4, 8),), scan=((4, 8),), memory=((64,), (4096,), 8))
OPS = {"linear_logprob": 4, "linear_policy_loss": 8, "prefix_attention": 6, "decode_attention": 3, "policy_gate": 4,
       "discounted_scan": 4}


@pytest.fixture(autouse=True)
def one_call_per_measurement(monkeypatch):
    monkeypatch.setattr(benchmark_kernels, "SHORTEST_MEASUREMENT_S", 0.0)


def test_every_op_is_measured():
    times, memory = benchmark_kernels.tables(KERNELS, clock, lambda name: True)
    found = [row[0] for row in times.rows]
    assert {op: found.count(op) for op in found} == OPS
    for row in times.rows:
        assert len(row) == len(times.columns) and all(number(cell) >= 0 for cell in row[5:]), row
        assert number(row[5]) > 0 and number(row[7]) >= 0
    assert {row[4] for row in times.rows} == {"forward", "forward and gradient"}
    assert len(memory.rows) == 2 and all(number(row[5]) < number(row[6]) for row in memory.rows)


def test_nothing_wanted_is_no_table():
    assert benchmark_kernels.tables(KERNELS, clock, lambda name: False) == []
    assert benchmark_prefix.tables(benchmark_prefix.SIZES["cpu"], clock, lambda name: False) == []


def test_what_cannot_run_is_a_row_and_not_the_end(monkeypatch):
    sizes = dataclasses.replace(KERNELS, implementations=(None, "triton"))
    table, = benchmark_kernels.tables(sizes, clock, lambda name: name.startswith("discounted_scan"))
    refused = [row[7] for row in table.rows if row[3] == "triton"]
    assert len(refused) == 2 and all("has no implementation 'triton'; allowed are" in why for why in refused)


def test_a_default_that_is_slower_than_its_target_is_named():
    slow = lambda *sides: [2.0 if number == 0 else 1.0 for number in range(len(sides))]
    table, = benchmark_kernels.tables(KERNELS, slow, lambda name: name.startswith("linear_logprob M"))
    assert table.missed == ("linear_logprob M=16 V=50 D=8: 2.00x of the reference's time",)


def test_what_learning_computes_of_short_answers():
    shape = dataclasses.replace(benchmark_lengths.SIZES["cpu"].shape, vocabulary=8, width=8, heads=1, key_heads=1,
                                head_size=8, inner=8)
    sizes = benchmark_lengths.Sizes(shape, 2, 4, 4, 3, 16)
    table, = benchmark_lengths.tables(sizes, clock, lambda name: name == "packed in 2 rows a group")
    assert [row[:3] for row in table.rows] == [("whole rows", "1.00", "1.00x"), ("packed in 2 rows a group", "0.50", "2.00x")]
    assert sorted(benchmark_lengths.answer_lengths(sizes))[-1] <= 16
    assert benchmark_lengths.tables(sizes, clock, lambda name: False) == []


def test_a_shared_prompt_saves_flops_where_there_are_several_completions():
    shape = dataclasses.replace(benchmark_prefix.SIZES["cpu"].shape, vocabulary=8, width=32, layers=1, inner=64)
    sizes = benchmark_prefix.Sizes(shape, 1, (2, 4), (8, 64), 8)
    table, = benchmark_prefix.tables(sizes, clock, lambda name: name == "S:T=8:1 G=4")
    row, = table.rows
    assert row[0] == "S:T=8:1 G=4"
    assert row[4] == "3.00x" and 1.3 < number(row[3]) < 3  # attention to the prompt and the last layer save nothing
    assert all(number(cell) > 0 for cell in row[5:])


def test_slots_are_measured_on_the_same_answers(monkeypatch):
    """A row per number of slots that tells how many answers are alike; one that is too slow is named, and unequal ones are."""
    shape = dataclasses.replace(benchmark_refill.SIZES["cpu"].shapes[0], vocabulary=8, width=16, layers=1, inner=16)
    sizes = benchmark_refill.Sizes((shape,), 3, 4, prompt_tokens=4, mean=3, most=6, slots=(3, 4))
    padded_is_slow = lambda *sides: [7.0, 2.0, 4.0][:len([side() for side in sides])]
    loops, attention = benchmark_refill.tables(sizes, padded_is_slow, lambda name: True)
    assert [row[4:] for row in loops.rows] == [("3.50x", "2x", "12/12"), ("1.75x", "2x", "12/12")]
    assert loops.missed == (loops.rows[1][0],) and len(set(benchmark_refill.lengths(sizes).ravel())) > 2
    assert [row[0] for row in attention.rows] == ["attention S=4 slots=4", "attention S=32 slots=4"]
    monkeypatch.setattr(benchmark_refill, "_alike", lambda found, expected: "11/12")
    loops, _ = benchmark_refill.tables(sizes, padded_is_slow, lambda name: True)
    assert sum("11/12 answers equal" in missed for missed in loops.missed) == 2


def test_only_the_section_is_replaced(tmp_path):
    path = tmp_path / "BENCHMARKS.md"
    text = "before\n\n<!-- {0}: written by scripts/benchmark.py -->\nold\n<!-- {0}: end -->\n\nafter\n"
    path.write_text(text.format("kernels cpu") + text.format("kernels gpu"))
    table = benchmark_table.Table("Caption \\1.", ("op", "ms"), (("a", "1"), ("b", "2")))
    benchmark_table.write("kernels cpu", [table, table], path)
    new = "Caption \\1.\n\n| op | ms |\n| --- | --- |\n| a | 1 |\n| b | 2 |"
    expected = text.format("kernels cpu").replace("old", f"{new}\n\n{new}") + text.format("kernels gpu")
    assert path.read_text() == expected
    benchmark_table.write("kernels cpu", [table], path)
    assert path.read_text() == expected.replace(f"{new}\n\n{new}", new)
    with pytest.raises(ValueError, match="must have these two lines"):
        benchmark_table.write("kernels tpu", [table], path)


@pytest.mark.parametrize("name", ["kernels", "prefix", "refill"])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_benchmarks_file_has_a_place_for_every_table(name, platform, tmp_path):
    path = tmp_path / "BENCHMARKS.md"
    path.write_text(benchmark_table.BENCHMARKS.read_text())
    benchmark_table.write(f"{name} {platform}", [benchmark_table.Table("here", ("a",), ())], path)
    assert "here" in path.read_text()


def test_a_table_is_shown(capsys):
    benchmark_table.show(benchmark_table.Table("caption", ("row", "ms"), (("first", "1.5"),)))
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("caption", "first", "1.5"))
    assert "Python" in benchmark_table.circumstances()
