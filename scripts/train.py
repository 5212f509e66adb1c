"""Trains what a config describes: python scripts/train.py --config=configs/toys/addmod.py --workdir=runs/addmod.

Any field can be changed on the command line (--config.optimiser.learning_rate=1e-4), and a config
that takes a recipe's name is given it after a colon (--config=configs/toys/addmod.py:baselines.rloo).
A workdir that holds a run of the same config is continued.

Many processes run the same command with --distributed; where no cluster says them their places (TPU pods and SLURM do),
each is given --coordinator=HOST:PORT --processes=N --process=I.

With --plan nothing is run, whatever devices there are: it prints bytes and operations per device of config.mesh and, with
--plan_limit_gib=80, which field of the config brings it under 80 GiB.
"""
# workers of a host verifier import this file: heavy imports stay inside the functions
import functools
import os
import pathlib
import sys

from absl import flags, logging
from ml_collections import config_flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a Python file with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept; many processes share it.")
_PLAN = flags.DEFINE_boolean("plan", False, "Print what a run would hold and do on each device of its mesh, and stop.")
_LIMIT = flags.DEFINE_float("plan_limit_gib", 0.0, "GiB per device under which the plan looks for a way; 0: none.")
_DISTRIBUTED = flags.DEFINE_boolean("distributed", False, "Join the other processes of a run.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port at which process 0 answers the others.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are.")
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")
_HEARTBEAT = flags.DEFINE_float("heartbeat_s", 100.0, "Seconds of silence after which a process counts as gone.")


def main(_: list[str]) -> None:
    """Joins the other processes, where there are any, and runs."""
    from rl_jax.train import processes

    logging.set_verbosity(logging.WARNING)
    if _PLAN.value:
        plan()
        return
    workdir = pathlib.Path(_WORKDIR.value)
    try:
        asked = processes.asked(distributed=_DISTRIBUTED.value, coordinator=_COORDINATOR.value,
                                processes=_PROCESSES.value, process=_PROCESS.value, heartbeat_s=_HEARTBEAT.value)
    except ValueError as error:
        sys.exit(f"ValueError: {error}")
    with processes.joined(asked, workdir):
        run(workdir)


def run(workdir: pathlib.Path) -> None:
    """Parses, claims the directory, runs."""
    from rl_jax import experiment, sections
    from rl_jax.train import machine, processes, session

    machine.prepare()
    try:
        parsed, config = experiment.parse(_CONFIG.value), sections.plain(_CONFIG.value)
        processes.agree_on_run(config, workdir, functools.partial(session.claim, workdir, config))
        finished = session.Session(parsed, workdir).go()
    except (ValueError, ImportError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if not processes.first():
        return
    print(f"step {finished.step}{', stopped early' if finished.interrupted else ''}")
    print(f"checkpoint {finished.checkpoint}")
    print(f"report {finished.report}")


def plan() -> None:
    """Parses and prints what a run would need."""
    import rich.console

    from rl_jax import experiment
    from rl_jax.train import planning

    try:
        planning.show(experiment.parse(_CONFIG.value), _LIMIT.value, rich.console.Console())
    except (ValueError, ImportError, FileNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    if any(argument.startswith("--plan") for argument in sys.argv):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # a plan compiles what it never runs; jaxlib reads this once

    from rl_jax.train import command

    flags.register_multi_flags_validator(["workdir", "plan"], lambda given: given["plan"] or given["workdir"] is not None,
                                         "Flag --workdir must have a value other than None.")
    command.start(main, required=("config",))
