"""The comparison with peers, without them: our side as a process at toy size, sides made up here, checks and targets."""
import json
import pathlib
import sys
import textwrap

import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parents[1] / "scripts"
sys.path.append(str(SCRIPTS))

import benchmark_peers  # noqa: E402  (scripts are no package)
import benchmark_table  # noqa: E402
from peers import environment, turns  # noqa: E402

from configs.benchmark import shared_toy  # noqa: E402
from rl_jax import sections  # noqa: E402

WORK = {"prompts_per_step": 2, "group_size": 4, "completion_length": 8}
EACH = 2 * 4 * 8
PARAMETERS = 16 * 8 + 8 + (8 * 8 * 2 + 8 * 4 * 2 + 8 + 4 + 4 + 3 * 8 * 16 + 2 * 8)  # tied, two heads, one key head
FAKE = textwrap.dedent("""
    import json, sys
    sys.path.insert(0, sys.argv[1])
    import turns
    pace, change = turns.Pace(), json.loads(sys.argv[2])
    print("noise")
    at, wanted = 0, pace.built(change.get("parameters", 7), [0.0], change.get("threads", [0]))
    while wanted:
        at += 1
        if at == change.get("dies"):
            sys.exit("out of memory")
        moved = [0.0 if change.get("still") else float(at)]
        wanted = pace.made(change.get("tokens", 64), [at * change.get("slope", 0.01)], lambda: moved)
""")


def fake(name="fake", **change):
    """A side that says what it is told to say."""
    return turns.Side(name, [sys.executable, "-c", FAKE, str(SCRIPTS / "peers"), json.dumps(change)], WORK, {})


def toy():
    """The workload "tiny", smaller."""
    config = sections.plain(shared_toy.get_config("tiny"))
    config["task"]["args"] |= {"vocabulary": 16, "prompt_length": 4, "completion_length": 8, "train_size": 6}
    config["model"] |= {"width": 8, "layers": 1, "heads": 2, "key_heads": 1, "head_size": 4, "inner": 16}
    config["recipe"]["args"]["group_size"] = 4
    config["scale"] |= {"prompts_per_step": 2, "steps_per_call": 2}
    return config


def nothing(_):
    """Told what is done."""


def measured(side, steps=2, repeats=2):
    with side:
        return benchmark_peers.measured({side.name: side}, WORK, steps, repeats, nothing)[side.name]


def test_our_side_makes_its_turns_in_a_process_of_its_own():
    """Three steps are asked for and four made: a dispatch makes two."""
    work = benchmark_peers.work_of(toy())
    with benchmark_peers.started(toy(), {}, nothing) as sides:
        side = sides["rl_jax"]
        assert side.built["parameters"] == PARAMETERS
        told = side.turn(3)
        benchmark_peers.check_turn("rl_jax", work, told)
        again = side.turn(1)
    assert told["steps"] == len(told["rewards"]) == 4 and told["tokens"] == 4 * EACH and again["steps"] == 2
    assert all(0 <= reward <= 1 for reward in told["rewards"])
    assert side.built["weights"] != told["weights"] != again["weights"]
    assert told["seconds"] > 0 and 100 < again["peak_bytes"] / turns.MIB < 4_000


def test_the_work_says_all_that_the_peers_need():
    work = benchmark_peers.work_of(toy())
    assert [len(ids) for ids in work["prompts"]] == [4] * 6 and max(map(max, work["prompts"])) < 16
    assert {name: work[name] for name in WORK} == WORK
    assert (work["vocabulary"], work["inner"], work["beta"], work["clip"]) == (16, 16, 0.04, 0.2)
    assert (work["learning_rate"], work["beta2"], work["weight_decay"], work["clip_norm"]) == (1e-3, 0.95, 0.0, 1.0)
    assert json.loads(json.dumps(work)) == work


def test_every_turn_is_measured_but_those_that_warm_up():
    found = measured(fake())
    assert len(found.step_s) == 2 and all(0 < seconds < 60 for seconds in found.step_s)
    assert (found.updates, found.threads) == (1 + 1 + 2 * 2, 0) and found.peak_bytes > turns.MIB


def test_a_choice_of_threads_is_tried_before_the_turns():
    found = measured(fake(threads=[1, 2]))
    assert found.threads in (1, 2) and found.updates == 1 + 1 + 2 * 2 + 2 * 2


