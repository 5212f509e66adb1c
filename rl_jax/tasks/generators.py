"""reasoning_gym's generators by name, and their own scorers; imports no jax, as workers need it."""
from collections.abc import Mapping
from typing import Any

INSTALL = "this needs the extra 'tasks': pip install rl_jax[tasks]"


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
        raise ImportError(f"reasoning_gym is not installed; {INSTALL}") from error
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


class Scorer:
    """A generator's own scorer as a host verifier.

    A copy sent to a worker makes its generator there, so that importing it is no answer's time.
    """

    def __init__(self, generator: str, options: Mapping[str, Any], partial_credit: bool):
        """Makes the generator.

        Args:
          generator: one of reasoning_gym's names.
          options: fields of its configuration.
          partial_credit: whether the score is the credit; otherwise it is 1 for full credit, else 0.
        """
        self._arguments = (generator, dict(options), partial_credit)
        self._partial_credit = partial_credit
        self._dataset = dataset(generator, options, seed=0, size=1)

    def __reduce__(self):
        return Scorer, self._arguments

    def __call__(self, fields: Mapping[str, Any], text: str) -> dict[str, float]:
        """Score and credit of an answer; white space around it does not count.

        Args:
          fields: "question", "answer" and "metadata" as the generator gave them.
          text: the completion.
        """
        credit = float(self._dataset.score_answer(answer=text.strip(), entry=fields))
        return {"score": credit if self._partial_credit else float(credit == 1.0), "partial_credit": credit}
