"""Statistics of curves against plain loops, on numbers that were made up and added up by hand."""
import json
import math
import statistics

import numpy as np
import pytest

from rl_jax.train import curves

# two replicas, ten steps: the last tenth is step 10
GRPO = [[0.0, 0.0], [0.0, 0.2], [0.2, 0.2], [0.2, 0.4], [0.4, 0.4],
        [0.4, 0.6], [0.6, 0.6], [0.6, 0.6], [0.5, 0.7], [0.5, 0.7]]
MINE = [[0.0, 0.1], [0.2, 0.3], [0.4, 0.5], [0.5, 0.6], [0.6, 0.6],
        [0.7, 0.7], [0.7, 0.8], [0.8, 0.8], [0.8, 0.8], [0.7, 0.8]]
IDLE = [[0.0, 0.0]] * 10


def curve(score, *, skipped=None, answers=64.0, updates=1, step_s=None):
    score = np.array(score)
    skipped = np.zeros(score.shape) if skipped is None else np.array(skipped, float)
    seconds = np.full(len(score), 0.5) if step_s is None else np.array(step_s)
    return curves.Curve(values={"reward/score": score, "gradient/skipped": skipped}, updates=updates, step_s=seconds,
                        answers=np.full(score.shape, answers))


def test_the_table():
    found = {"grpo": curve(GRPO), "idle": curve(IDLE), "mine": curve(MINE, updates=4, answers=128.0)}
    mine, grpo, idle = curves.table(found, "grpo")
    assert [mine.name, grpo.name, idle.name] == ["mine", "grpo", "idle"]
    # replicas end with 0.7 and 0.8; the error of two numbers is half their distance
    assert (mine.score, mine.score_stderr) == pytest.approx((0.75, 0.05))
    assert (grpo.score, grpo.score_stderr) == pytest.approx((0.6, 0.1))
    assert (mine.share, grpo.share, idle.share) == pytest.approx((1.25, 1.0, 0.0))
    # replica by replica: 0.2 and 0.1
    assert (mine.difference, mine.difference_stderr) == pytest.approx((0.15, 0.05))
    assert (grpo.difference, grpo.difference_stderr) == (0.0, 0.0)
    # half of the best is 0.375; means are .05 .25 .45 ... and 0 .1 .2 .3 .4 ...
    assert (mine.half_way, grpo.half_way, idle.half_way) == (3, 5, None)
    assert (mine.updates, grpo.updates, mine.answers, grpo.answers) == (40, 10, 1280.0, 640.0)


def test_the_median_of_step_times_is_not_moved_by_one_slow_step():
    row, = curves.table({"a": curve(GRPO, step_s=[9.0, *[0.1] * 9])}, "a")
    assert row.step_s == pytest.approx(0.1)


@pytest.mark.parametrize("window", [1, 3, 10, 50])
def test_the_running_mean_is_that_of_a_loop(window):
    values = np.array(MINE)
    expected = [[statistics.fmean(values[max(0, k - window + 1):k + 1, r]) for r in range(2)]
                for k in range(len(values))]
    np.testing.assert_allclose(curves.running_mean(values, window), expected, atol=1e-12)


def test_the_error_over_replicas():
    values = np.array([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]])
    mean, error = curves.mean_and_error(values)
    assert mean.tolist() == [3.0, 0.0]
    assert error.tolist() == pytest.approx([statistics.stdev([1, 2, 6]) / math.sqrt(3), 0.0])
    mean, error = curves.mean_and_error(values[:, :1])
    assert mean.tolist() == [1.0, 0.0] and np.isnan(error).all()


def test_one_replica_of_a_recipe_that_never_scores():
    row, = curves.table({"idle": curve(np.zeros((10, 1)))}, "idle")
    assert row.score == 0 and math.isnan(row.score_stderr) and math.isnan(row.share) and row.half_way is None


def test_skipped_updates_are_counted_and_told():
    skipped = np.zeros((10, 2))
    skipped[2:9, 1] = 1
    skipped[4, 0] = 3
    found = {"grpo": curve(GRPO), "mine": curve(MINE, skipped=skipped)}
    assert [row.skipped for row in curves.table(found, "grpo")] == [10, 0]
    first, second = curves.skips(found)
    assert first.startswith("mine: 3 updates of replica 1 skipped") and "in 1 steps (5)" in first
    assert "7 updates of replica 2" in second and "in 7 steps (3, 4, 5, 6, 7, ...)" in second


def test_written_and_read_is_the_same(tmp_path):
    one = curve(MINE, updates=2, step_s=np.linspace(0.1, 1.0, 10))
    one.values["policy/ratio_max"] = np.where(np.array(MINE) > 0.75, np.inf, 1 / 3)
    path = tmp_path / "mine" / "curve.jsonl"
    curves.write(path, one)
    assert [p.name for p in path.parent.iterdir()] == ["curve.jsonl"]
    first = json.loads(path.read_text().splitlines()[0])
    assert first["step"] == 1 and first["reward/score"] == [0.0, 0.1] and first["updates"] == 2
    again = curves.read(path)
    assert again.updates == 2 and sorted(again.values) == sorted(one.values)
    np.testing.assert_array_equal(again.answers, one.answers)
    np.testing.assert_array_equal(again.step_s, one.step_s)
    for name, values in one.values.items():
        np.testing.assert_array_equal(again.values[name], values)
