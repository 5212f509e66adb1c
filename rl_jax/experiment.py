"""From a config of plain values to a typed, checked experiment: every mistake is found before anything compiles."""
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_collections

from rl_jax import hub
from rl_jax.ahead import Asynchronous
from rl_jax.batching import Batching
from rl_jax.learner.optimiser import Optimiser
from rl_jax.models import mesh as meshes
from rl_jax.models import quantised, trainable
from rl_jax.models.families import published
from rl_jax.models.lora import Adapters
from rl_jax.models.shape import DTYPES, Shape
from rl_jax.recipe import Recipe
from rl_jax.sections import check_names, named, named_section, plain, typed
from rl_jax.tasks.checkpoint_tokenizer import CheckpointTokenizer
from rl_jax.tasks.task import PureVerifier, Task

SECTIONS = ("task", "model", "recipe", "optimiser", "scale", "run", "mesh", "asynchronous", "batching", "before")
PLAIN_SIZES = ("width", "layers", "heads", "key_heads", "head_size", "inner", "scan_layers", "remat", "compute")
PADDED = "vocabulary_at_least"
PROGRAMS = ("one", "split", "async")
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
      program: "one" program per step, "split" in two, where the host scores one batch while the device
        draws the next (off-policy by one step), or "async", drawn ahead as `Asynchronous` says.
      memory_limit_gib: refuse to start if the compiled step needs more; 0 takes the device's own limit.
      train: "all" weights, "lora" (adapters beside frozen weights, fresh ones in each phase, merged into the weights
        at its end), or a regular expression that is searched in the parameters' names; only what is trained has an
        optimiser state.
      lora: the adapters' numbers; read where train="lora".
      draw_with: "" draws answers with the weights themselves, "int8" or "fp8" with a copy in 8 bits.
    """

    steps: int = 100
    prompts_per_step: int = 32
    microbatches: int = 1
    steps_per_call: int = 1
    seeds: int = 1
    program: str = "one"
    memory_limit_gib: float = 0.0
    train: str = trainable.ALL
    lora: Adapters = Adapters()
    draw_with: str = ""


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A published checkpoint to start from.

    Attributes:
      path: its folder, or "owner/name" on the Hugging Face hub.
      dtype: of the weights that are held, "float32" or "bfloat16"; what is trained is best kept in float32.
      compute, remat, scan_layers: see `models.shape.Shape`.
    """

    path: str
    dtype: str = "float32"
    compute: str = "bfloat16"
    remat: bool = True
    scan_layers: bool = False

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"model dtype={self.dtype!r}: allowed are {sorted(DTYPES)}.")


@dataclasses.dataclass(frozen=True)
class Phase:
    """One recipe with its optimiser and scale."""

    recipe: Recipe
    optimiser: Optimiser
    scale: Scale

    @property
    def adapters(self) -> Adapters | None:
        """The numbers of the adapters that this phase trains, if it trains any."""
        return self.scale.lora if self.scale.train == trainable.LORA else None

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
    """A checked experiment: the task, the network's shape, the phases in order, and what surrounds them.

    `pretrained` is the checkpoint that the first phase starts from; None: fresh weights. `mesh` says how many devices cut
    batch and weights, `asynchronous` what is read where a phase draws ahead, `batching` the shapes of drawing and learning.
    """

    task: Task
    shape: Shape
    phases: tuple[Phase, ...]
    run: Run
    pretrained: Pretrained | None = None
    mesh: meshes.Sizes = meshes.Sizes()
    asynchronous: Asynchronous = Asynchronous()
    batching: Batching = Batching()


def recipe_section(name: str, **overrides: Any) -> ml_collections.ConfigDict:
    """The config section of a recipe, its arguments filled from the factory's signature.

    Args:
      name: module path under `rl_jax.recipes`, such as "baselines.grpo".
      overrides: arguments that differ from the paper's defaults.
    """
    return named_section("recipe", "rl_jax.recipes", name, overrides)


def task_section(name: str, **overrides: Any) -> ml_collections.ConfigDict:
    """The config section of a task, its arguments filled from the factory's signature.

    Args:
      name: module path under `rl_jax.tasks`, such as "toys.addmod".
      overrides: arguments that differ from the defaults.
    """
    return named_section("task", "rl_jax.tasks", name, overrides)


def model_section(**overrides: Any) -> ml_collections.ConfigDict:
    """The config section of the network; its vocabulary comes from the task's tokenizer.

    Args:
      overrides: fields of `Shape` that differ from the defaults, and `vocabulary_at_least`: rows of the embedding for
        a plan (train.py --plan), where the task's tokenizer has fewer than the network that is planned for.
    """
    values = {f.name: f.default for f in dataclasses.fields(Shape) if f.name != "vocabulary"}
    values |= {PADDED: overrides[PADDED]} if PADDED in overrides else {}
    unknown = set(overrides) - set(values)
    if unknown:
        raise ValueError(f"model has no {sorted(unknown)}; allowed are {sorted(values)}.")
    values |= overrides
    plain_sizes = {name: values.pop(name) for name in PLAIN_SIZES}
    return ml_collections.ConfigDict({**plain_sizes, "features": values})


