"""Prints, as JSON, whether runs that draw ahead equal others: without staleness the synchronous one, on devices of their
own those on one device, stopped and continued the ones that were never stopped.

Run as a process: XLA makes its devices when it starts, and two programs round as one does where it fuses as it does by
default.
"""
import json
import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"

import jax

from rl_jax.train import metrics, session
from tests.ends import tiny

STEPS = 5


def config(program="async", *, mesh=None, **numbers):
    found = tiny.config("toys.addmod", "baselines.grpo", recipe_args={"group_size": 4}, task_args={"modulus": 7},
                        steps=STEPS, program=program, run={"checkpoint_every": STEPS})
    with found.unlocked():
        if program == "async":
            found.asynchronous = numbers
        found.mesh = mesh or {}
    return found


class Run:
    """A run to its end: its metrics without the clock and the age, its answers, its weights, and where they lay."""

    def __init__(self, workdir, config, stop=None):
        self.stopped = None
        if stop is not None:
            with tiny.stopped_after(stop):
                self.stopped, _ = tiny.train(workdir, config)
        finished, _ = tiny.train(workdir, config)
        rows = [metrics.timeless(row) for row in metrics.rows(workdir / "metrics.jsonl")]
        self.ages = [row.pop("rollout/age_steps", None) for row in rows]
        self.rows, self.tokens = rows, (workdir / "rollouts.jsonl").read_bytes()
        state = workdir / "checkpoints" / str(STEPS)
        with session.checkpoint.ocp.StandardCheckpointer() as saved:
            self.state = tiny.bits([saved.restore(state / item) for item in ("parameters", "training")])
        self.devices = sorted({device.id for a in jax.tree.leaves(finished.policy) for device in a.devices()})

    def equals(self, other):
        return {"rows": self.rows == other.rows and self.tokens == other.tokens, "state": self.state == other.state}

    def furthest(self, other):
        """The largest difference of two numbers of the metrics, as a share of them or of 1."""
        pairs = [(row[name], same[name]) for row, same in zip(self.rows, other.rows, strict=True) for name in row
                 if isinstance(row[name], float)]
        return max(abs(a - b) / max(abs(a), abs(b), 1.0) for a, b in pairs)

    def answers(self):
        return [(row["step"], row["completion"]) for row in map(json.loads, self.tokens.splitlines())]


def measured(root):
    one = Run(root / "one", config("one"))
    yield "one", {"has no age": one.ages == [None] * STEPS, "learns": sum(row["gradient/norm"] > 1e-3 for row in one.rows) > 1}
    for order in ("fixed", "eager"):
        yield f"{order} 0", Run(root / order, config(staleness=0, order=order)).equals(one)
    shared = Run(root / "shared", config(staleness=2))
    apart = Run(root / "apart", config(staleness=2, sampler_devices=1))
    yield "1 + 1", {"learner": apart.devices, **apart.equals(shared)}
    four = Run(root / "four", config(staleness=2, sampler_devices=2, mesh={"data": 2}))
    yield "2 + 2", {"learner": four.devices, "tokens": four.answers() == shared.answers(), "furthest": four.furthest(shared)}
    again = Run(root / "again", config(staleness=2, sampler_devices=2, mesh={"data": 2}), stop=2)
    yield "continued fixed", again.stopped.step < STEPS and all(again.equals(four).values())
    eager = config(staleness=2, sampler_devices=2, mesh={"data": 2}, order="eager")
    eager = Run(root / "eager apart", eager, stop=2)
    yield "continued eager", eager.stopped.step < STEPS and all(0 <= age <= 2 for age in eager.ages) and len(eager.ages) == STEPS


if __name__ == "__main__":
    print(json.dumps(dict(measured(pathlib.Path(sys.argv[1])))))
