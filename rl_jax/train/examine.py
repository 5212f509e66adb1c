"""Answers to the problems of a split, scored: what validation and evaluation count."""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from rl_jax.models import mesh as meshes
from rl_jax.models.network import Network
from rl_jax.recipe import Rollout
from rl_jax.rollout import decode
from rl_jax.tasks import judge, stream
from rl_jax.tasks import task as tasks
from rl_jax.types import Parameters, Samples, Verdict


@dataclasses.dataclass(frozen=True)
class Examined:
    """P problems, K answers each.

    Attributes:
      scores: [P, K]; 1 means correct.
      failed: [P, K], where the verifier failed.
      answers: final answers as text, None where there is none.
    """

    scores: np.ndarray
    failed: np.ndarray
    answers: list[list[str | None]]


class Examiner:
    """Draws and scores answers to a split; compiled once, called with any weights."""

    def __init__(self, network: Network, task: tasks.Task, split: str, *, rollout: Rollout,
                 problems_per_batch: int = 64, workers: Any = None, mesh: jax.sharding.Mesh | None = None):
        """Composes the program.

        Args:
          rollout: its group_size is K.
          problems_per_batch: drawn at once.
          workers: where a host verifier runs.
          mesh: the devices that the weights are cut over; None for one.
        """
        if split not in task.splits:
            raise ValueError(f"split={split!r}: task {task.name!r} has {sorted(task.splits)}.")
        self.network = network
        self._task, self._split, self._workers, self._rollout = task, split, workers, rollout
        self._per_batch = min(problems_per_batch, len(task.splits[split]))
        pure = isinstance(task.verifier, tasks.PureVerifier)
        draw = decode.make_rollout(network, rollout, completion_length=task.completion_length,
                                   stop_ids=task.tokenizer.stop_ids, pad_id=task.tokenizer.pad_id)

        def ask(parameters, prompts, key):
            numbers = decode.make_uniforms(key, prompts.lengths.shape[0], rollout.group_size, task.completion_length)
            samples = draw(parameters, prompts, numbers, jnp.zeros((), jnp.int32))
            return samples, judge.pure(task.verifier)(prompts, samples) if pure else None

        # whole: every process reads all answers
        self._ask = jax.jit(ask, out_shardings=None if mesh is None else meshes.whole(mesh))

    def __call__(self, policy: Parameters, key: Key[Array, ""], *, problems: int | None = None,
                 after_batch: Callable[[int, int], None] | None = None) -> Examined:
        """Scores the first problems of the split.

        Args:
          policy: the weights.
          key: consumed.
          problems: how many; None is all of them.
          after_batch: told how many problems are done, and of how many.
        """
        split = self._task.splits[self._split]
        count = len(split) if problems is None else min(problems, len(split))
        scores, failed, answers = [], [], []
        for start in range(0, count, self._per_batch):
            indices = [i % len(split) for i in range(start, start + self._per_batch)]
            prompts = stream.batch(self._task, [split[i] for i in indices], indices=indices)
            samples, verdict = self._ask(policy, prompts, jax.random.fold_in(key, start))
            verdict = self._verdict(prompts, samples, verdict)
            scores.append(np.asarray(verdict.score))
            failed.append(np.asarray(verdict.failed))
            answers += [self._task.final_answer(text) for text in
                        judge.texts_of(self._task.tokenizer, np.asarray(samples.tokens), np.asarray(samples.mask))]
            if after_batch is not None:
                after_batch(min(start + self._per_batch, count), count)
        k = self._rollout.group_size
        return Examined(scores=np.concatenate(scores).reshape(-1, k)[:count],
                        failed=np.concatenate(failed).reshape(-1, k)[:count],
                        answers=[answers[p * k:(p + 1) * k] for p in range(count)])

    def _verdict(self, prompts: Any, samples: Samples, verdict: Verdict | None) -> Verdict:
        if verdict is not None:
            return verdict
        return judge.score_on_host(self._task, self._split, self._workers, *judge.rows_of(prompts, samples))
