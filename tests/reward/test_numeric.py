import pickle

import numpy as np
import pytest

from rl_jax.reward import numeric, worker
from rl_jax.tasks import task


@pytest.mark.parametrize("text, answer", [
    ("#### 72", ("72", True)), ("a #### 1\nb #### 2 \nmore", ("2", True)), ("no marker 5", ("no marker 5", False)),
    ("", ("", False)), ("####", ("", True))])
def test_stated(text, answer):
    assert numeric.stated(text) == answer


@pytest.mark.parametrize("text, right, score, marked", [
    ("48/2 = 24.\n#### 72", "72", 1, 1), ("#### 1,080", "1080", 1, 1), ("#### 1080", "1,080", 1, 1),
    ("so it is 72 clips.", "72", 1, 0), ("#### 72.0", "72", 1, 1), ("#### 71", "72", 0, 1), ("", "72", 0, 0),
    ("I do not know", "72", 0, 0), ("72\n#### 5", "72", 0, 1), ("#### -3", "-3", 1, 1), ("#### $18", "18", 1, 1)])
def test_number(text, right, score, marked):
    verifier = pickle.loads(pickle.dumps(numeric.Number()))
    assert verifier({"answer": right}, text) == {"score": score, "marked": marked}


@pytest.mark.parametrize("text, answer", [
    ("1 + 2\n#### 1,080.50", "1080.5"), ("#### $72.00 and", "72"), ("it is 5, then 70", "70"), ("-19", "-19"),
    ("", None), ("7 #### none", None), ("#### 1,2", "2"), ("100", "100"), ("#### 0.0", "0")])
def test_final(text, answer):
    assert numeric.final(text) == answer


def test_an_answer_that_cannot_be_checked_in_time_is_a_failure_not_a_zero():
    """9^9^9 is a single big-integer operation: no signal interrupts it, the worker must be killed."""
    verifier = task.HostVerifier(numeric.Number(), numeric.Number.parts, time_limit_s=0.5)
    with worker.Workers(verifier, 1) as workers:
        score, parts, failed = workers.score([{"answer": "72"}] * 3, ["#### 72", "#### 9**9**9", "#### 71"])
    np.testing.assert_array_equal(failed, [False, True, False])
    np.testing.assert_array_equal(score, [1, 0, 0])
    np.testing.assert_array_equal(parts["marked"], [1, 0, 1])
