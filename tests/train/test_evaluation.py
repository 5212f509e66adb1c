"""Estimators against brute force: every subset, every tie, in plain Python."""
import itertools
import json
import math
import random
import statistics

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from rl_jax.train import evaluation


def brute_pass_at_k(scores, failed, k):
    """The share of k-subsets of each problem's scored samples that hold a score of 1."""
    problems = []
    for row, bad in zip(scores, failed, strict=True):
        scored = [score == 1 for score, wrong in zip(row, bad, strict=True) if not wrong]
        if len(scored) >= k:
            subsets = list(itertools.combinations(scored, k))
            problems.append(sum(any(subset) for subset in subsets) / len(subsets))
    return problems


def brute_majority(answers, scores, failed):
    problems = []
    for row, score, bad in zip(answers, scores, failed, strict=True):
        if all(bad):
            continue
        votes = [(a, s == 1) for a, s, b in zip(row, score, bad, strict=True) if a and not b]
        counts = {a: sum(other == a for other, _ in votes) for a, _ in votes}
        winners = [a for a in counts if counts[a] == max(counts.values())]
        right = [statistics.fmean(s for a, s in votes if a == winner) for winner in winners]
        problems.append(statistics.fmean(right) if right else 0.0)
    return problems


def check(estimate, problems):
    assert math.isclose(estimate.value, statistics.fmean(problems), rel_tol=1e-12)
    assert math.isclose(estimate.stderr, statistics.stdev(problems) / math.sqrt(len(problems)), rel_tol=1e-9)


@pytest.fixture
def drawn():
    source = random.Random(0)
    scores = [[source.choice([0.0, 0.0, 0.5, 1.0]) for _ in range(7)] for _ in range(11)]
    failed = [[source.random() < 0.2 for _ in range(7)] for _ in range(11)]
    failed[3] = [True] * 7
    failed[4] = [True] * 6 + [False]
    return scores, failed


@pytest.mark.parametrize("k", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_correct_sample(drawn, k):
    scores, failed = drawn
    scores[0], failed[0] = [1.0, 0, 0, 0, 0, 0, 0], [False] * 7
    scores[1], failed[1] = [0.0] * 7, [False] * 7
    check(evaluation.pass_at_k(np.array(scores), k, np.array(failed)), brute_pass_at_k(scores, failed, k))


def test_pass_at_k_without_failures_takes_bools_and_jax_arrays(drawn):
    scores, _ = drawn
    nowhere = [[False] * 7] * 11
    correct = np.array(scores) == 1
    for given in (correct, jnp.asarray(correct), np.array(scores, np.float32)):
        check(evaluation.pass_at_k(given, 3), brute_pass_at_k(scores, nowhere, 3))


def test_pass_at_k_is_exact_for_many_samples():
    correct = np.zeros((2, 10_000), bool)
    correct[:, :3] = True
    exact = 1 - math.comb(9_997, 1_000) / math.comb(10_000, 1_000)
    assert math.isclose(evaluation.pass_at_k(correct, 1_000).value, exact, rel_tol=1e-12)


def test_partial_credit_is_never_pass_at_1():
    scores = np.array([[0.99, 0.5], [1.0, 0.0]])
    assert evaluation.pass_at_k(scores, 1).value == 0.25
    assert evaluation.average_at_k(scores).value == 0.25


def test_average_leaves_failures_and_nan_scores_out(drawn):
    scores, failed = drawn
    scores[7][2], failed[7] = math.nan, [False] * 7
    unscored = [[bad or math.isnan(score) for score, bad in zip(row, wrong, strict=True)]
                for row, wrong in zip(scores, failed, strict=True)]
    check(evaluation.average_at_k(np.array(scores), np.array(failed)), brute_pass_at_k(scores, unscored, 1))


def test_majority_shares_ties_and_ignores_missing_answers():
    answers = [["7", "7", "8", None],      # majority right
               ["7", "8", None, ""],       # tie of right and wrong: one half
               ["8", "8", "8", "7"],       # majority wrong
               [None, None, None, None],   # nothing was answered: wrong
               ["7", "8", "8", "8"]]       # the verifier failed on the wrong ones: they cast no vote
    scores = [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    failed = [[False] * 4] * 4 + [[False, True, True, True]]
    estimate = evaluation.majority_at_k(answers, np.array(scores, float), np.array(failed))
    check(estimate, [1, 0.5, 0, 0, 1])
    check(estimate, brute_majority(answers, scores, failed))


def test_majority_against_brute_force():
    source = random.Random(1)
    answers = [[source.choice(["1", "2", "3", None]) for _ in range(6)] for _ in range(40)]
    scores = [[float(answer == "1") for answer in row] for row in answers]
    failed = [[source.random() < 0.3 for _ in row] for row in answers]
    check(evaluation.majority_at_k(answers, np.array(scores), np.array(failed)),
          brute_majority(answers, scores, failed))


def test_summary_names_every_estimate_and_counts_what_was_left_out(drawn):
    scores, failed = drawn
    answers = [["x"] * 7] * 11
    found = evaluation.summary(np.array(scores), np.array(failed), answers, ks=(1, 4))
    assert list(found) == ["pass@1", "pass@4", "avg@7", "maj@7", "count/problems", "count/samples", "count/failed",
                           "count/left_out@1", "count/left_out@4"]
    lost = sum(map(sum, failed))
    short = sum(7 - sum(row) < 4 for row in failed)
    assert [found[f"count/{name}"].value for name in ("samples", "failed", "left_out@1", "left_out@4")] == \
        [77, lost, 1, short]
    assert found["pass@1"] == found["avg@7"]


def test_too_few_problems_have_no_standard_error_and_all_failed_has_no_value(tmp_path):
    one = evaluation.summary(np.ones((1, 2)), ks=(1,))
    assert one["pass@1"].value == 1 and math.isnan(one["pass@1"].stderr)
    none = evaluation.summary(np.ones((3, 2)), np.ones((3, 2), bool), [["1", "1"]] * 3, ks=(2,))
    assert all(math.isnan(none[name].value) for name in ("pass@2", "avg@2", "maj@2"))
    rows = json.loads(evaluation.write(tmp_path, none).read_text())
    assert rows[0] == {"name": "pass@2", "value": None, "stderr": None}
    assert {"name": "count/failed", "value": 6.0, "stderr": 0.0} in rows


def test_table_shows_percent_and_hides_empty_losses():
    console = rich.console.Console(width=100, file=None, record=True, quiet=False)
    with console.capture() as shown:
        before = evaluation.summary(np.array([[1.0, 0.0], [0.0, 0.0]]), ks=(1,))
        after = evaluation.summary(np.array([[1.0, 0.0], [1.0, 1.0]]), ks=(1,))
        console.print(evaluation.table({"before": before, "after": after}))
    assert "75.0 % ± 25.0 %" in shown.get() and "25.0 % ± 25.0 %" in shown.get()
    assert "failed" not in shown.get() and "left out" not in shown.get()


@pytest.mark.parametrize("k", [0, 5])
def test_k_outside_the_samples_is_refused(k):
    with pytest.raises(ValueError, match="k must be 1 to the number of samples"):
        evaluation.pass_at_k(np.ones((2, 4)), k)


def test_a_table_of_answers_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\[P\]\[K\]"):
        evaluation.majority_at_k([["1"], ["2"]], np.ones((2, 4)))
