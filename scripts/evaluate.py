"""Counts how much of a held-out split a trained policy solves.

python scripts/evaluate.py --workdir=runs/a --samples=8 --ks=1,8 prints pass@k (unbiased), avg@k and
maj@k with standard errors over problems, and keeps them in the run's report.
"""
# workers of a host verifier import this file: heavy imports stay inside the functions
import pathlib
import sys

from absl import app, flags, logging

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
_WORKDIR = flags.DEFINE_string("workdir", None, "The run to evaluate.", required=True)
_CHECKPOINT = flags.DEFINE_list("checkpoint", ["best"],
                                "best (by validation), latest, a step, or a phase's name for its end; several are "
                                "compared, and the last one named is kept in the report.")
_SPLIT = flags.DEFINE_string("split", "held_out", "Which problems.")
_PROBLEMS = flags.DEFINE_integer("problems", 512, "How many problems; 0 is all.", lower_bound=0)
_SAMPLES = flags.DEFINE_integer("samples", 8, "Answers per problem.", lower_bound=1)
_KS = flags.DEFINE_list("ks", ["1"], "The k of pass@k, each at most --samples.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 is greedy.", lower_bound=0)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Nucleus of the sampling distribution.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0)


def main(_: list[str]) -> None:
    """Loads, draws, scores, prints, keeps."""
    logging.set_verbosity(logging.WARNING)
    try:
        evaluate(pathlib.Path(_WORKDIR.value))
    except (ValueError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def evaluate(workdir: pathlib.Path) -> None:
    """The evaluation of one run's policy."""
    import jax
    import rich.console
    import rich.progress

    from rl_jax.recipe import Rollout
    from rl_jax.train import evaluation, examine, machine, report, session, trained

    machine.prepare()
    if not all(k.isdigit() and 1 <= int(k) <= _SAMPLES.value for k in _KS.value):
        raise ValueError(f"--ks={','.join(_KS.value)}: numbers from 1 to --samples={_SAMPLES.value} are allowed.")
    found = [trained.load(workdir, which) for which in _CHECKPOINT.value]
    task = found[0].experiment.task
    rollout = Rollout(group_size=_SAMPLES.value, temperature=_TEMPERATURE.value, top_p=_TOP_P.value)
    with session.host_workers(task, found[0].experiment.run.workers) as workers:
        examiner = examine.Examiner(found[0].network, task, _SPLIT.value, rollout=rollout, workers=workers)
        results = {}
        for which, one in zip(_CHECKPOINT.value, found, strict=True):
            with rich.progress.Progress(transient=True) as bar:
                shown = bar.add_task("evaluating", total=None)
                result = examiner(one.policy, jax.random.key(_SEED.value), problems=_PROBLEMS.value or None,
                                  after_batch=lambda done, total: bar.update(shown, completed=done, total=total))
            results[f"{which} (step {one.step})"] = estimates = evaluation.summary(
                result.scores, result.failed, result.answers, [int(k) for k in _KS.value])
    console = rich.console.Console(width=None if sys.stdout.isatty() else 100)
    console.print(evaluation.table(results, f"{task.name}, {_SPLIT.value}, temperature {_TEMPERATURE.value:g}"))
    evaluation.write(workdir, estimates)
    print(f"checkpoint {workdir / 'checkpoints' / str(one.step)}")
    print(f"report {report.write(workdir)}")


if __name__ == "__main__":
    app.run(main)
