"""Trains what a config describes: python scripts/train.py --config=configs/toys/addmod.py --workdir=runs/addmod.

Any field can be changed on the command line (--config.optimiser.learning_rate=1e-4), and a config
that takes a recipe's name is given it after a colon (--config=configs/toys/addmod.py:baselines.rloo).
A workdir that holds a run of the same config is continued.
"""
# workers of a host verifier import this file: heavy imports stay inside the functions
import pathlib
import sys

from absl import flags, logging
from ml_collections import config_flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a Python file with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept.")


def main(_: list[str]) -> None:
    """Parses, claims the directory, runs."""
    from rl_jax import experiment, sections
    from rl_jax.train import session

    logging.set_verbosity(logging.WARNING)
    workdir = pathlib.Path(_WORKDIR.value)
    try:
        parsed = experiment.parse(_CONFIG.value)
        session.claim(workdir, sections.plain(_CONFIG.value))
        finished = session.Session(parsed, workdir).go()
    except (ValueError, ImportError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"step {finished.step}{', stopped early' if finished.interrupted else ''}")
    print(f"checkpoint {finished.checkpoint}")
    print(f"report {finished.report}")


if __name__ == "__main__":
    from rl_jax.train import command

    command.start(main)
