"""Prompts in a deterministic order that can be continued: shuffled, sharded by process, for ever."""
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from rl_jax import types
from rl_jax.tasks import task as tasks


PASSES = 2**32  # no run gets there; grain's own endless length overflows in a batch of one


class Stream(Iterator[types.Prompts]):
    """Batches of a split, shuffled anew in each pass over it, without end.

    A batch may span two passes, so a split smaller than a batch works. Together the processes
    see what one process would, in its order: each has the rows of each batch that follow those of the process before it.
    """

    def __init__(
        self,
        task: tasks.Task,
        split: str,
        prompts_per_batch: int,
        *,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        need_answers: bool = False,
        with_answers: bool = False,
    ):
        """Opens the stream at its first batch.

        Args:
          task: whose questions.
          split: one of the task's splits.
          prompts_per_batch: P over all processes, a multiple of process_count.
          seed: fixes the order; at least 0.
          process_index: which share of each batch is this process's.
          process_count: processes that share each batch.
          need_answers: whether every prompt must carry a worked solution.
          with_answers: whether prompts carry the worked solutions that there are.
        """
        if split not in task.splits:
            raise ValueError(f"split={split!r}: task {task.name!r} has {sorted(task.splits)}.")
        if not 0 <= process_index < process_count or prompts_per_batch < 1 or prompts_per_batch % process_count:
            raise ValueError(f"prompts_per_batch={prompts_per_batch}, process_index={process_index}, process_count="
                             f"{process_count}: the batch must be a positive multiple of process_count and the index "
                             "below it.")
        if with_answers and all(example.answer is None for example in task.splits[split]):
            raise ValueError(f"task {task.name!r}: no example of {split!r} has a worked solution, and the recipe puts them "
                             "into its groups. Take a recipe that only draws its answers, or a task that has some.")
        self._made_from = {
            "task": task.name, "questions": task.fingerprint, "tokenizer": task.tokenizer.fingerprint, "split": split,
            "examples": len(task.splits[split]), "seed": seed, "prompts_per_batch": prompts_per_batch}
        examples = task.splits[split]

        def prompts(indices: Sequence[int]) -> types.Prompts:
            own = indices[process_index * share:(process_index + 1) * share]
            return batch(task, [examples[i] for i in own], indices=own, need_answers=need_answers,
                         with_answers=with_answers)

        share = prompts_per_batch // process_count
        order = grain.MapDataset.range(len(examples)).shuffle(seed=seed).repeat(PASSES)
        batches = order.batch(prompts_per_batch, batch_fn=prompts)
        # Without threads nothing is read ahead: the position is exactly the number of batches taken.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._iterator = iter(batches.to_iter_dataset(options))

    def __next__(self) -> types.Prompts:
        """The next batch, as NumPy arrays."""
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """The position and what it is a position in, as plain values; equal on all processes."""
        return {"position": self._iterator.get_state(), **self._made_from}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
          ValueError: if it was taken from another stream; says what differs.
        """
        names = sorted(self._made_from.keys() | (state.keys() - {"position"}))
        differ = [f"{name}: saved {state.get(name)!r}, now {self._made_from.get(name)!r}"
                  for name in names if state.get(name) != self._made_from.get(name)]
        if differ or "position" not in state:
            raise ValueError("the saved data position belongs to another stream (" +
                             ("; ".join(differ) or "it has no position") +
                             "). Continue with the configuration it was saved with, or start a new run.")
        self._iterator.set_state(state["position"])


def batch(
    task: tasks.Task,
    examples: Sequence[tasks.Example],
    *,
    indices: Sequence[int] | None = None,
    need_answers: bool = False,
    with_answers: bool = False,
) -> types.Prompts:
    """Examples of a task as right-padded NumPy arrays.

    Args:
      task: gives S, T and the padding.
      examples: P of them, at least one.
      indices: which examples they are; 0 to P - 1 unless told.
      need_answers: whether every prompt must carry a worked solution.
      with_answers: whether prompts carry the worked solutions that there are; the mask of one without is all False.
    """
    if not examples:
        raise ValueError(f"task {task.name!r}: a batch needs at least one example.")
    pad = task.tokenizer.pad_id
    tokens, mask = _padded([e.prompt for e in examples], task.prompt_length, pad, "prompt_length")
    answer = answer_mask = None
    if need_answers or with_answers:
        missing = [e.text for e in examples if e.answer is None]
        if missing and need_answers:
            raise ValueError(f"task {task.name!r}: {missing[0][:80]!r} has no worked solution to learn from. Take a "
                             "recipe that draws its answers, or a task whose examples have them.")
        answer, answer_mask = _padded([e.answer or () for e in examples], task.completion_length, pad, "completion_length")
    return types.Prompts(
        tokens=tokens, lengths=mask.sum(axis=1, dtype=np.int32),
        example=np.asarray(range(len(examples)) if indices is None else indices, np.int32),
        domain=np.asarray([e.domain for e in examples], np.int32),
        facts={name: np.stack([e.facts[name] for e in examples]) for name in examples[0].facts},
        answer=answer, answer_mask=answer_mask)


def _padded(rows: Sequence[Sequence[int]], width: int, pad: int, limit: str) -> tuple[np.ndarray, np.ndarray]:
    longest = max(len(row) for row in rows)
    if longest > width:
        raise ValueError(f"a row has {longest} tokens and {limit} is {width}: set it to at least {longest}.")
    mask = np.arange(width) < np.array([len(row) for row in rows])[:, None]
    tokens = np.full(mask.shape, pad, np.int32)
    tokens[mask] = np.concatenate([np.asarray(row, np.int32) for row in rows])
    return tokens, mask
