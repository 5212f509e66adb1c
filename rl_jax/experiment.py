"""From a config of plain values to a typed, checked experiment: every mistake is found before anything compiles."""
import dataclasses
import difflib
import importlib
import inspect
import math
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from rl_jax.learner.optimiser import Optimiser
from rl_jax.models.transformer import Shape
from rl_jax.recipe import Recipe
from rl_jax.tasks.task import PureVerifier, Task

SECTIONS = ("task", "model", "recipe", "optimiser", "scale", "run", "before")
FEATURES = ("query_bias", "query_norm", "tied", "scale_embedding", "rotary_base", "norm_epsilon")
PROGRAMS = ("one", "split")
TRACKERS = ("tensorboard", "wandb")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is done per step.

    Attributes:
      steps: of this phase.
      prompts_per_step: P.
      microbatches: pieces that the update is accumulated over; saves memory, changes nothing else.
      steps_per_call: steps in one dispatch, for small models.
      seeds: replicas trained side by side, for tasks with a pure verifier.
      program: "one" program per step, or "split" in two, where the host scores one batch while
        the device draws the next (off-policy by one step).
      stop_after_skips: steps in a row without a finite gradient after which the run stops.
      memory_limit_gib: refuse to start if the compiled step needs more; 0 takes the device's own limit.
    """

    steps: int = 100
    prompts_per_step: int = 32
    microbatches: int = 1
    steps_per_call: int = 1
    seeds: int = 1
    program: str = "one"
    stop_after_skips: int = 10
    memory_limit_gib: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What surrounds the steps.

    Attributes:
      seed: of the weights, the data order and every draw.
      checkpoint_every: steps.
      keep_last, keep_best: checkpoints kept, by age and by validation pass@1.
      validate_every: steps; 0 switches validation off.
      validation_prompts, validation_samples: problems and answers to each.
      shown_groups: groups per step in the rollout table; 0 writes none.
      workers: processes that run a host verifier.
      trackers: of ("tensorboard", "wandb"), beside metrics.jsonl.
    """

    seed: int = 0
    checkpoint_every: int = 50
    keep_last: int = 2
    keep_best: int = 1
    validate_every: int = 0
    validation_prompts: int = 64
    validation_samples: int = 4
    shown_groups: int = 2
    workers: int = 2
    trackers: tuple = ()


@dataclasses.dataclass(frozen=True)
class Phase:
    """One recipe with its optimiser and scale."""

    recipe: Recipe
    optimiser: Optimiser
    scale: Scale

    @property
    def updates(self) -> int:
        """Optimiser steps of the whole phase."""
        return self.scale.steps * self.recipe.schedule.updates

    @property
    def prompts_asked(self) -> int:
        """Prompts taken from the stream per step, those held back for replacement included."""
        waves = 1 if self.recipe.rollout is None else 1 + self.recipe.rollout.resample
        return self.scale.prompts_per_step * waves


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked experiment: the task, the network's shape, the phases in order, and what surrounds them."""

    task: Task
    shape: Shape
    phases: tuple[Phase, ...]
    run: Run


def recipe_section(name: str, **overrides: Any) -> ml_collections.ConfigDict:
    """The config section of a recipe, its arguments filled from the factory's signature.

    Args:
      name: module path under `rl_jax.recipes`, such as "baselines.grpo".
      overrides: arguments that differ from the paper's defaults.
    """
    return _named_section("recipe", "rl_jax.recipes", name, overrides)


def task_section(name: str, **overrides: Any) -> ml_collections.ConfigDict:
    """The config section of a task, its arguments filled from the factory's signature.

    Args:
      name: module path under `rl_jax.tasks`, such as "toys.addmod".
      overrides: arguments that differ from the defaults.
    """
    return _named_section("task", "rl_jax.tasks", name, overrides)


def model_section(**overrides: Any) -> ml_collections.ConfigDict:
    """The config section of the network; its vocabulary comes from the task's tokenizer."""
    values = {f.name: f.default for f in dataclasses.fields(Shape) if f.name != "vocabulary"}
    unknown = set(overrides) - set(values)
    if unknown:
        raise ValueError(f"model has no {sorted(unknown)}; allowed are {sorted(values)}.")
    values |= overrides
    features = {name: values.pop(name) for name in FEATURES}
    return ml_collections.ConfigDict({**values, "features": features})


