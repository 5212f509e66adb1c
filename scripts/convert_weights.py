"""Published checkpoints checked and rewritten, and the policies of our runs as checkpoints that other libraries load.

python scripts/convert_weights.py import --source=Qwen/Qwen3-0.6B --target=checkpoints/qwen3 --dtype=bfloat16
python scripts/convert_weights.py export --workdir=runs/a --target=exported --dtype=bfloat16    # for transformers
python scripts/convert_weights.py export --workdir=runs/lora --target=adapters --adapters       # for peft
"""
import pathlib
import sys
import time

from absl import app, flags, logging

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
_SOURCE = flags.DEFINE_string("source", None, "import: a checkpoint's folder, or owner/name on the Hugging Face hub.")
_WORKDIR = flags.DEFINE_string("workdir", None, "export: the run whose policy is written.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best",
                                  "export: best (by validation), latest, a step, or a phase's name.")
_ADAPTERS = flags.DEFINE_bool("adapters", False, "export: the adapters alone, not merged into the weights.")
_TARGET = flags.DEFINE_string("target", None, "The folder that is made; it must not exist, or be empty.", required=True)
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"],
                           "Of what is written; without it each tensor keeps its own.")
_SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "Gigabytes of tensors per file.", lower_bound=1e-6)
COMMANDS = ("import", "export")


def main(arguments: list[str]) -> None:
    """Converts one way or the other."""
    logging.set_verbosity(logging.WARNING)
    if len(arguments) != 2 or arguments[1] not in COMMANDS:
        sys.exit(f"usage: convert_weights.py {{{','.join(COMMANDS)}}} --target= [--source= | --workdir=]; "
                 f"got {arguments[1:]}")
    try:
        _check(arguments[1])
        began = time.monotonic()
        count, dtypes = import_published() if arguments[1] == "import" else export_run()
    except (ValueError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    seconds = time.monotonic() - began
    size = sum(file.stat().st_size for file in pathlib.Path(_TARGET.value).glob("*.safetensors"))
    print(f"{_TARGET.value}: {count:,} parameters, {'/'.join(dtypes)}, {size:,} bytes, {seconds:.1f} s")


def _check(command: str) -> None:
    """Refuses flags that the command does not read, and asks for those that it needs."""
    needed, others = {"import": ("source", ("workdir", "adapters")), "export": ("workdir", ("source",))}[command]
    given = {"source": _SOURCE.value, "workdir": _WORKDIR.value, "adapters": _ADAPTERS.value}
    if not given[needed]:
        raise ValueError(f"{command} needs --{needed}.")
    unread = [f"--{name}" for name in others if given[name]]
    if unread:
        raise ValueError(f"{command} does not read {unread}.")
    if _ADAPTERS.value and _DTYPE.value == "bfloat16":
        raise ValueError("--adapters are written as they were trained, in float32: leave --dtype away.")
    from rl_jax.models import pretrained

    pretrained.check_new(_TARGET.value)


def import_published() -> tuple[int, list[str]]:
    """Loads a published checkpoint, which checks it, and writes it; its parameters' number and types."""
    from rl_jax.models import pretrained

    policy = pretrained.load(_SOURCE.value, dtype=_DTYPE.value)
    pretrained.save(policy, _TARGET.value, dtype=_DTYPE.value, shard_bytes=round(_SHARD_GB.value * 1e9))
    return _numbers(policy.parameters)


def export_run() -> tuple[int, list[str]]:
    """Writes the policy of a run, or its adapters; their parameters' number and types."""
    from rl_jax.models import lora, pretrained, trainable
    from rl_jax.train import trained

    found = trained.load(_WORKDIR.value, _CHECKPOINT.value)
    policy = _as_checkpoint(found)
    print(f"{_WORKDIR.value}, step {found.step}")
    if _ADAPTERS.value:
        pretrained.save_adapters(policy, _TARGET.value, _base(found))
        return _numbers(trainable.split(policy.parameters, trainable.LORA)[0])
    pretrained.save(policy, _TARGET.value, dtype=_DTYPE.value, shard_bytes=round(_SHARD_GB.value * 1e9))
    if policy.tokenizer is None:
        print(f"config.json has the ids that end a text ({policy.config['eos_token_id']}); the task's tokenizer is "
              "none that other libraries read, and is not written.")
    return _numbers(lora.without(policy.parameters))


def _as_checkpoint(found):
    """A run's policy with the files of the checkpoint that it started from, or with a config of its own."""
    from rl_jax import hub
    from rl_jax.models import pretrained, weights
    from rl_jax.models.families import published
    from rl_jax.tasks.checkpoint_tokenizer import CheckpointTokenizer

    start, tokenizer = found.experiment.pretrained, found.experiment.task.tokenizer
    if start is None:
        config = {**published.config_of(found.network.shape), "bos_token_id": None, "pad_token_id": tokenizer.pad_id,
                  "eos_token_id": list(tokenizer.stop_ids)}
        return pretrained.Policy(found.network, found.policy, config)
    folder = hub.folder(start.path)
    return pretrained.Policy(found.network, found.policy, hub.read_json(folder / "config.json"),
                             CheckpointTokenizer(folder), folder=folder)


def _base(found) -> str:
    """What a run's adapters are to be put beside.

    Raises:
      ValueError: if that is no published checkpoint.
    """
    from rl_jax.train import session

    start = found.experiment.pretrained
    if start is None:
        raise ValueError("--adapters: the run did not start from a published checkpoint, so there is nothing that they "
                         "could be put beside. Leave --adapters away to write weights that they are merged into.")
    if found.step > session.phase_ends(found.experiment)[0]:
        raise ValueError(f"--adapters: phases before step {found.step} changed the weights that the adapters belong "
                         "to. Leave --adapters away to write weights that they are merged into.")
    return start.path


def _numbers(parameters) -> tuple[int, list[str]]:
    """How many numbers there are, and the types that they are written in."""
    import jax

    from rl_jax.models import shape

    types = {str(leaf.dtype) for leaf in jax.tree.leaves(parameters)} if _DTYPE.value is None else {_DTYPE.value}
    return shape.parameter_count(parameters), sorted(types)


if __name__ == "__main__":
    app.run(main)
