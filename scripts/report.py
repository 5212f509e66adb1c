"""Writes a run's HTML report and prints its path: python scripts/report.py --workdir=runs/a"""
import pathlib
import sys

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from rl_jax.train import report  # noqa: E402  (found beside this folder)

WORKDIR = flags.DEFINE_string("workdir", None, "directory of a run that has started", required=True)


def main(argv: list[str]):
    """Reads the flags, writes the report, prints its path."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected {argv[1:]}: the only argument is --workdir.")
    try:
        print(report.write(WORKDIR.value))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"No report: {error}")


if __name__ == "__main__":
    app.run(main)
