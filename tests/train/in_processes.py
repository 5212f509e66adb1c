"""scripts/train.py with fake devices and a host verifier that reads both question and answer.

Run as a process: in_processes.py DEVICES FLAG ...
"""
import dataclasses
import os
import pathlib
import runpy
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    devices = f"--xla_force_host_platform_device_count={sys.argv.pop(1)}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices}"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    sys.path.insert(0, str(ROOT))

    from rl_jax import experiment
    from rl_jax.tasks import task
    from tests.ends import verifiers

    parse = experiment.parse

    def judged(config):
        parsed = parse(config)
        asked = dataclasses.replace(parsed.task, verifier=task.HostVerifier(verifiers.even))
        return dataclasses.replace(parsed, task=asked)

    experiment.parse = judged
    runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
