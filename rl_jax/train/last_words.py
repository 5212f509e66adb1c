"""Says why a process of a run ended where it cannot say so itself: jax aborts those whose coordinator is gone.

Runs beside the process, as a program of its own that imports nothing but the standard library. It reads a pipe that
closes when the process ends, whatever ends it.
"""
import pathlib
import signal
import socket
import subprocess
import sys

BYE = "bye"


class LastWords:
    """The program beside this process."""

    def __init__(self, index: int, count: int, coordinator: str, workdir: pathlib.Path):
        """Starts it.

        Args:
          index: of this process, of `count`.
          coordinator: host:port.
          workdir: where the checkpoints are.
        """
        arguments = [sys.executable, __file__, str(index), str(count), coordinator, str(workdir)]
        self._process = subprocess.Popen(arguments, stdin=subprocess.PIPE, text=True)

    def spare(self) -> None:
        """Nothing has to be said any more."""
        self._process.communicate(BYE)


def ending(workdir: pathlib.Path) -> str:
    """What every message about the end of a run ends with."""
    folder = workdir / "checkpoints"
    steps = [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()] if folder.is_dir() else []
    last = f"the last checkpoint is {folder / str(max(steps))}" if steps else "there is no checkpoint yet"
    return f"This run ends; {last}. Start all processes again to continue."


def said(index: int, count: int, coordinator: str) -> str:
    """Why process `index` is gone.

    Args:
      coordinator: host:port, where process 0 answers as long as it lives.
    """
    host, _, port = coordinator.rpartition(":")
    try:
        if index:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return f"process 0 of {count} is gone (nothing answers at {coordinator}), and with it process {index}."
    return f"process {index} of {count} was ended from outside."


def main() -> None:
    """Waits for the end of the process."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to all; this one outlives them
        signal.signal(number, signal.SIG_IGN)
    index, count, coordinator, workdir = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], pathlib.Path(sys.argv[4])
    if sys.stdin.read() != BYE:
        sys.exit(f"{said(index, count, coordinator)} {ending(workdir)}")


if __name__ == "__main__":
    main()
