"""rl_jax's side of `benchmark.py peers`: a config's training loop, as users run it, a turn at a time.

The work is the config itself. Steps are made by `train.loop.PhaseLoop` with its data pipeline and the config's own
steps_per_call; no metrics, checkpoints or tables are written, as on the other sides.
"""
import dataclasses

import jax
import numpy as np
import turns

from rl_jax import experiment
from rl_jax.models import shape
from rl_jax.models.network import Network
from rl_jax.train import loop, machine

ENDLESS = 10_000_000  # steps: the talk ends the run


def main() -> None:
    """Makes steps as long as they are wanted."""
    machine.keep_memory()  # as scripts/train.py does
    pace = turns.Pace()
    parsed = experiment.parse(pace.work)
    phase = dataclasses.replace(parsed.phases[-1], scale=dataclasses.replace(parsed.phases[-1].scale, steps=ENDLESS))
    one = loop.PhaseLoop(phase, parsed.task, Network(parsed.shape), shown_groups=1)
    state = one.initial_state(jax.random.key(parsed.run.seed))
    wanted = pace.built(shape.parameter_count(state.parameters["policy"]), some(state.parameters["policy"]))
    answers = phase.scale.prompts_per_step * phase.recipe.group_size
    ticks = one.ticks(state, one.stream(parsed.run.seed))
    del state  # donated to the first step
    while wanted:
        tick = next(ticks)
        metrics = jax.device_get(jax.block_until_ready((tick.state, tick.metrics))[1])
        lengths, policy = np.atleast_1d(metrics["rollout/length"]), tick.state.parameters["policy"]
        wanted = pace.made(round(float(lengths.sum()) * answers), np.atleast_1d(metrics["reward/mean"]),
                           lambda policy=policy: some(policy))


def some(policy: dict) -> list[float]:
    """A few numbers of each of the trained arrays' first and last."""
    leaves = jax.tree.leaves(policy)
    return [float(number) for leaf in (leaves[0], leaves[-1]) for number in np.asarray(leaf.ravel()[:8])]


if __name__ == "__main__":
    main()
