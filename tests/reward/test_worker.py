import dataclasses
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from rl_jax.reward import worker
from rl_jax.tasks import task
from tests.reward import verifiers


def host(score=verifiers.behave, parts=("length",), time_limit_s=0.5):
    return task.HostVerifier(score, parts, time_limit_s)


@pytest.fixture(scope="module")
def workers():
    with worker.Workers(host(), 2) as pool:
        yield pool


def test_scores_and_parts_in_order(workers):
    texts = [str(i) for i in range(100)]
    score, parts, failed = workers.score([{"answer": str(i - i % 2)} for i in range(100)], texts)
    np.testing.assert_array_equal(score, np.arange(100) % 2 == 0)
    np.testing.assert_array_equal(parts["length"], [len(t) for t in texts])
    assert score.dtype == np.float32 and parts["length"].dtype == np.float32 and not failed.any()


def test_no_answers(workers):
    score, parts, failed = workers.score([], [])
    assert score.shape == parts["length"].shape == failed.shape == (0,)


def test_unequal_lengths_are_an_error(workers):
    with pytest.raises(ValueError):
        workers.score([{}], [])


@pytest.mark.parametrize("fault", ["raise", "nan", "inf", "huge", "text", "none", "nothing", "no part", "quit"])
def test_a_fault_is_a_counted_failure_of_one_answer(workers, fault):
    score, parts, failed = workers.score([{"answer": "a"}] * 5, ["a", fault, "a", "a", "b"])
    np.testing.assert_array_equal(failed, [False, True, False, False, False])
    np.testing.assert_array_equal(score, [1, 0, 1, 1, 0])
    assert parts["length"][1] == 0


def test_numpy_numbers_are_numbers(workers):
    score, _, failed = workers.score([{}] * 2, ["bool", "integer"])
    np.testing.assert_array_equal(score, [1, 1])
    assert not failed.any()


@pytest.mark.parametrize("fault", ["hang", "spin", "deaf", "exit", "exit quietly", "abort"])
def test_an_answer_that_hangs_or_kills_its_worker_fails_alone(workers, fault):
    texts = ["a"] * 40
    texts[7] = fault
    start = time.monotonic()
    score, _, failed = workers.score([{"answer": "a"}] * 40, texts)
    assert time.monotonic() - start < 12
    np.testing.assert_array_equal(failed, np.arange(40) == 7)
    np.testing.assert_array_equal(score, np.arange(40) != 7)
    assert not workers.score([{"answer": "a"}] * 8, ["a"] * 8)[2].any()


def test_workers_killed_from_outside_are_replaced(workers):
    for process in multiprocessing.active_children():
        process.kill()
    for _ in range(3):
        score, _, failed = workers.score([{"answer": "a"}] * 40, ["a"] * 40)
        np.testing.assert_array_equal(score, 1)
        assert not failed.any()
        time.sleep(0.1)


def test_closed_workers_score_nothing():
    pool = worker.Workers(host(), 1)
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        pool.score([{}], [""])


def test_the_deadline_bounds_a_call():
    with worker.Workers(host(time_limit_s=30.0), 1, deadline_s=1.5) as pool:
        start = time.monotonic()
        score, _, failed = pool.score([{"answer": "a"}] * 4, ["a", "hang", "hang", "hang"])
        assert time.monotonic() - start < 4
        np.testing.assert_array_equal(failed, [False, True, True, True])
        assert score[0] == 1
        time.sleep(0.5)
        assert not pool.score([{"answer": "a"}], ["a"])[2].any()


def test_slow_verifiers_are_spread_over_the_workers(workers):
    with worker.Workers(host(verifiers.slow, ()), 2) as pool:
        pool.score([{}] * 2, [""] * 2)
        start = time.monotonic()
        _, _, failed = pool.score([{}] * 64, [""] * 64)
        assert not failed.any() and time.monotonic() - start < 64 * 0.02 * 0.9


def test_workers_import_no_jax_and_score_on_the_main_thread():
    with worker.Workers(host(verifiers.surroundings, ("main_thread",), 5.0), 1) as pool:
        jax_is_there, parts, failed = pool.score([{}], [""])
    assert not failed[0] and jax_is_there[0] == 0 and parts["main_thread"][0] == 1


def test_math_verify_with_its_own_alarms():
    with worker.Workers(host(verifiers.math_verify_default, (), 20.0), 1) as pool:
        score, _, failed = pool.score([{"answer": "$\\frac{1}{2}$"}] * 2, ["0.5", "0.6"])
    np.testing.assert_array_equal(failed, [False, False])
    np.testing.assert_array_equal(score, [1, 0])


def test_a_verifier_that_is_no_module_is_sent_by_value():
    offset = 2

    with worker.Workers(host(lambda fields, text: {"score": fields["x"] + offset}, ()), 1) as pool:
        assert pool.score([{"x": 3}], [""])[0][0] == 5


def test_a_verifier_that_cannot_be_loaded_is_an_error():
    @dataclasses.dataclass
    class Refuses:
        def __reduce__(self):
            return os.stat, ("/no/such/file",)

        def __call__(self, fields, text):
            return {"score": 0.0}

    with pytest.raises(ValueError, match="cannot be loaded.*No such file"):
        worker.Workers(host(Refuses(), ()), 1)
    lock = threading.Lock()
    with pytest.raises(ValueError, match="cannot be loaded.*pickle"):
        worker.Workers(host(lambda fields, text: {"score": float(lock.locked())}, ()), 1)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"deadline_s": 0.0}])
def test_limits_must_be_positive(wrong):
    with pytest.raises(ValueError, match="positive"):
        worker.Workers(host(), **wrong)


PROGRAM = textwrap.dedent("""
    import sys, time
    import jax  # the main module has it, the workers must not
    sys.path[:0] = {path}
    from tests.reward import verifiers
    from rl_jax.reward import worker
    from rl_jax.tasks import task

    if __name__ != "__main__":
        print("main ran again")
    pool = worker.Workers(task.HostVerifier(verifiers.surroundings, ("main_thread",)), 1)
    print(pool.score([{{}}], [""])[0][0], *(p.pid for p in pool._pool._pool_manager.worker_manager.workers.values()),
          flush=True)
    {then}
""")


def start(folder, then):
    program = folder / "program.py"
    program.write_text(PROGRAM.format(path=[str(pathlib.Path(__file__).parents[2])], then=then))
    process = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    has_jax, worker_id = process.stdout.readline().split()
    assert float(has_jax) == 0
    return process, int(worker_id)


def gone(process_id):
    for _ in range(100):
        try:
            os.kill(process_id, 0)
        except ProcessLookupError:
            return True
        if pathlib.Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True  # Dead; whoever inherited it has not collected it.
        time.sleep(0.05)
    return False


def test_a_program_that_forgets_its_workers_ends_and_leaves_none(tmp_path):
    process, worker_id = start(tmp_path, "")
    assert process.communicate(timeout=20)[0] == "" and process.returncode == 0 and gone(worker_id)


def test_workers_end_with_a_killed_program(tmp_path):
    process, worker_id = start(tmp_path, "time.sleep(60)")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    assert gone(worker_id)
