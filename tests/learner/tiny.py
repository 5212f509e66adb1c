"""The smallest real learner: a one-layer network, a toy task, and the pieces of a step."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rl_jax.learner import step
from rl_jax.models.network import Network
from rl_jax.models.shape import Shape
from rl_jax.recipe import Recipe
from rl_jax.tasks import judge, stream
from rl_jax.tasks.task import HostVerifier, PureVerifier, Task
from rl_jax.types import Prompts


def network(task: Task, **options: Any) -> Network:
    return Network(Shape(**{"vocabulary": task.tokenizer.size, "width": 16, "layers": 1, "heads": 2, "key_heads": 1,
                            "head_size": 8, "inner": 16} | options))


def prompts(task: Task, count: int, first: int = 0, need_answers: bool = False) -> Prompts:
    """Training examples in their order, again from the first after the last."""
    indices = [(first + i) % len(task.splits["train"]) for i in range(count)]
    batch = stream.batch(task, [task.splits["train"][i] for i in indices], indices=indices, need_answers=need_answers)
    return jax.tree.map(jnp.asarray, batch)


def pieces(recipe: Recipe, task: Task, optimiser: optax.GradientTransformation, *, judged: Any = None,
           **options: Any) -> step.Pieces:
    if judged is None and isinstance(task.verifier, PureVerifier):
        judged = judge.pure(task.verifier)
    return step.make_pieces(recipe, task, network(task), optimiser, judged, **options)


def state(recipe: Recipe, task: Task, optimiser: optax.GradientTransformation, seed: int = 0, policy: Any = None):
    return step.initial_state(recipe, network(task), optimiser, jax.random.key(seed), policy)


def recorder() -> optax.GradientTransformation:
    """Learns nothing and keeps the last gradient as its state."""
    def update(gradient, _, parameters):
        return jax.tree.map(jnp.zeros_like, gradient), gradient

    return optax.GradientTransformation(lambda parameters: jax.tree.map(jnp.zeros_like, parameters), update)


def on_host(task: Task, parts: tuple[str, ...] = ()) -> Task:
    """The task with a verifier on the host, which is told each example's text; what it says is up to the workers."""
    splits = {name: [dataclasses.replace(e, fields={"text": e.text}) for e in split]
              for name, split in task.splits.items()}
    return dataclasses.replace(task, verifier=HostVerifier(lambda fields, text: {}, parts), splits=splits)


class InProcess:
    """Scores here instead of in workers, and remembers what it was asked."""

    def __init__(self, score: Any):
        self.score_one, self.calls = score, []

    def score(self, fields, texts):
        self.calls.append(list(texts))
        said = [self.score_one(f, t) for f, t in zip(fields, texts, strict=True)]
        failed = np.array([s is None for s in said])
        return np.array([0.0 if s is None else s for s in said], np.float32), {}, failed


def same(found: Any, expected: Any, **tolerance: float) -> None:
    """Equal to the last bit, or within a tolerance; keys by their data."""
    def plain(a):
        return jax.random.key_data(a) if jnp.issubdtype(jnp.asarray(a).dtype, jax.dtypes.prng_key) else np.asarray(a)

    found, expected = jax.tree.map(plain, (found, expected))
    if tolerance:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)
    else:
        jax.tree.map(np.testing.assert_array_equal, found, expected)