def pretrained_section(path: str, **overrides: Any) -> ml_collections.ConfigDict:
    """The config section of a network that starts from a published checkpoint.

    Args:
      path: its folder, or "owner/name" on the Hugging Face hub.
      overrides: fields of `Pretrained` that differ from the defaults.
    """
    return section(Pretrained, path=path, **overrides)


def section(cls: type, **overrides: Any) -> ml_collections.ConfigDict:
    """The config section of a dataclass of plain values, such as `Optimiser`, `Scale` or `Run`, defaults filled in."""
    return ml_collections.ConfigDict(dataclasses.asdict(typed(cls, overrides, cls.__name__)))


def parse(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Experiment:
    """Builds the experiment that a config describes.

    Raises:
      ValueError: naming the field, what was given, what is allowed and what to do.
    """
    config = plain(config)
    check_names("config", config, SECTIONS, optional=("before", "mesh", "asynchronous", "batching"))
    run = typed(Run, config["run"], "config.run")
    task = named("task", "rl_jax.tasks", config["task"], "config.task")
    main = phase({name: config[name] for name in ("recipe", "optimiser", "scale")}, "config")
    experiment = Experiment(task=task, shape=shape(config["model"], task), phases=(*before(config), main), run=run,
                            pretrained=pretrained(config["model"]),
                            mesh=typed(meshes.Sizes, config.get("mesh", {}), "config.mesh"),
                            asynchronous=typed(Asynchronous, config.get("asynchronous", {}), "config.asynchronous"),
                            batching=typed(Batching, config.get("batching", {}), "config.batching"))
    check(experiment)
    return experiment


def pretrained(values: Mapping[str, Any]) -> Pretrained | None:
    """The checkpoint that a model section names, if it names one."""
    return typed(Pretrained, values, "config.model") if "path" in values else None


def shape(values: Mapping[str, Any], task: Task) -> Shape:
    """The network's shape from its section, plain values.

    The vocabulary is that of the task's tokenizer, or of the checkpoint, whose tokenizer the task must then have.

    Raises:
      ValueError: for a checkpoint whose family is not here, or whose tokenizer is not the task's.
    """
    start = pretrained(values)
    if start is None:
        features = dict(values.get("features", {}))
        rows = max(task.tokenizer.size, features.pop(PADDED, 0))
        rest = {name: value for name, value in values.items() if name != "features"}
        return typed(Shape, {**rest, **features, "vocabulary": rows}, "config.model")
    folder = hub.folder(start.path)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"config.model.path={start.path!r}: the checkpoint has no tokenizer.json, so what its token ids "
                         "mean is not known. Put the tokenizer's files beside its weights.")
    own = CheckpointTokenizer(folder)
    if own.fingerprint != task.tokenizer.fingerprint:
        raise ValueError(f"config.model.path={start.path!r} has the tokenizer {own.fingerprint}, and the task's is "
                         f"{task.tokenizer.fingerprint}: set task.args.tokenizer to the model's path.")
    found = published.shape_of(hub.read_json(folder / "config.json"), compute=start.compute, remat=start.remat,
                               scan_layers=start.scan_layers)
    if own.size > found.vocabulary:
        raise ValueError(f"config.model.path={start.path!r}: its tokenizer has {own.size} ids and its embedding "
                         f"{found.vocabulary} rows: these are files of two models.")
    return found


def before(config: Mapping[str, Any]) -> tuple[Phase, ...]:
    """The phases that precede the main one, of a config of plain values."""
    return tuple(phase(one, f"config.before[{i}]") for i, one in enumerate(config.get("before", ())))


def phase(values: Mapping[str, Any], where: str) -> Phase:
    """The phase of three sections, plain values; errors say `where` it stands."""
    check_names(where, values, ("recipe", "optimiser", "scale"))
    return Phase(recipe=named("recipe", "rl_jax.recipes", values["recipe"], f"{where}.recipe"),
                 optimiser=typed(Optimiser, values["optimiser"], f"{where}.optimiser"),
                 scale=typed(Scale, values["scale"], f"{where}.scale"))


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
    _check_asynchronous(experiment)
    _check_batching(experiment)
    for index, phase in enumerate(experiment.phases):
        _check_mesh(phase, experiment, f"phase {index + 1} of {len(experiment.phases)} ({phase.recipe.name})")
        _check_phase(phase, run, task, f"phase {index + 1} of {len(experiment.phases)} ({phase.recipe.name})")
    _require(len({phase.scale.seeds for phase in experiment.phases}) == 1,
             f"scale.seeds differ between phases: {[phase.scale.seeds for phase in experiment.phases]}. "
             "A replica's weights pass from phase to phase: give all phases the same number.")


