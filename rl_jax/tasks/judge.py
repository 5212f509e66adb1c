"""The verifier as the step calls it: in the program where it is pure, through one callback where it is not."""
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array

from rl_jax.tasks import task as tasks
from rl_jax.types import Prompts, Samples, Verdict


@runtime_checkable
class Scorer(Protocol):
    """Worker processes that score texts; `reward.worker.Workers` is one."""

    def score(self, fields: Sequence[Any], texts: Sequence[str]) -> tuple[Any, dict[str, Any], Any]:
        """Scores, parts by name, and which answers could not be scored; never raises."""


def make_judge(task: tasks.Task, split: str, *, workers: Scorer | None = None,
               mesh: jax.sharding.Mesh | None = None) -> Callable[[Prompts, Samples], Verdict]:
    """Returns judge(prompts, samples) -> Verdict, to be called inside the compiled step.

    A host verifier is reached through one callback per device, each with the device's own rows:
    the call sits inside `shard_map`. Nothing is ever raised through it.

    Args:
      split: which of the task's splits the prompts' example ids count in.
      workers: where a host verifier runs; not read for a pure one.
      mesh: the devices that the batch is sharded over; None for one.
    """
    if isinstance(task.verifier, tasks.PureVerifier):
        return pure(task.verifier)
    if workers is None:
        raise ValueError(f"task {task.name!r} has a host verifier: make_judge needs `workers` "
                         "(reward.worker.Workers) to run it in.")
    parts = task.verifier.parts

    def on_host(example, tokens, mask):
        verdict = score_on_host(task, split, workers, example, tokens, mask)
        return verdict.score, tuple(verdict.parts[name] for name in parts), verdict.failed

    def call(example, tokens, mask):
        rows = tokens.shape[:1]
        number = jax.ShapeDtypeStruct(rows, jnp.float32)
        shapes = (number, tuple(number for _ in parts), jax.ShapeDtypeStruct(rows, jnp.bool_))
        return io_callback(on_host, shapes, example, tokens, mask)

    if mesh is not None:
        rows = jax.sharding.PartitionSpec(mesh.axis_names)
        call = jax.shard_map(call, mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows, check_vma=False)

    def judge(prompts: Prompts, samples: Samples) -> Verdict:
        group = samples.finished.shape[0] // prompts.lengths.shape[0]
        score, values, failed = call(jnp.repeat(prompts.example, group), samples.tokens, samples.mask)
        return Verdict(score=score, parts=dict(zip(parts, values, strict=True)), failed=failed)

    return judge


def pure(verifier: tasks.PureVerifier) -> Callable[[Prompts, Samples], Verdict]:
    """The judge of a pure verifier; a score that is not finite is a failure."""
    def judge(prompts: Prompts, samples: Samples) -> Verdict:
        group = samples.finished.shape[0] // prompts.lengths.shape[0]
        facts = jax.tree.map(lambda a: jnp.repeat(a, group, axis=0), prompts.facts)
        score, parts = verifier.score(facts, samples.tokens, samples.mask)
        return Verdict(score=score, parts=parts, failed=~jnp.isfinite(score))

    return judge


def score_on_host(task: tasks.Task, split: str, workers: Scorer, example: Array | np.ndarray,
                  tokens: Array | np.ndarray, mask: Array | np.ndarray) -> Verdict:
    """A host verifier's verdict on answers, as NumPy arrays; total: whatever goes wrong is a counted failure.

    Args:
      example: [N], the example each row answers.
      tokens, mask: [N, T], what was drawn.
    """
    rows, names = len(tokens), task.verifier.parts
    try:
        texts = texts_of(task.tokenizer, np.asarray(tokens), np.asarray(mask))
        fields = [task.splits[split][int(i)].fields for i in np.asarray(example)]
        score, parts, failed = workers.score(fields, texts)
        numbers = np.asarray([score, *(parts[name] for name in names)], np.float32).reshape(len(names) + 1, rows)
        failed = np.asarray(failed, bool).reshape(rows) | ~np.isfinite(numbers).all(axis=0)
    except Exception:  # raising through XLA would delete the donated state
        logging.getLogger(__name__).exception("scoring a batch of %d answers failed; all count as failures", rows)
        numbers, failed = np.zeros((len(names) + 1, rows), np.float32), np.ones(rows, bool)
    score, *parts = np.where(failed, 0, numbers)
    return Verdict(score=score, parts=dict(zip(names, parts, strict=True)), failed=failed)


def rows_of(prompts: Prompts, samples: Samples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per sequence, in host memory: the example it answers, its tokens, its mask. Waits for the samples."""
    tokens, mask = np.asarray(samples.tokens), np.asarray(samples.mask)
    example = np.asarray(prompts.example)
    return np.repeat(example, len(tokens) // len(example)), tokens, mask


def drawn_mask(tokens: np.ndarray, stop_ids: tuple[int, ...]) -> np.ndarray:
    """[N, T], True up to and including each row's first stop token."""
    stop = np.isin(tokens, stop_ids)
    return np.cumsum(stop, axis=1) - stop == 0


def texts_of(tokenizer: tasks.Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """The chosen tokens of each row as text, without stop tokens."""
    return [tokenizer.decode([int(t) for t in row[keep] if t not in tokenizer.stop_ids])
            for row, keep in zip(tokens, mask, strict=True)]
