"""A recipe: one algorithm as plain functions, in the order data meets them."""
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

MODELS = ("reference", "old", "teacher", "critic", "moments")
ROUTING = ("free", "rollout", "old")
CONFIDENCE = ("verified", "secondary", "reconstructed")


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
      given: how many samples of each group are replaced with the prompt's given answer, where it has
        one. The recipe must ask for models=("old",): `x.rollout_logp` of such a row is `x.old_logp`.
      window: the most tokens an answer grows by in one step; what has not ended goes on in the next
        step, with the weights of then. 0 draws whole answers.
      replay: how many batches of earlier steps are learned from again beside the fresh one.
      temperature_factor: (entropy [B] in nats at `temperature`, coefficient) -> [B], by which the
        temperature of each token is multiplied; `coefficient` holds the recipe's adapting
        coefficients by name.
    """

    group_size: int = 8
    group_size_at_least: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    resample: int = 0
    given: int = 0
    window: int = 0
    replay: int = 0
    temperature_factor: Callable | None = None

    def __post_init__(self):
        if self.group_size < self.group_size_at_least:
            raise ValueError(
                f"group_size={self.group_size}: this recipe compares the samples of one prompt and needs "
                f"group_size >= {self.group_size_at_least}. Raise it, or take a recipe whose baseline needs no "
                "group (baselines.reinforce, baselines.ppo).")
        allowed = {"temperature": self.temperature >= 0, "top_k": self.top_k >= 0, "top_p": 0 < self.top_p <= 1,
                   "min_p": 0 <= self.min_p < 1, "resample": self.resample >= 0,
                   "given": 0 <= self.given < max(self.group_size, 1), "window": self.window >= 0,
                   "replay": self.replay >= 0}
        wrong = [name for name, fine in allowed.items() if not fine]
        if wrong:
            given = ", ".join(f"{name}={getattr(self, name)}" for name in wrong)
            raise ValueError(f"{given}: allowed are temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p < 1, "
                             "resample >= 0, 0 <= given < group_size, window >= 0, replay >= 0.")
        if self.window and (self.resample or self.given):
            raise ValueError(f"window={self.window} goes on with the answers of the step before; it cannot be combined "
                             f"with resample={self.resample} or given={self.given}: set window=0 or those to 0.")

    @property
    def truncated(self) -> bool:
        """Whether some tokens can never be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclasses.dataclass(frozen=True)
class Turns:
    """One update taken in several optimiser steps, each on the tokens of one turn.

    Before each of them `x.old_logp` is computed anew and the advantage is multiplied by a factor
    per sequence that starts at 1. A turn that no sequence has is passed over.

    Attributes:
      order: turn numbers in the order of their steps.
      factor: (factor [N], logp after the step, logp before it, mask of the turn's tokens) -> [N].
    """

    order: tuple[int, ...]
    factor: Callable

    def __post_init__(self):
        if not self.order or len(set(self.order)) < len(self.order) or min(self.order) < 0:
            raise ValueError(f"turns order={self.order}: give each turn's number, from 0, once.")


