"""What a killed and resumed run leaves behind, and that every line is strict JSON."""
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import types as python_types

import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax import types
from rl_jax.train import metrics

PHASES = ["sft"] * 4 + ["rl"] * 6


def record(writer, steps):
    """What a run of ten steps writes, for some of its steps."""
    for step in steps:
        phase = PHASES[step - 1]
        writer.metrics(step, phase, {"reward/mean": jnp.float32(1 / step), "loss/total": np.float64(step) ** 0.5,
                                     "gradient/norm": math.inf if step == 7 else 1, "speed/step_s": step * 0.1})
        if step % 2 == 0:
            writer.metrics(step, phase, {"validation/pass@1": step / 10})
            writer.rollouts(step, phase, [{"group": g, "prompt": "é\u2028\n", "completion": "\ud800" * (step == 8),
                                           "score": math.nan if g else 1.0} for g in range(2)])


def left_behind(workdir):
    return ([metrics.timeless(row) for row in metrics.rows(workdir / "metrics.jsonl")],
            (workdir / "rollouts.jsonl").read_bytes())


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


@pytest.fixture
def uninterrupted(tmp_path):
    with metrics.Writer(tmp_path / "whole") as writer:
        record(writer, range(1, 11))
    return tmp_path / "whole"


def test_lines_are_strict_json_in_a_fixed_order(uninterrupted):
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        for line in (uninterrupted / name).read_text(encoding="ascii").splitlines():
            json.loads(line, parse_constant=refuse)
    rows = list(metrics.rows(uninterrupted / "metrics.jsonl"))
    assert list(rows[0]) == ["step", "phase", "time_s", "gradient/norm", "loss/total", "reward/mean", "speed/step_s"]
    assert rows[0]["reward/mean"] == 1.0 and isinstance(rows[0]["gradient/norm"], float)
    assert [row["gradient/norm"] for row in rows if row["step"] == 7] == ["Infinity"]
    assert float("Infinity") == math.inf


@pytest.mark.parametrize("saved, killed_after", [(s, k) for s in (0, 1, 4, 6) for k in range(1, 11) if s <= k])
def test_killed_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, saved, killed_after):
    workdir = tmp_path / "killed"
    record(metrics.Writer(workdir), range(1, killed_after + 1))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (workdir / name).open("ab") as file:
            file.write(b'{"step":' + str(killed_after).encode() + b',"phase":"r')
    with metrics.Writer(workdir) as writer:
        writer.truncate_to(saved)
        assert writer.step == saved
        record(writer, range(saved + 1, 11))
    assert left_behind(workdir) == left_behind(uninterrupted)


def test_opening_again_without_truncation_appends(uninterrupted):
    before = left_behind(uninterrupted)
    with metrics.Writer(uninterrupted) as writer:
        assert writer.step == 10
        writer.metrics(11, "rl", {"a": 1})
    after = left_behind(uninterrupted)
    assert after[0][:-1] == before[0] and after[0][-1] == {"step": 11, "phase": "rl", "a": 1.0}


def test_a_cut_in_the_middle_of_a_rollout_table_is_repaired(uninterrupted):
    path = uninterrupted / "rollouts.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    with metrics.Writer(uninterrupted) as writer:
        assert [row["step"] for row in metrics.rows(path)] == [2, 2, 4, 4, 6, 6, 8, 8, 10]
        writer.truncate_to(8)
    assert [row["step"] for row in metrics.rows(path)] == [2, 2, 4, 4, 6, 6, 8, 8]


