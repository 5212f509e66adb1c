"""reasoning_gym's generators by name, and their own scorers; imports no jax, as workers need it."""
import functools
import json
from collections.abc import Mapping
from typing import Any

INSTALL = "reasoning_gym tasks need the extra 'tasks': pip install rl_jax[tasks]"


def dataset(generator: str, options: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """A reasoning_gym dataset: item i is drawn from `Random(seed + i)`.

    Args:
      generator: one of reasoning_gym's names.
      options: fields of the generator's own configuration.

    Raises:
      ValueError: for an unknown name or option, saying which there are.
    """
    try:
        import reasoning_gym
        from reasoning_gym import factory
    except ImportError as error:
        raise ImportError(INSTALL) from error
    if generator not in factory.DATASETS:
        raise ValueError(f"generator={generator!r} is unknown; there are {sorted(factory.DATASETS)}.")
    allowed = set(factory.DATASETS[generator][1].__dataclass_fields__) - {"seed", "size"}
    if set(options) - allowed:
        raise ValueError(f"options {sorted(set(options) - allowed)} are unknown to {generator!r}; "
                         f"it has {sorted(allowed)}.")
    try:
        return reasoning_gym.create_dataset(generator, seed=seed, size=size, **options)
    except AssertionError as error:
        raise ValueError(f"{generator!r} refuses options {dict(options)}: {error}") from error


def score(
    generator: str, options: str, partial_credit: bool, fields: Mapping[str, Any], text: str
) -> dict[str, float]:
    """What the generator's own scorer says of an answer; surrounding white space does not count.

    Args:
      generator: one of reasoning_gym's names.
      options: its options as JSON, so that they can be remembered by value.
      partial_credit: whether the score is the credit; otherwise it is 1 for full credit, else 0.
      fields: "question", "answer" and "metadata" as the generator gave them.
      text: the completion.
    """
    credit = float(_scorer(generator, options).score_answer(answer=text.strip(), entry=fields))
    return {"score": credit if partial_credit else float(credit == 1.0), "partial_credit": credit}


@functools.lru_cache(maxsize=8)
def _scorer(generator: str, options: str) -> Any:
    return dataset(generator, json.loads(options), seed=0, size=1)