@dataclasses.dataclass(frozen=True)
class StepScale:
    """The optimiser's step is multiplied by what the gradients of pieces of the batch say of its noise.

    Attributes:
      scale: (squared norm of the gradient, its estimated variance) -> factor, all scalars.
      pieces: K, into how many pieces of whole groups the batch is cut to estimate the variance, at least 2.
    """

    scale: Callable
    pieces: int = 4

    def __post_init__(self):
        if self.pieces < 2:
            raise ValueError(f"pieces={self.pieces}: a variance needs at least 2.")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How often a batch is used, and what adapts.

    Attributes:
      epochs: passes over the batch.
      minibatches: optimiser steps per pass; the prompts are dealt anew for each pass.
      controls: adapting coefficients by name, each an `(init, update)` pair as in
        `schedule.control`, read in the slots as `x.coefficient.<name>`.
      turns: the update is taken turn by turn; None takes it at once.
      step_scale: the optimiser's step depends on the gradient's noise; None leaves it as it is.
    """

    epochs: int = 1
    minibatches: int = 1
    controls: dict[str, Any] = dataclasses.field(default_factory=dict)
    turns: Turns | None = None
    step_scale: StepScale | None = None

    def __post_init__(self):
        if self.epochs < 1 or self.minibatches < 1:
            raise ValueError(f"epochs={self.epochs}, minibatches={self.minibatches}: both must be at least 1.")

    @property
    def updates(self) -> int:
        """Optimiser steps per batch."""
        return self.epochs * self.minibatches * (1 if self.turns is None else len(self.turns.order))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """An algorithm. Each slot is a function of the batch `x` (`types.Experience`).

    Attributes:
      rollout: how answers are drawn; None learns from given answers.
      reward: x -> [N], what is made of the verifier's score.
      selection: x -> [N] bool, which answers are learned from; or [N] int, which answer is learned
        from in the place of each, among those to the same prompt.
      advantage: x -> [N] or [N, T], credit.
      marks: x -> {name: [N, T]}, what else the loss must know of each token that depends on other
        tokens: constants, found before the batch is cut, read as `x.mark.<name>`.
      loss: (policy, x) -> terms, or (terms, extras) with extra [N, T] metrics by name. Terms are
        [N, T], or {name: [N, T]} where they are weighted differently.
      weighting: x -> [N, T], how much each of those numbers counts; {name: [N, T]} for named terms.
      schedule: epochs, minibatches, adapting coefficients, turns.
      models: what else is asked of a model: log-probabilities under the weights "reference", "old"
        (the policy before this batch) and "teacher", the values of a "critic", and "moments" of the
        policy's distributions before this batch.
      views: {name: (prompts, seed) -> prompts}: other prompts under which the policy before this
        batch scores the drawn tokens, read as `x.view.<name>`. `seed` is a random uint32 per prompt.
      routing: which experts the update's passes go through, in a network that mixes some: those that the routers of
        the weights in use choose ("free"), those recorded when the answers were drawn ("rollout", called R3), or those
        that the policy before the batch chooses in training ("old", R2).
      indivisible: the loss compares all groups of the batch, so it cannot be cut into micro-batches.
      name, paper, hyperparameters: written by `@recipe`.
    """

    rollout: Rollout | None = Rollout()
    reward: Callable | None = None
    selection: Callable | None = None
    advantage: Callable | None = None
    marks: Callable | None = None
    loss: Callable
    weighting: Callable
    schedule: Schedule = Schedule()
    models: tuple[str, ...] = ()
    views: dict[str, Callable] = dataclasses.field(default_factory=dict)
    routing: str = "free"
    indivisible: bool = False
    name: str = ""
    paper: str = ""
    hyperparameters: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        unknown = set(self.models) - set(MODELS)
        if unknown:
            raise ValueError(f"models={self.models}: {sorted(unknown)} unknown; allowed are {MODELS}.")
        if self.routing not in ROUTING:
            raise ValueError(f"routing={self.routing!r}: allowed are {ROUTING}.")
        if self.rollout is not None and self.rollout.resample and self.selection is None:
            raise ValueError(f"rollout.resample={self.rollout.resample} replaces the groups that the selection slot "
                             "rejects, and this recipe has no selection slot: give one, or set resample=0.")
        if self.rollout is not None and self.rollout.given and "old" not in self.models:
            raise ValueError(f'rollout.given={self.rollout.given}, models={self.models}: nobody drew the given answers, '
                             'their log-probability before the update must be asked for: add "old" to models.')

    @property
    def needs_answers(self) -> bool:
        """Whether prompts must carry given answers."""
        return self.rollout is None or self.rollout.given > 0

    @property
    def group_size(self) -> int:
        """G, samples per prompt; 1 for recipes that learn from given answers."""
        return 1 if self.rollout is None else self.rollout.group_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """What the catalogue says of a recipe beside what its factory shows.

    Attributes:
      name: of the recipe.
      title: of the paper.
      paper: "arXiv:..." or a full reference.
      confidence: "verified" (published code or the paper's text was read), "secondary" (someone
        else's implementation was) or "reconstructed" (from the abstract).
      note: what a user must know: which choices are not the paper's, what it does not learn and why.
    """

    name: str
    title: str
    paper: str
    confidence: str
    note: str = ""


def recipe(*, paper: str, title: str, confidence: str, note: str = "") -> Callable[
        [Callable[..., Recipe]], Callable[..., Recipe]]:
    """Marks a factory as a published algorithm: writes name, paper and hyperparameters into its Recipe.

    The built function carries the `Card` as its attribute `card`.

    Args:
      paper: "arXiv:..." or a full reference.
      title: the paper's.
      confidence: how well the formula is known, see `Card`.
      note: one or two sentences for the catalogue, see `Card`.
    """
    if confidence not in CONFIDENCE:
        raise ValueError(f"confidence={confidence!r}: allowed are {CONFIDENCE}.")

    def wrap(factory):
        signature = inspect.signature(factory)

        @functools.wraps(factory)
        def build(*args, **kwargs) -> Recipe:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return dataclasses.replace(factory(*args, **kwargs), name=factory.__name__, paper=paper,
                                       hyperparameters=dict(bound.arguments))

        build.card = Card(name=factory.__name__, title=title, paper=paper, confidence=confidence, note=note)
        return build

    return wrap


def replace(of: Recipe, **slots: Any) -> Recipe:
    """The recipe with some slots exchanged: `replace(grpo(), advantage=mine, name="grpo_mine")`."""
    return dataclasses.replace(of, **slots)


def with_old_policy(of: Recipe, weight: Callable[[Any], Any], name: str) -> Recipe:
    """The recipe with its ratio taken to the policy before the batch, and a weight for what sampled differently.

    `x.rollout_logp` in its loss is `x.old_logp`; `weight(x)` [N, T], such as
    `importance.truncated(importance.per_token(x.old_logp, x.rollout_logp, x.mask), 2.0)`, multiplies the weights of
    the policy's term.

    Args:
      of: a recipe whose ratio is to `x.rollout_logp`.
      weight: x -> [N, T], constant.
      name: of the new recipe.
    """
    def weighting(x):
        weights = of.weighting(x)
        if isinstance(weights, dict):
            return {**weights, "policy": weights["policy"] * weight(x)}
        return weights * weight(x)

    return replace(of, loss=lambda policy, x: of.loss(policy, dataclasses.replace(x, rollout_logp=x.old_logp)),
                   weighting=weighting, models=tuple(dict.fromkeys((*of.models, "old"))), name=name)