def test_time_goes_on_after_a_resume(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    with metrics.Writer(tmp_path) as writer:
        for step in (1, 2):
            now[0] += 10
            writer.metrics(step, "rl", {})
    now[0] = 5.0
    with metrics.Writer(tmp_path) as writer:
        writer.truncate_to(1)
        now[0] += 1
        writer.metrics(2, "rl", {})
    assert [row["time_s"] for row in metrics.rows(tmp_path / "metrics.jsonl")] == [10.0, 11.0]


def test_wrong_values_are_refused_by_name(tmp_path):
    with metrics.Writer(tmp_path) as writer:
        writer.metrics(3, "rl", {})
        with pytest.raises(ValueError, match="step 2 after step 3"):
            writer.metrics(2, "rl", {})
        with pytest.raises(ValueError, match=r"'reward/mean' has shape \(2,\)"):
            writer.metrics(4, "rl", {"reward/mean": np.ones(2)})
        with pytest.raises(ValueError, match="cannot be named 'phase'"):
            writer.metrics(4, "rl", {"phase": 1})
        with pytest.raises(ValueError, match="object is not a value for JSON"):
            writer.rollouts(4, "rl", [{"prompt": object()}])
    assert [row["step"] for row in metrics.rows(tmp_path / "metrics.jsonl")] == [3]


@pytest.mark.parametrize("line", [b"{broken\n", b"[1]\n", b'{"phase":"rl"}\n'])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step":1,"phase":"rl","time_s":0.1}\n' + line)
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is not"):
        metrics.Writer(tmp_path)


@pytest.mark.parametrize("extra, module", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch, extra, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{extra}=True needs the package {module}.*pip install 'rl_jax\[log\]'"):
        metrics.Writer(tmp_path, **{extra: True})


def test_mirrors_get_every_number_and_resume(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, directory, purge_step):
            calls.append(("open", pathlib.Path(directory).name, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append("close")

    runs = []

    class Run:
        def log(self, numbers, step):
            calls.append((numbers, step))

        def finish(self):
            calls.append("finish")

    def init(**arguments):
        runs.append(arguments)
        return Run()

    monkeypatch.setitem(sys.modules, "tensorboardX", python_types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", python_types.SimpleNamespace(init=init))
    with metrics.Writer(tmp_path, tensorboard=True, wandb=True) as writer:
        writer.metrics(1, "rl", {"a": 1})
        writer.metrics(2, "rl", {"a": 2})
    with metrics.Writer(tmp_path, tensorboard=True, wandb=True) as writer:
        writer.truncate_to(1)
    assert calls == [("open", "tensorboard", None), ("a", 1.0, 1), ({"a": 1.0}, 1), ("a", 2.0, 2), ({"a": 2.0}, 2),
                     "close", "finish", ("open", "tensorboard", 3), "close", ("open", "tensorboard", 2), "close",
                     "finish"]
    assert runs[0]["id"] == runs[1]["id"] and runs[0]["resume"] == "allow"


@pytest.fixture
def batch():
    """Two prompts with two samples of up to three tokens; the verifier failed on the last."""
    mask = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    logp = np.array([[-1, -2, -99], [-1, -1, -1], [-0.5, -99, -99], [-99, -99, -99]], np.float32)
    return types.Experience(
        tokens=jnp.zeros((4, 3), int), mask=jnp.asarray(mask), rollout_logp=jnp.asarray(logp),
        rollout_entropy=jnp.asarray(-logp / 2), finished=jnp.array([True, False, True, True]),
        version=jnp.zeros(4, int), score=jnp.array([1.0, 0.0, 0.5, jnp.nan]),
        reward=jnp.array([1.1, 0.1, 0.6, jnp.nan]), group=jnp.array([0, 0, 1, 7]),
        parts={"format": jnp.array([0.1, 0.1, 0.1, 0.0])},
        failed=jnp.array([False, False, False, True]),
        given={"advantage": jnp.array([[1.0, 3, 9], [-1, -1, -1], [0.5, 9, 9], [9, 9, 9]])})


def test_rollout_rows_never_read_unchosen_tokens(batch):
    rows = metrics.rollout_rows(batch, ["p", "q"], list("abcd"))
    assert [(row["group"], row["prompt"], row["completion"]) for row in rows] == \
        [(0, "p", "a"), (0, "p", "b"), (1, "q", "c"), (1, "q", "d")]
    first = rows[0]
    assert (first["advantage"], first["logp_sum"], first["logp_mean"], first["entropy"], first["tokens"]) == \
        (2.0, -3.0, -1.5, 0.75, 2)
    assert first["parts"] == {"format": pytest.approx(0.1)} and not rows[1]["finished"]
    last = rows[3]
    assert last["failed"] and last["logp_sum"] == 0 and last["logp_mean"] is None and last["advantage"] is None
    assert json.loads(metrics.to_json(last), parse_constant=refuse)["score"] == "NaN"


def test_rollout_rows_keep_whole_groups(batch):
    assert [row["completion"] for row in metrics.rollout_rows(batch, ["p", "q"], list("abcd"), groups=1)] == ["a", "b"]
    with pytest.raises(ValueError, match="3 completions for a batch of 4"):
        metrics.rollout_rows(batch, ["p", "q"], list("abc"))


def test_a_killed_process_loses_no_line(tmp_path):
    program = ("import os, signal, sys; from rl_jax.train import metrics; writer = metrics.Writer(sys.argv[1]);"
               "writer.metrics(1, 'rl', {'a': 1}); writer.rollouts(1, 'rl', [{'group': 0}]);"
               "os.kill(os.getpid(), signal.SIGKILL)")
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == -signal.SIGKILL
    assert [row["a"] for row in metrics.rows(tmp_path / "metrics.jsonl")] == [1.0]
    assert [row["group"] for row in metrics.rows(tmp_path / "rollouts.jsonl")] == [0]
