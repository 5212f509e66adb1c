"""Host verifiers in worker processes: every answer gets a score or is counted as failed.

The workers import no jax, run verifiers on their main thread, and are killed and replaced when
a verifier does not return.
"""
import collections
import concurrent.futures
import concurrent.futures.process
import functools
import math
import multiprocessing.context
import numbers
import pickle
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import cloudpickle
import numpy as np
import pebble
from absl import logging
from jaxtyping import Bool, Float

# A worker hands back what it has after SLICE_S, so slow verifiers are spread over the workers;
# GRACE_S beyond the time limit passes before a worker that cannot be interrupted is killed.
SLICE_S = 0.1
GRACE_S = 1.0
LARGEST_CHUNK = 64
CHUNKS_PER_WORKER = 4

Answer = tuple[int, Mapping[str, Any], str]
Chunk = list[Answer]
Scores = Callable[[Mapping[str, Any], str], Mapping[str, float]]


@runtime_checkable
class Verifier(Protocol):
    """What is needed of `tasks.task.HostVerifier`."""

    score: Scores
    parts: tuple[str, ...]
    time_limit_s: float


class _TimeLimit(BaseException):
    """Not an Exception: a verifier's own `except Exception` lets it through."""


class _Process(multiprocessing.context.SpawnProcess):
    """A fresh interpreter that does not run the program's main module again, and with it jax.

    Ending it is killing it: a verifier may ignore what is politer.
    """

    terminate = multiprocessing.context.SpawnProcess.kill

    @staticmethod
    def _Popen(process):
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            return multiprocessing.context.SpawnProcess._Popen(process)
        finally:
            sys.modules["__main__"] = main


class _Context(multiprocessing.context.SpawnContext):
    Process = _Process


