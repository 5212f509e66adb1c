"""What the processes of a run hear of each other; one that finds another gone ends, with a message.

They talk through the store of jax's coordination service, which process 0 keeps.
"""
import contextlib
import os
import pathlib
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jax._src import distributed  # its client has no public name

from rl_jax.train import last_words

BEATS = 10  # in the time after which a silent process counts as gone
LONGEST_BEAT_S = 2.0
DONE = "done"


@runtime_checkable
class Store(Protocol):
    """What is used of jax's client."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Writes."""

    def key_value_dir_get(self, key: str) -> Sequence[tuple[str, str]]:
        """The keys under one, and their values."""


def store() -> Any:
    """The store that all processes share; None in a process of its own."""
    return distributed.global_state.client


def said_by(error: BaseException) -> str:
    """An error in one line, as the script prints it."""
    if isinstance(error, SystemExit):
        return str(error.code)
    return f"{type(error).__name__}: {error}"


def tell(text: str) -> None:
    """Lets the others know that this process has ended, and why."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody is left to hear it
        store().key_value_set(f"rl_jax/ended/{jax.process_index()}", text, allow_overwrite=True)


class Peers:
    """What this process hears of the others."""

    def __init__(self, store: Store, index: int, count: int):
        """Nothing yet.

        Args:
          index: of this process, of `count`.
        """
        self._store, self._index, self._count = store, index, count
        self._beat, self._beats = 0, {}
        self._silent_s = {other: 0.0 for other in range(count) if other != index}
        self._ended: dict[int, str] = {}
        self._unreached_s = 0.0

    def exchange(self, seconds: int | float) -> None:
        """Says that this process lives and asks who else does; waits for the store, however long that takes.

        Args:
          seconds: since the exchange before.
        """
        self._beat += 1
        self._store.key_value_set(f"rl_jax/beat/{self._index}", str(self._beat), allow_overwrite=True)
        beats, ended = (_by_process(self._store.key_value_dir_get(f"rl_jax/{name}")) for name in ("beat", "ended"))
        for other in self._silent_s:
            heard = beats.get(other) != self._beats.get(other)
            self._silent_s[other] = 0.0 if heard else self._silent_s[other] + seconds
        self._beats, self._ended, self._unreached_s = beats, ended, 0.0

    def waited(self, seconds: int | float) -> None:
        """So much time has passed without an exchange, or beside it."""
        self._unreached_s += seconds

    def gone(self, patience_s: int | float) -> str | None:
        """Which process is gone, and how that is known; None while all live or have ended in order.

        Args:
          patience_s: how long a process may be silent.
        """
        if self._unreached_s > patience_s:
            return f"process 0 of {self._count} is gone (its store has not answered for {self._unreached_s:.0f} s)."
        for other, silent_s in self._silent_s.items():
            ended = self._ended.get(other)
            if ended not in (None, DONE) and self._index not in self._ended:  # where all fail, each says why itself
                return f"process {other} of {self._count} has ended: {ended}"
            if ended != DONE and silent_s > patience_s:
                return f"process {other} of {self._count} is gone (no heartbeat for {silent_s:.0f} s)."
        return None


class Watch:
    """Ends this process with a message when another is gone: the main thread may be waiting for that one for ever."""

    def __init__(self, workdir: pathlib.Path, patience_s: int | float):
        """Starts watching.

        Args:
          patience_s: how long a process may be silent.
        """
        self._workdir, self._patience_s = workdir, patience_s
        self._every_s = min(patience_s / BEATS, LONGEST_BEAT_S)
        index, count = jax.process_index(), jax.process_count()
        self._peers = Peers(store(), index, count)
        self._words = last_words.LastWords(index, count, distributed.global_state.coordinator_address, workdir)
        self._left = threading.Event()
        for work in (self._beat, self._judge):
            threading.Thread(target=work, daemon=True).start()

    def leave(self) -> None:
        """Waits until all have come to their end, and leaves together with them."""
        tell(DONE)
        self._left.set()
        jax.distributed.shutdown()
        self._words.spare()

    def fail(self, error: BaseException) -> None:
        """Ends this process with an error, and the others with it."""
        if isinstance(error, jax.errors.JaxRuntimeError):  # what the loss of another looks like: it will be found out
            time.sleep(self._patience_s + 5 * self._every_s)
        self._left.set()
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        self._end(said_by(error))

    def _beat(self) -> None:
        while not self._left.is_set():
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the store does not answer: `_judge` counts
                self._peers.exchange(self._every_s)
            self._left.wait(self._every_s)

    def _judge(self) -> None:
        reason = None
        while not self._left.wait(self._every_s):
            self._peers.waited(self._every_s)
            before, reason = reason, self._peers.gone(self._patience_s)
            if before and reason:  # not at once: this process may be about to fail like the other
                self._end(f"{reason.rstrip('.')}. {last_words.ending(self._workdir)}")

    def _end(self, text: str) -> None:
        """Status 1 at once: an orderly end would wait for those that are gone."""
        print(f"process {jax.process_index()}: {text}", file=sys.stderr)
        threading.Thread(target=tell, args=(text,), daemon=True).start()
        # process 0 keeps the store that the others read it in
        time.sleep((4 if jax.process_index() == 0 else 1) * self._every_s)
        self._words.spare()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _by_process(found: Sequence[tuple[str, str]]) -> dict[int, str]:
    return {int(key.rpartition("/")[2]): value for key, value in found}