def _check_mesh(phase: Phase, experiment: Experiment, where: str) -> None:
    sizes, scale, shape = experiment.mesh, phase.scale, experiment.shape
    if sizes.devices == 1:
        return
    pieces = sizes.rows * scale.microbatches * phase.recipe.schedule.minibatches
    _require(scale.prompts_per_step % pieces == 0,
             f"{where}: scale.prompts_per_step={scale.prompts_per_step} cannot be cut over the {sizes.rows} devices of data, "
             f"fsdp and expert in {pieces // sizes.rows} pieces: make it a multiple of {pieces}.")
    _require(scale.seeds == 1, f"{where}: scale.seeds={scale.seeds}: replicas are trained on one device: set "
             "every axis of config.mesh to 1, or seeds=1.")
    rows = scale.prompts_per_step * phase.recipe.group_size
    on_host = phase.recipe.rollout is not None and not isinstance(experiment.task.verifier, PureVerifier)
    _require(not on_host or rows % sizes.devices == 0,
             f"{where}: {rows} answers per step cannot be dealt to the verifiers of {sizes.devices} devices: make "
             f"scale.prompts_per_step x group_size a multiple of {sizes.devices}.")
    for name, value in (("key_heads", shape.key_heads), ("inner", shape.inner)):
        _require(value % sizes.tensor == 0, f"config.mesh.tensor={sizes.tensor} does not divide the network's {name}="
                 f"{value}: take a divisor.")


def _check_asynchronous(experiment: Experiment) -> None:
    numbers, sampler, shape = experiment.asynchronous, experiment.asynchronous.sampler, experiment.shape
    ahead = [phase for phase in experiment.phases if phase.scale.program == "async"]
    _require(bool(ahead) or numbers == Asynchronous(), "config.asynchronous is read by phases with "
             'scale.program="async", and there is none: set that, or leave the section out.')
    if sampler is None:
        return
    for name, value in (("key_heads", shape.key_heads), ("inner", shape.inner)):
        _require(value % sampler.tensor == 0, f"config.asynchronous.sampler_tensor={sampler.tensor} does not divide the "
                 f"network's {name}={value}: take a divisor.")
    for phase in ahead:
        _require(phase.scale.prompts_per_step % sampler.rows == 0,
                 f"scale.prompts_per_step={phase.scale.prompts_per_step} cannot be cut over the {sampler.rows} devices of the "
                 f"sampler that cut the batch: make it a multiple of {sampler.rows}.")


def _check_batching(experiment: Experiment) -> None:
    batching, phases, devices = experiment.batching, experiment.phases, experiment.mesh.devices
    drawing = [(phase.recipe.name, phase.recipe.rollout.window, phase.scale.prompts_per_step * phase.recipe.group_size)
               for phase in phases if phase.recipe.rollout is not None]
    batching.check_slots(drawing, max(devices, (experiment.asynchronous.sampler or meshes.Sizes()).devices))
    batching.check_lengths(experiment.task.completion_length, [phase.recipe.group_size for phase in phases],
                           [phase.scale.seeds for phase in phases], devices)


def _check_program(phase: Phase, where: str) -> None:
    """That a program which draws a batch before the one before it is learned from finds all it needs."""
    scale, rollout = phase.scale, phase.recipe.rollout
    name = f'{where}: scale.program="{scale.program}"'
    _require(rollout is not None, f'{name} draws answers, and this recipe learns from given ones: set program="one".')
    _require(rollout.resample == 0, f'{name} cannot replace rejected groups (rollout.resample={rollout.resample}): set '
             'program="one" or resample=0.')
    _require(rollout.window == 0, f'{name} draws a batch before the one before it is learned from, and rollout.window='
             f'{rollout.window} goes on with that: set program="one" or window=0.')
    _require(scale.steps_per_call == scale.seeds == 1, f"{name} works step by step: set steps_per_call=1 and seeds=1.")
    _require(scale.program != "async" or rollout.replay == 0, f"{name} bounds the age of what is learned from, and "
             f'rollout.replay={rollout.replay} keeps it for longer: set program="one" or replay=0.')


def _check_phase(phase: Phase, run: Run, task: Task, where: str) -> None:
    scale, recipe = phase.scale, phase.recipe
    for name in ("steps", "prompts_per_step", "microbatches", "steps_per_call", "seeds"):
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
    if scale.draw_with:
        _require(recipe.rollout is not None, f"{where}: scale.draw_with={scale.draw_with!r}, and this recipe draws no "
                 'answers: set it to "".')
        quantised.check(scale.draw_with)
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
    if scale.program != "one":
        _check_program(phase, where)


def _require(fine: bool, message: str) -> None:
    if not fine:
        raise ValueError(message)
