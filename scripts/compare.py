"""Trains several recipes under equal budgets and draws them beside each other:
python scripts/compare.py --config=configs/compare/addmod.py:baselines.grpo,baselines.rloo --workdir=runs/compare

Every recipe gets the same task, weights, prompts, keys and number of drawn answers. Any field can be
changed on the command line (--config.recipes.grpo.args.clip=0.3, --config.scale.seeds=8). In a workdir
that holds a comparison of the same config, finished recipes are kept and others are added.
"""
# workers of a host verifier import this file: heavy imports stay inside the functions
import pathlib
import sys

from absl import flags, logging
from ml_collections import config_flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
_CONFIG = config_flags.DEFINE_config_file("config", None, "The comparison, a Python file with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where curves, figure and table are kept.")


def main(_: list[str]) -> None:
    """Parses, claims the directory, runs what is missing, draws."""
    import rich.console

    from rl_jax import comparison, sections
    from rl_jax.train import compare, compare_page, curves, machine

    logging.set_verbosity(logging.WARNING)
    machine.prepare()
    workdir = pathlib.Path(_WORKDIR.value)
    console = rich.console.Console(width=None if sys.stdout.isatty() else 120)
    try:
        parsed = comparison.parse(_CONFIG.value)
        compare.claim(workdir, sections.plain(_CONFIG.value))
        found = compare.run(parsed, workdir, console=console)
    except (ValueError, ImportError, FileNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on with the recipes that are not finished")
    console.print(compare_page.printed(curves.table(found, parsed.reference), parsed.reference))
    for note in (compare_page.legend(found, parsed.reference), *curves.skips(found)):
        console.print(note, highlight=False)
    page = compare_page.write(workdir, parsed, found)
    print(f"figure {page.with_suffix('.png')}")
    print(f"report {page}")


if __name__ == "__main__":
    from rl_jax.train import command

    command.start(main)