@pytest.mark.parametrize("change, why", [
    ({"tokens": 63}, "fake generated 63 tokens in 1 steps; the work is 64 a step"),
    ({"still": True}, "fake: a turn left the weights as they were"),
    ({"dies": 2}, "(?s)the process of fake ended with status 1:.*noise.*out of memory")])
def test_a_side_that_did_less_is_refused(change, why):
    with pytest.raises((ValueError, RuntimeError), match=why):
        measured(fake(**change))


def test_a_side_that_learns_nothing_is_refused_once_it_had_time_to():
    with pytest.raises(ValueError, match="fake learned nothing in 22 updates: the mean reward was -0.0300 in the first"):
        measured(fake(slope=-0.01), steps=10)
    assert measured(fake(slope=-0.01), steps=5).updates == 12


def test_networks_of_different_sizes_are_refused():
    with fake("one") as one, fake("other", parameters=8) as other, pytest.raises(ValueError, match=(
            "the networks differ: one trains 7 parameters, other trains 8 parameters")):
        benchmark_peers.measured({"one": one, "other": other}, WORK, 1, 1, nothing)


def of(seconds, mebibytes, threads=0):
    return benchmark_peers.Measured(step_s=(seconds, seconds / 2, 2 * seconds), start_s=1.0, first_s=2.0,
                                    peak_bytes=mebibytes * turns.MIB, updates=30, threads=threads)


def test_the_table_names_what_misses_its_target():
    table = benchmark_peers.table({
        "first": {"rl_jax": of(1.0, 500), "trl": of(1.6, 400, threads=1), "tunix": of(3.0, 500)},
        "tiny": {"rl_jax": of(1.0, 500), "trl": of(4.1, 100), "tunix": of(6.0, 100)}})
    assert table.missed == ("first, trl: 1.60x as fast, and the target is 1.7x",
                            "first, trl: 1.25x of its memory, and the target is 1x")
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert table.rows[1] == ("first", "trl 1.16.0", "1.6", "0.8 to 3.2", "1.60x", "1.7x", "400", "1.25x", "at most 1x",
                             "2.0", "1.0", "30", "1")
    assert table.rows[4][8] == "" and "not everywhere" not in table.caption


def test_each_workload_has_turns_and_targets():
    assert set(benchmark_peers.TARGETS) == set(shared_toy.TASK) == set(benchmark_peers.STEPS_PER_TURN)
    assert all(set(targets) == set(environment.PYTHONS) for targets in benchmark_peers.TARGETS.values())
    assert all((SCRIPTS / "peers" / f"{side}_steps.py").is_file() for side in (benchmark_peers.OURS, *environment.PYTHONS))


def test_nothing_wanted_is_no_table_and_no_environment():
    assert benchmark_peers.tables(lambda name: False, 5) == []


@pytest.mark.parametrize("peer, first", [("trl", "trl"), ("tunix", "google-tunix")])
def test_other_versions_are_refused_by_name(peer, first, monkeypatch):
    assert next(iter(environment.pins(peer))) == first
    assert environment.version(peer) == environment.pins(peer)[first]
    with pytest.raises(ValueError, match=f" has .*{first} is missing instead of {environment.version(peer)}.*{peer}.txt"):
        environment.check(peer, pathlib.Path(sys.executable))
    monkeypatch.setattr(environment, "pins", lambda peer: {"pytest": pytest.__version__})
    environment.check(peer, pathlib.Path(sys.executable))


def test_an_environment_that_cannot_be_made_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--environments=.*there is no .*trl/bin/python. Leave it out"):
        environment.python_of("trl", str(tmp_path))
    monkeypatch.setattr(environment, "ROOT", tmp_path)  # no find_python there
    with pytest.raises(RuntimeError, match=r"tunix needs Python 3.12, and none was found.*pyenv install 3.12"):
        environment.python_of("tunix")


def test_benchmarks_file_has_a_place_for_it(tmp_path):
    path = tmp_path / "BENCHMARKS.md"
    path.write_text(benchmark_table.BENCHMARKS.read_text())
    benchmark_table.write("peers cpu", [benchmark_table.Table("here", ("a",), ())], path)
    assert "here" in path.read_text()
