"""How a script that takes a config starts: a misnamed override is answered with the names that there are."""
import argparse
import runpy
import sys
from collections.abc import Callable, Sequence

from absl import app, flags


def start(main: Callable[[list[str]], None], required: Sequence[str] = ("config", "workdir")) -> None:
    """Hands over to absl; an override that names no field of the config is answered with those that there are.

    Args:
      main: is given what is left of the command line.
      required: flags that must be given.
    """
    flags.mark_flags_as_required(required)
    try:
        app.run(main)
    except (AttributeError, LookupError, TypeError):  # what ml_collections answers such an override with
        from rl_jax import sections  # heavy, and a host verifier's workers import the script

        arguments = argparse.ArgumentParser(allow_abbrev=False)
        arguments.add_argument("--config", "-config")
        path, _, given = arguments.parse_known_args()[0].config.partition(":")
        config = runpy.run_path(path)["get_config"](*([given] if given else []))
        wrong = sections.misnamed(config, sys.argv[1:])
        if wrong is None:
            raise
        sys.exit(f"ValueError: {wrong}")
    except ValueError as error:  # the config file's own
        sys.exit(f"ValueError: {error}")
