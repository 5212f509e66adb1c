"""Both ends of the talk between a benchmark and its sides: processes that make training steps only when it is their turn.

A line of JSON each way. The benchmark begins with the work; the side answers with what it has built. Then the benchmark says
how many steps it wants, and with how many threads, and the side makes at least as many and says what they were. No more
input is the end.
"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

MIB = 2**20


class Pace:
    """A side's end: what its loop calls between two steps. Whatever else prints, prints to standard error.

    Attributes:
      work: what the benchmark wants built.
      threads: that the next step is to be made with; one of those named in `built`.
    """

    def __init__(self):
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.work = json.loads(sys.stdin.readline())
        self._began = time.perf_counter()
        self.threads, self._asked, self._made = 0, 0, {"steps": 0, "tokens": 0, "rewards": []}

    def built(self, parameters: int, weights: Sequence[float], threads: Sequence[int] = (0,)) -> bool:
        """Says that the first step can begin, and waits until it is asked for.

        Args:
          parameters: numbers that are trained.
          weights: some of them.
          threads: numbers of threads that may be asked for; (0,) where that is not for the side to choose.

        Returns:
          Whether a step is wanted.
        """
        return self._say({"parameters": parameters, "weights": list(weights), "threads": list(threads),
                          "seconds": self._since()})

    def made(self, tokens: int, rewards: Sequence[float], weights: Callable[[], Sequence[float]]) -> bool:
        """Counts what was done since the last call; when all that was asked for is done, says so and waits.

        Args:
          tokens: that were generated.
          rewards: the mean reward of each step.
          weights: the same ones as in `built`, as they are now.

        Returns:
          Whether another step is wanted.
        """
        self._made["steps"] += len(rewards)
        self._made["tokens"] += int(tokens)
        self._made["rewards"] += [float(reward) for reward in rewards]
        if self._made["steps"] < self._asked:
            return True
        seconds = self._since()
        return self._say({**self._made, "seconds": seconds, "weights": list(weights()), "peak_bytes": _peak_bytes()})

    def _say(self, answer: dict[str, Any]) -> bool:
        self._answers.write(json.dumps(answer) + "\n")
        self._asked, self.threads = json.loads(sys.stdin.readline() or "[0, 0]")
        self._made = {"steps": 0, "tokens": 0, "rewards": []}
        self._began = time.perf_counter()
        return self._asked > 0

    def _since(self) -> float:
        return time.perf_counter() - self._began


def _peak_bytes() -> int:
    """Bytes of memory that this process has held at most. getrusage would count those of the process that started it."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


class Side:
    """The benchmark's end: a process that builds the work and then waits for its turns. A context manager ends it."""

    def __init__(self, name: str, command: Sequence[str], work: Any, environment: dict[str, str]):
        """Starts the process and waits until it has built the work.

        Args:
          name: for messages.
          command: of the process.
          work: what it builds, as JSON holds it.
          environment: variables beside those of this process; an empty value takes one away.
        """
        self.name, self._log = name, tempfile.TemporaryFile("w+")
        variables = {key: value for key, value in {**os.environ, **environment}.items() if value}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
                                         env=variables)
        try:
            self.built = self._ask(work)
        except BaseException:
            self.__exit__()
            raise

    def turn(self, steps: int, threads: int = 0) -> dict[str, Any]:
        """What the side says of its next steps.

        Args:
          steps: at least so many are made; a side that makes several per dispatch may make more.
          threads: one of `built["threads"]`.

        Raises:
          RuntimeError: with the last lines that the process wrote, if it ended.
        """
        return self._ask([steps, threads])

    def _ask(self, question: Any) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        self._log.seek(0)
        last = "".join(self._log.readlines()[-30:])
        raise RuntimeError(f"the process of {self.name} ended with status {self._process.wait(timeout=60)}:\n{last}")

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: Any) -> None:
        """No side has anything to save: it is not asked to finish in peace."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            pipe.close()
