"""From a config that lists recipes to a checked comparison: the same start, the same draws, equal budgets."""
import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

import ml_collections

from rl_jax import experiment, sections
from rl_jax.experiment import Experiment, Phase, Pretrained
from rl_jax.learner.optimiser import Optimiser
from rl_jax.models.shape import Shape
from rl_jax.recipe import Recipe
from rl_jax.tasks.task import PureVerifier, Task

SECTIONS = ("task", "model", "recipes", "baseline", "optimiser", "scale", "run", "before")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """What every recipe may spend.

    Attributes:
      steps: of each recipe.
      answers_per_step: drawn in each step, the same number for every recipe: one that draws G
        answers to a prompt is asked answers_per_step / G prompts. A recipe that replaces groups asks
        for more, which is counted.
      seeds: replicas of each recipe, over which its error is estimated; trained side by side where
        the verifier is pure, one after the other where it is not.
      microbatches, steps_per_call, program: as in `experiment.Scale`.
    """

    steps: int = 100
    answers_per_step: int = 256
    seeds: int = 4
    microbatches: int = 1
    steps_per_call: int = 1
    program: str = "one"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What surrounds the steps.

    Attributes:
      seed: of the weights, the data order and every draw.
      workers: processes that run a host verifier.
    """

    seed: int = 0
    workers: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Recipes by name, and what they all get: replica r of each has the same weights, prompts and key.

    Attributes:
      baseline: name of the recipe that the others are compared with; the first if empty.
      before: phases that make the weights that all recipes and all replicas start from, run once;
        without them each replica has fresh weights of its own, or all those of a published checkpoint.
      pretrained: the checkpoint whose weights the first of them, or every recipe, starts from.
    """

    task: Task
    shape: Shape
    recipes: dict[str, Recipe]
    baseline: str = ""
    optimiser: Optimiser = Optimiser()
    scale: Scale = Scale()
    run: Run = Run()
    before: tuple[Phase, ...] = ()
    pretrained: Pretrained | None = None

    def __post_init__(self):
        if not self.recipes or self.baseline not in ("", *self.recipes):
            raise ValueError(f"baseline={self.baseline!r}: give at least one recipe, and a baseline among them; there "
                             f"are {', '.join(self.recipes) or 'none'}.")
        if self.scale.seeds < 1:
            raise ValueError(f"scale.seeds={self.scale.seeds}: must be at least 1.")
        for name in self.recipes:
            _check_recipe(name, self.recipes[name], self.scale)
            experiment.check(self.experiment(name))
        if self.start is not None:
            experiment.check(self.start)
            if self.before[0].scale.seeds != 1:
                raise ValueError(f"config.before[0].scale.seeds={self.before[0].scale.seeds}: the weights that all "
                                 "replicas start from are made once, set it to 1.")

    @property
    def reference(self) -> str:
        """Name of the recipe that the others are compared with."""
        return self.baseline or next(iter(self.recipes))

    @property
    def side_by_side(self) -> bool:
        """Whether the replicas of a recipe are trained in one program."""
        return isinstance(self.task.verifier, PureVerifier) and self.scale.program == "one"

    @property
    def start(self) -> Experiment | None:
        """The run that makes the weights all recipes start from, if there is one."""
        if not self.before:
            return None
        every = 100 * math.lcm(*(phase.scale.steps_per_call for phase in self.before))
        run = experiment.Run(seed=self.run.seed, workers=self.run.workers, checkpoint_every=every)
        return Experiment(task=self.task, shape=self.shape, phases=self.before, run=run, pretrained=self.pretrained)

    def phase(self, name: str) -> Phase:
        """One recipe with its share of the budget."""
        recipe, scale = self.recipes[name], self.scale
        return Phase(recipe=recipe, optimiser=self.optimiser, scale=experiment.Scale(
            steps=scale.steps, prompts_per_step=scale.answers_per_step // recipe.group_size,
            microbatches=scale.microbatches, steps_per_call=scale.steps_per_call,
            seeds=scale.seeds if self.side_by_side else 1, program=scale.program))

    def experiment(self, name: str) -> Experiment:
        """One recipe as an experiment of its own."""
        run = experiment.Run(seed=self.run.seed, workers=self.run.workers, checkpoint_every=max(self.scale.steps, 1))
        return Experiment(task=self.task, shape=self.shape, phases=(self.phase(name),), run=run)


def recipes_section(names: str, **common: Any) -> ml_collections.ConfigDict:
    """The config section of several recipes, by the last part of their names, numbered where one occurs twice.

    Args:
      names: module paths under `rl_jax.recipes` with commas between, such as "baselines.grpo,baselines.rloo".
      common: arguments that differ from the papers' defaults, for those recipes that have them.
    """
    found = ml_collections.ConfigDict()
    for name in (part.strip() for part in names.split(",")):
        has = inspect.signature(sections.find("recipe", "rl_jax.recipes", name)).parameters
        short = name.rsplit(".", 1)[-1]
        number = 1 + sum(one.name == name for one in found.values())
        found[short if number == 1 else f"{short}_{number}"] = experiment.recipe_section(
            name, **{key: value for key, value in common.items() if key in has})
    return found


def first_of(names: str) -> str:
    """The name under which `recipes_section` has the first of several recipes."""
    return names.split(",")[0].strip().rsplit(".", 1)[-1]


def parse(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Comparison:
    """Builds the comparison that a config describes.

    Raises:
      ValueError: naming the field, what was given, what is allowed and what to do.
    """
    config = sections.plain(config)
    sections.check_names("config", config, SECTIONS, optional=("before",))
    task = sections.named("task", "rl_jax.tasks", config["task"], "config.task")
    order = sorted(config["recipes"], key=lambda name: name != config["baseline"])  # a config sorts its fields
    recipes = {name: sections.named("recipe", "rl_jax.recipes", config["recipes"][name], f"config.recipes.{name}")
               for name in order}
    return Comparison(
        task=task, shape=experiment.shape(config["model"], task), recipes=recipes, baseline=config["baseline"],
        optimiser=sections.typed(Optimiser, config["optimiser"], "config.optimiser"),
        scale=sections.typed(Scale, config["scale"], "config.scale"),
        run=sections.typed(Run, config["run"], "config.run"), before=experiment.before(config),
        pretrained=experiment.pretrained(config["model"]))


def _check_recipe(name: str, recipe: Recipe, scale: Scale) -> None:
    if recipe.rollout is None:
        raise ValueError(f"recipe {name!r} learns from given answers and draws none: recipes are compared by the score "
                         "of what they draw. Put it in `before`, to start from.")
    if "teacher" in recipe.models:
        raise ValueError(f"recipe {name!r} learns from a teacher, and a comparison has none: train it by itself.")
    pieces = recipe.group_size * recipe.schedule.minibatches * scale.microbatches
    if scale.answers_per_step < pieces or scale.answers_per_step % pieces:
        raise ValueError(
            f"recipe {name!r}: scale.answers_per_step={scale.answers_per_step} must be a multiple of {pieces}, its "
            f"{recipe.group_size} answers to a prompt x {recipe.schedule.minibatches} minibatches x "
            f"{scale.microbatches} microbatches. Change it for all recipes, or this recipe's arguments.")
