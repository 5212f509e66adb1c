"""A recipe: one algorithm as plain functions, in the order data meets them."""
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

MODELS = ("reference", "old", "teacher", "critic")


@dataclasses.dataclass(frozen=True)
class Rollout:
    """How answers are drawn.

    Attributes:
      group_size: G, samples per prompt.
      group_size_at_least: the smallest G that the recipe's formula allows.
      temperature: divides the logits; 0 is greedy.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the smallest set of most probable tokens with at least this mass; 1 keeps all.
      min_p: keep tokens with at least this share of the largest probability; 0 keeps all.
      resample: how many further waves of prompts may be asked in one step to replace the groups
        that the selection slot rejected.
    """

    group_size: int = 8
    group_size_at_least: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    resample: int = 0

    def __post_init__(self):
        if self.group_size < self.group_size_at_least:
            raise ValueError(
                f"group_size={self.group_size}: this recipe compares the samples of one prompt and needs "
                f"group_size >= {self.group_size_at_least}. Raise it, or take a recipe whose baseline needs no "
                "group (baselines.reinforce, baselines.ppo).")
        allowed = {"temperature": self.temperature >= 0, "top_k": self.top_k >= 0, "top_p": 0 < self.top_p <= 1,
                   "min_p": 0 <= self.min_p < 1, "resample": self.resample >= 0}
        wrong = [name for name, fine in allowed.items() if not fine]
        if wrong:
            given = ", ".join(f"{name}={getattr(self, name)}" for name in wrong)
            raise ValueError(f"{given}: allowed are temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p < 1, "
                             "resample >= 0.")

    @property
    def truncated(self) -> bool:
        """Whether some tokens can never be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How often a batch is used, and what adapts.

    Attributes:
      epochs: passes over the batch.
      minibatches: optimiser steps per pass; the prompts are dealt anew for each pass.
      controls: adapting coefficients by name, each an `(init, update)` pair as in
        `schedule.control`, read in the slots as `x.coefficient.<name>`.
    """

    epochs: int = 1
    minibatches: int = 1
    controls: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.epochs < 1 or self.minibatches < 1:
            raise ValueError(f"epochs={self.epochs}, minibatches={self.minibatches}: both must be at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """An algorithm. Each slot is a function of the batch `x` (`types.Experience`).

    Attributes:
      rollout: how answers are drawn; None learns from given answers.
      reward: x -> [N], what is made of the verifier's score.
      selection: x -> [N] bool, which answers are learned from.
      advantage: x -> [N] or [N, T], credit.
      loss: (policy, x) -> [N, T], or ([N, T], extras) with extra [N, T] metrics by name.
      weighting: x -> [N, T], how much each of those numbers counts.
      schedule: epochs, minibatches and adapting coefficients.
      models: weights needed beside the policy's: "reference", "old", "teacher", "critic".
      name, paper, hyperparameters: written by `@recipe`.
    """

    rollout: Rollout | None = Rollout()
    reward: Callable | None = None
    selection: Callable | None = None
    advantage: Callable | None = None
    loss: Callable
    weighting: Callable
    schedule: Schedule = Schedule()
    models: tuple[str, ...] = ()
    name: str = ""
    paper: str = ""
    hyperparameters: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        unknown = set(self.models) - set(MODELS)
        if unknown:
            raise ValueError(f"models={self.models}: {sorted(unknown)} unknown; allowed are {MODELS}.")
        if self.rollout is not None and self.rollout.resample and self.selection is None:
            raise ValueError(f"rollout.resample={self.rollout.resample} replaces the groups that the selection slot "
                             "rejects, and this recipe has no selection slot: give one, or set resample=0.")

    @property
    def group_size(self) -> int:
        """G, samples per prompt; 1 for recipes that learn from given answers."""
        return 1 if self.rollout is None else self.rollout.group_size


def recipe(*, paper: str) -> Callable[[Callable[..., Recipe]], Callable[..., Recipe]]:
    """Marks a factory as a published algorithm: writes name, paper and hyperparameters into its Recipe.

    Args:
      paper: "arXiv:..." or a full reference.
    """
    def wrap(factory):
        signature = inspect.signature(factory)

        @functools.wraps(factory)
        def build(*args, **kwargs) -> Recipe:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return dataclasses.replace(factory(*args, **kwargs), name=factory.__name__, paper=paper,
                                       hyperparameters=dict(bound.arguments))

        return build

    return wrap


def replace(of: Recipe, **slots: Any) -> Recipe:
    """The recipe with some slots exchanged: `replace(grpo(), advantage=mine, name="grpo_mine")`."""
    return dataclasses.replace(of, **slots)