class Workers:
    """A pool of processes that score answers with one verifier; its faults never raise here."""

    def __init__(self, verifier: Verifier, count: int = 2, *, deadline_s: float = 120.0):
        """Starts the processes and waits until one of them has loaded the verifier.

        Args:
          verifier: what scores an answer.
          count: processes.
          deadline_s: seconds that one call of `score` may take; what is missing then has failed.

        Raises:
          ValueError: if the verifier cannot be loaded in a worker.
        """
        if count < 1 or deadline_s <= 0 or verifier.time_limit_s <= 0:
            raise ValueError(f"count={count}, deadline_s={deadline_s}, time_limit_s={verifier.time_limit_s}: there "
                             "must be at least one worker, and the limits must be positive.")
        self._count, self._deadline_s, self._limit_s = count, deadline_s, verifier.time_limit_s
        self._names = ("score", *verifier.parts)
        self._lock, self._pool = threading.Lock(), None
        self._closed = False
        try:
            self._verifier = cloudpickle.dumps(verifier.score)
            self._pool = self._start()
            self._schedule([], timeout_s=deadline_s).result()
        except Exception as error:
            self.close()
            raise ValueError(f"the verifier cannot be loaded in a worker process: {error!r}. It must be picklable, and "
                             "what it refers to importable there.") from error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Kills the workers; nothing can be scored any more."""
        self._closed = True
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()

    def score(
        self, fields: Sequence[Mapping[str, Any]], texts: Sequence[str]
    ) -> tuple[Float[np.ndarray, " N"], dict[str, Float[np.ndarray, " N"]], Bool[np.ndarray, " N"]]:
        """(score, parts by name, failed) of N answers.

        An answer whose verifier raises, exits, exceeds its time limit or gives anything but finite
        numbers has failed; its score and parts are 0 and mean nothing.

        Args:
          fields: what the verifier is told about each question.
          texts: the completions.
        """
        if self._closed:
            raise ValueError("the workers are closed: start new ones.")
        answers = [(i, f, t) for i, (f, t) in enumerate(zip(fields, texts, strict=True))]
        rows = np.full((len(answers), len(self._names)), np.nan, np.float32)
        reasons = self._fill(rows, answers)
        failed = np.isnan(rows).any(axis=1)
        if failed.any():
            logging.log_every_n_seconds(logging.WARNING, "%d of %d answers failed in the verifier: %s", 60,
                                        failed.sum(), len(failed), reasons.most_common(3))
        score, *parts = np.where(failed[:, None], 0, rows).T.copy()
        return score, dict(zip(self._names[1:], parts, strict=True)), failed

    def _fill(self, rows: Float[np.ndarray, "N M"], answers: Chunk) -> collections.Counter:
        """Writes the row of each answer that has one; says why the others have none."""
        size = max(1, min(LARGEST_CHUNK, math.ceil(len(answers) / (CHUNKS_PER_WORKER * self._count))))
        waiting = collections.deque(answers[i : i + size] for i in range(0, len(answers), size))
        running: dict[concurrent.futures.Future, Chunk] = {}
        reasons = collections.Counter()
        until = time.monotonic() + self._deadline_s
        while (waiting or running) and time.monotonic() < until:
            while waiting and len(running) < CHUNKS_PER_WORKER * self._count:
                chunk = waiting.popleft()
                running[self._schedule(chunk, timeout_s=SLICE_S + self._limit_s + GRACE_S)] = chunk
            done, _ = concurrent.futures.wait(
                running, max(0, until - time.monotonic()), concurrent.futures.FIRST_COMPLETED)
            for future in done:
                waiting.extend(_take(future, running.pop(future), rows, reasons))
        for future in running:
            future.cancel()
        late = sum(map(len, (*waiting, *running.values())))
        return reasons + collections.Counter({f"not reached in {self._deadline_s} s": late})

    def _schedule(self, chunk: Chunk, timeout_s: float) -> concurrent.futures.Future:
        """Gives the chunk to a worker; a pool that broke is replaced by a new one."""
        arguments = (self._verifier, self._names, self._limit_s, chunk)
        with self._lock:
            try:
                if not self._pool.active:
                    self._pool.stop()
                    self._pool.join()
                    self._pool = self._start()
                return self._pool.schedule(_score, args=arguments, timeout=timeout_s)
            except RuntimeError as error:  # It broke just now.
                time.sleep(0.05)
                broken = concurrent.futures.Future()
                broken.set_exception(concurrent.futures.process.BrokenProcessPool(str(error)))
                return broken

    def _start(self) -> pebble.ProcessPool:
        return pebble.ProcessPool(self._count, initializer=_prepare, initargs=(self._verifier,), context=_Context())


def _take(
    future: concurrent.futures.Future, chunk: Chunk, rows: Float[np.ndarray, "N M"], reasons: collections.Counter
) -> list[Chunk]:
    """Writes what a worker returned; gives the chunks that must be run again.

    When a worker died with a chunk its answers are run again one by one: only the guilty one fails.
    """
    try:
        results = future.result()
    except concurrent.futures.process.BrokenProcessPool:
        return [chunk]
    except Exception as error:
        if len(chunk) > 1:
            return [[answer] for answer in chunk]
        reasons[f"{type(error).__name__}: the worker was lost"] += 1
        return []
    for (i, _, _), (row, reason) in zip(chunk, results, strict=False):
        if row is None:
            reasons[reason] += 1
        else:
            rows[i] = row
    return [chunk[len(results) :]] if len(results) < len(chunk) else []


# What follows runs in the workers.


@functools.lru_cache(maxsize=1)
def _load(verifier: bytes) -> Scores:
    return pickle.loads(verifier)


def _prepare(verifier: bytes) -> None:
    """Loads the verifier before the clock of any answer runs."""
    try:
        _load(verifier)
    except Exception:
        pass  # The constructor of `Workers` asks again, and is told why.


def _score(
    verifier: bytes, names: tuple[str, ...], limit_s: float, chunk: Chunk
) -> list[tuple[list[float] | None, str]]:
    """(row, reason for having none) of the first answers of the chunk, as many as SLICE_S lets begin."""
    score, results, start = _load(verifier), [], time.monotonic()
    for _, fields, text in chunk:
        try:
            results.append((_row(score, names, limit_s, fields, text), ""))
        except BaseException as error:
            results.append((None, f"{type(error).__name__}: {error}"[:200]))
        if time.monotonic() - start > SLICE_S:
            break
    return results


def _row(score: Scores, names: tuple[str, ...], limit_s: float, fields: Mapping[str, Any], text: str) -> list[float]:
    def expire(*_):
        raise _TimeLimit(f"more than {limit_s} s")

    signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        said = score(fields, text)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    row = [said[name] for name in names]
    if not all(isinstance(value, numbers.Real | np.bool_) and abs(value) <= np.finfo(np.float32).max for value in row):
        raise ValueError(f"the verifier gave {said!r}, not finite numbers for {names}")
    return [float(value) for value in row]
