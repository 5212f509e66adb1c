"""Prints, as JSON, how far runs on meshes of fake devices are from the same run on one.

Run as a process, as XLA makes its devices when it starts: meshes_on_devices RECIPE STEPS JSON-OPTIONS MESH ...
with MESH such as data=2,tensor=4. Options: "scale", "model" and "task_args" of the config, and "batching" of
the meshes'; on one device rows are whole.
"""
import inspect
import json
import os
import pathlib
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # what the partitioner has to say of toy shapes

import jax
import numpy as np

from rl_jax import sections
from rl_jax.train import metrics
from tests.ends import tiny

MODEL = {"width": 16, "layers": 2, "heads": 8, "key_heads": 8, "head_size": 4, "inner": 32, "tied": False}
PROMPTS, SAME_TOKENS = 8, 5
COMPARED = ("loss/total", "gradient/norm", "reward/mean", "policy/entropy", "policy/kl_reference")


def run(recipe, steps, mesh, options):
    """(metrics by step, what was drawn by step, weights) of one run."""
    config = tiny.config(
        options.get("task", "toys.token_tree"), recipe, recipe_args=groups(recipe), task_args=options.get("task_args", {"depth": 2, "branching": 5}),
        steps=steps, prompts_per_step=PROMPTS, mesh=mesh, model={**MODEL, **options.get("model", {})},
        batching=options.get("batching", {}) if mesh else {}, optimiser={"epsilon": 1e-3}, run={"checkpoint_every": steps, "shown_groups": PROMPTS}, **options.get("scale", {}))
    with tempfile.TemporaryDirectory() as folder:
        finished, _ = tiny.train(pathlib.Path(folder), config)
        rows = list(metrics.rows(pathlib.Path(folder) / "metrics.jsonl"))
        path = pathlib.Path(folder) / "rollouts.jsonl"
        drawn = [line for line in path.read_text().splitlines()] if path.exists() else []
    return rows, drawn, finished.policy


def groups(recipe):
    """More answers to a prompt than usual, so that few groups agree."""
    has = inspect.signature(sections.find("recipe", "rl_jax.recipes", recipe)).parameters
    return {"group_size": 8} if "group_size" in has else {}


def texts(drawn):
    """What was drawn in the first steps: everything of it but numbers that round."""
    found = [json.loads(line) for line in drawn]
    return [json.dumps([row.get("prompt"), [answer["text"] for answer in row["answers"]]]) if "answers" in row else
            json.dumps({name: value for name, value in row.items() if isinstance(value, (str, int))})
            for row in found if row["step"] <= SAME_TOKENS]


def apart(found, expected):
    """The largest differences of two runs, as shares of the largest number of its kind; of a loss, whose terms may cancel,
    as a share of the largest gradient, if that is larger."""
    numbers, gradient = {}, max(row["gradient/norm"] for row in expected[0])
    for name in COMPARED:
        pairs = [(one[name], other[name]) for one, other in zip(found[0], expected[0], strict=True) if name in other]
        largest = max((abs(b) for _, b in pairs), default=0.0)
        scale = max(largest, gradient) if name in ("loss/total", "policy/kl_reference") else largest
        numbers |= {name: max(abs(a - b) for a, b in pairs) / scale} if pairs and scale else {}
    leaves = zip(jax.tree.leaves(found[2]), jax.tree.leaves(expected[2]), strict=True)
    numbers["weights"] = max(float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()) for a, b in leaves)
    return numbers


def sizes(text):
    return {name: int(count) for name, count in (part.split("=") for part in text.split(","))}


def main(recipe, steps, options, *meshes):
    options = json.loads(options)
    alone = run(recipe, int(steps), {}, options)
    found = {}
    for text in meshes:
        one = run(recipe, int(steps), sizes(text), options)
        cut = [a for a in jax.tree.leaves(one[2]) if a.sharding.shard_shape(a.shape) != a.shape]
        found[text] = {"apart": apart(one, alone), "same": texts(one[1]) == texts(alone[1]), "cut": len(cut),
                       "devices": len(jax.tree.leaves(one[2])[0].sharding.device_set),
                       "positions": one[0][-1].get("batch/positions", 1.0)}
    print(json.dumps({"gradient": max(row["gradient/norm"] for row in alone[0]), "drawn": len(texts(alone[1])), "meshes": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