def section(cls: type, **overrides: Any) -> ml_collections.ConfigDict:
    """The config section of a dataclass of plain values, such as `Optimiser`, `Scale` or `Run`, defaults filled in."""
    return ml_collections.ConfigDict(dataclasses.asdict(cls(**overrides)))


def parse(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Experiment:
    """Builds the experiment that a config describes.

    Raises:
      ValueError: naming the field, what was given, what is allowed and what to do.
    """
    config = plain(config)
    check_names("config", config, SECTIONS, optional=("before",))
    run = typed(Run, config["run"], "config.run")
    task = named("task", "rl_jax.tasks", config["task"], "config.task")
    main = phase({name: config[name] for name in ("recipe", "optimiser", "scale")}, "config")
    experiment = Experiment(task=task, shape=shape(config["model"], task), phases=(*before(config), main), run=run)
    check(experiment)
    return experiment


def plain(config: Any) -> Any:
    """The config as dicts, lists, numbers and strings, as JSON holds it."""
    if isinstance(config, (Mapping, ml_collections.ConfigDict)):
        return {key: plain(value) for key, value in config.items()}
    return [plain(value) for value in config] if isinstance(config, (tuple, list)) else config


def misnamed(config: Any, overrides: Sequence[str]) -> str | None:
    """What is wrong with the first override that names no field of the config; None if all do.

    Args:
      config: as its file makes it.
      overrides: arguments such as "--config.optimiser.learning_rate=1e-4"; others are skipped.
    """
    for override in overrides:
        name = override.lstrip("-").split("=")[0]
        if not override.startswith("-") or not name.startswith("config."):
            continue
        at, seen = config, "config"
        for part in re.findall(r"[^.\[\]]+", name)[1:]:
            if isinstance(at, (tuple, list)):
                if not part.isdigit() or int(part) >= len(at):
                    return f"{seen} has {len(at)} entries, no [{part}]."
                at, seen = at[int(part)], f"{seen}[{part}]"
            elif isinstance(at, ml_collections.ConfigDict) and part in at:
                at, seen = at[part], f"{seen}.{part}"
            else:
                allowed = ", ".join(at) if isinstance(at, ml_collections.ConfigDict) else "none: it is a plain value"
                return f"{seen} has no field {part!r}; allowed are {allowed}."
    return None


def typed(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """cls(**values) after checking names and types against its fields."""
    fields = typing.get_type_hints(cls)
    check_names(where, values, tuple(fields), optional=tuple(fields))
    return cls(**{name: _checked(value, fields[name], f"{where}.{name}") for name, value in values.items()})


def shape(values: Mapping[str, Any], task: Task) -> Shape:
    """The network's shape from its section, plain values; the task's tokenizer gives the vocabulary."""
    rest = {name: value for name, value in values.items() if name != "features"}
    return typed(Shape, {**rest, **values.get("features", {}), "vocabulary": task.tokenizer.size}, "config.model")


def before(config: Mapping[str, Any]) -> tuple[Phase, ...]:
    """The phases that precede the main one, of a config of plain values."""
    return tuple(phase(one, f"config.before[{i}]") for i, one in enumerate(config.get("before", ())))


def phase(values: Mapping[str, Any], where: str) -> Phase:
    """The phase of three sections, plain values; errors say `where` it stands."""
    check_names(where, values, ("recipe", "optimiser", "scale"))
    return Phase(recipe=named("recipe", "rl_jax.recipes", values["recipe"], f"{where}.recipe"),
                 optimiser=typed(Optimiser, values["optimiser"], f"{where}.optimiser"),
                 scale=typed(Scale, values["scale"], f"{where}.scale"))


def _named_section(kind: str, package: str, name: str, overrides: Mapping[str, Any]) -> ml_collections.ConfigDict:
    factory = find(kind, package, name)
    parameters = inspect.signature(factory).parameters
    unknown = set(overrides) - set(parameters)
    if unknown:
        raise ValueError(f"{kind} {name!r} has no argument {sorted(unknown)}; it has {list(parameters)}.")
    args = {key: overrides.get(key, p.default) for key, p in parameters.items()}
    missing = [key for key, value in args.items() if value is inspect.Parameter.empty]
    if missing:
        raise ValueError(f"{kind} {name!r} needs {missing}: no default exists.")
    return ml_collections.ConfigDict({"name": name, "args": args, "args_of": name})


def named(kind: str, package: str, values: Mapping[str, Any], where: str) -> Any:
    """What the factory that a section names makes of the section's arguments, plain values."""
    check_names(where, values, ("name", "args", "args_of"))
    factory = find(kind, package, values["name"])
    if values["args_of"] != values["name"]:
        raise ValueError(
            f"{where}.name={values['name']!r}, but {where}.args are those of {values['args_of']!r}. Name the {kind} "
            f"where the config is made, so that its own arguments are filled in: --config=FILE.py:{values['name']}")
    parameters = inspect.signature(factory).parameters
    check_names(f"{where}.args", values["args"], tuple(parameters), optional=tuple(parameters))
    hints = typing.get_type_hints(factory)
    args = {name: _checked(value, hints.get(name, Any), f"{where}.args.{name}")
            for name, value in values["args"].items()}
    try:
        return factory(**args)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} ({values['name']}): {error}") from error


def find(kind: str, package: str, name: str) -> Callable[..., Any]:
    """The factory of a module path: "baselines.grpo" is `rl_jax.recipes.baselines.grpo.grpo`.

    Raises:
      ValueError: if there is none; says which there are.
    """
    known = names(package)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"unknown {kind} {name!r}.{hint} Allowed are: {', '.join(known)}.")
    return vars(importlib.import_module(f"{package}.{name}"))[name.rsplit(".", 1)[-1]]


def names(package: str) -> list[str]:
    """Module paths under a package whose module defines a function of its own name, read from the source files."""
    root = importlib.import_module(package)
    found = []
    for module in pkgutil.walk_packages(root.__path__, f"{package}."):
        source = module.module_finder.find_spec(module.name)
        if not module.ispkg and f"\ndef {module.name.rsplit('.', 1)[-1]}(" in source.loader.get_source(module.name):
            found.append(module.name.removeprefix(f"{package}."))
    return found


def check_names(where: str, values: Mapping[str, Any], allowed: tuple[str, ...],
                optional: tuple[str, ...] = ()) -> None:
    """Refuses a section with a field that is not allowed, or without one that is not optional."""
    unknown = sorted(set(values) - set(allowed))
    missing = sorted(set(allowed) - set(values) - set(optional))
    if unknown:
        raise ValueError(f"{where} has no field {', '.join(map(repr, unknown))}; allowed are {', '.join(allowed)}.")
    if missing:
        raise ValueError(f"{where} lacks {', '.join(map(repr, missing))}.")


def _checked(value: Any, kind: Any, where: str) -> Any:
    """The value, if it is of the annotated type; an int is a float, a list a tuple, nothing else is anything else."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is Any or (origin in (int, str, bool, type(None)) and type(value) is origin):
            return value
        if origin is float and type(value) in (int, float) and value == value:  # nan is no number to run with
            return float(value)
        if origin in (tuple, list, Sequence) and isinstance(value, (tuple, list)):
            return tuple(value)
        if origin in (dict, Mapping) and isinstance(value, Mapping):
            return value
    wanted = " or ".join(option.__name__ if isinstance(option, type) else str(option) for option in options)
    raise ValueError(f"{where}={value!r} is of type {type(value).__name__}; allowed is {wanted}.")


def check(experiment: Experiment) -> None:
    """Refuses combinations that each field alone would allow.

    Raises:
      ValueError: naming the fields, what is allowed and what to do.
    """
    run, task = experiment.run, experiment.task
    least = {"checkpoint_every": 1, "keep_last": 1, "keep_best": 0, "validate_every": 0, "validation_prompts": 1,
             "validation_samples": 1, "shown_groups": 0, "workers": 1, "seed": 0}
    for name, bound in least.items():
        _require(vars(run)[name] >= bound, f"config.run.{name}={vars(run)[name]}: must be at least {bound}.")
    _require(all(name in TRACKERS for name in run.trackers),
             f"config.run.trackers={run.trackers}: allowed are {TRACKERS}.")
    _require(not run.validate_every or "validation" in task.splits,
             f"config.run.validate_every={run.validate_every}, but task {task.name!r} has no validation split: "
             "give it one, or set validate_every=0.")
    for index, phase in enumerate(experiment.phases):
        _check_phase(phase, run, task, f"phase {index + 1} of {len(experiment.phases)} ({phase.recipe.name})")
    _require(len({phase.scale.seeds for phase in experiment.phases}) == 1,
             f"scale.seeds differ between phases: {[phase.scale.seeds for phase in experiment.phases]}. "
             "A replica's weights pass from phase to phase: give all phases the same number.")


def _check_phase(phase: Phase, run: Run, task: Task, where: str) -> None:
    scale, recipe = phase.scale, phase.recipe
    for name in ("steps", "prompts_per_step", "microbatches", "steps_per_call", "seeds", "stop_after_skips"):
        _require(vars(scale)[name] >= 1, f"{where}: scale.{name}={vars(scale)[name]}: must be at least 1.")
    pieces = scale.microbatches * recipe.schedule.minibatches
    _require(scale.prompts_per_step % pieces == 0,
             f"{where}: scale.prompts_per_step={scale.prompts_per_step} cannot be cut into "
             f"{recipe.schedule.minibatches} minibatches x {scale.microbatches} microbatches without cutting a group: "
             f"make it a multiple of {pieces}.")
    if recipe.schedule.step_scale is not None:
        pieces = recipe.schedule.minibatches * math.lcm(scale.microbatches, recipe.schedule.step_scale.pieces)
        _require(scale.prompts_per_step % pieces == 0,
                 f"{where}: scale.prompts_per_step={scale.prompts_per_step} cannot be cut into the {pieces} pieces that the "
                 f"gradient's noise is estimated from: make it a multiple of {pieces}.")
    _require(scale.microbatches == 1 or not recipe.indivisible,
             f"{where}: scale.microbatches={scale.microbatches}, and this recipe's loss compares all groups of a batch: "
             "set it to 1.")
    _require(scale.program in PROGRAMS, f"{where}: scale.program={scale.program!r}: allowed are {PROGRAMS}.")
    pure = isinstance(task.verifier, PureVerifier)
    if scale.seeds > 1:
        _require(pure or recipe.rollout is None, f"{where}: scale.seeds={scale.seeds} needs a task with a pure "
                 f"verifier, and {task.name!r} scores on the host: set seeds=1 or take a toy task.")
        _require(not run.validate_every, f"{where}: scale.seeds={scale.seeds} cannot be validated in the run: set "
                 "run.validate_every=0.")
    for name in ("steps", *(() if scale.steps_per_call == 1 else ("checkpoint_every", "validate_every"))):
        value = scale.steps if name == "steps" else vars(run)[name]
        _require(value % scale.steps_per_call == 0, f"{where}: {name}={value} must be a multiple of "
                 f"scale.steps_per_call={scale.steps_per_call}: saving and stopping happen between dispatches.")
    if scale.program == "split":
        _require(recipe.rollout is not None and not pure,
                 f'{where}: scale.program="split" lets the host score while the device draws, and here the host has '
                 'nothing to score: set program="one".')
        _require(recipe.rollout.resample == 0, f'{where}: scale.program="split" cannot replace rejected groups '
                 f'(rollout.resample={recipe.rollout.resample}): set program="one" or resample=0.')
        _require(recipe.rollout.window == 0, f'{where}: scale.program="split" draws a batch before the one before it is '
                 f'learned from, and rollout.window={recipe.rollout.window} goes on with that: set program="one" or '
                 "window=0.")
        _require(scale.steps_per_call == scale.seeds == 1, f'{where}: scale.program="split" works step by step: set '
                 "steps_per_call=1 and seeds=1.")


def _require(fine: bool, message: str) -> None:
    if not fine:
        raise ValueError(message)
