"""Published checkpoints as policies, and policies as checkpoints that other libraries load."""
import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int

from rl_jax import hub
from rl_jax.models import heads, lora, peft, safetensors, weights
from rl_jax.models.families import published
from rl_jax.models.families.family import Path, Tensor
from rl_jax.models.network import Network
from rl_jax.models.shape import DTYPES
from rl_jax.tasks.checkpoint_tokenizer import CheckpointTokenizer
from rl_jax.types import Parameters

# What a checkpoint holds beside its weights, and what an export takes along unchanged.
ACCOMPANYING = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                "added_tokens.json", "chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt")
SCORE = ("score",)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A network with its weights, as a checkpoint holds them.

    Attributes:
      network: the entry points.
      parameters: a nested dict of arrays.
      config: what config.json says; None for a network that was made here.
      tokenizer: the checkpoint's own; None if it has none.
      score: the head of a reward model [1, D]; None for a policy.
      folder: where it was loaded from.
    """

    network: Network
    parameters: Parameters
    config: dict[str, Any] | None = None
    tokenizer: CheckpointTokenizer | None = None
    score: Array | None = None
    folder: pathlib.Path | None = None

    @property
    def graphdef(self) -> nnx.GraphDef:
        """The structure: `nnx.merge(policy.graphdef, policy.parameters)` is the NNX module."""
        return self.network.graphdef

    def states(self, tokens: Int[Array, "B L"]) -> Array:
        """Hidden states [B, L, D] after each token, in the compute dtype."""
        one = jnp.ones(tokens.shape[0], jnp.int32)
        # fed to the network: the first token, as a prompt of that length, and all others
        return self.network.hidden(self.parameters, tokens[:, :1], one, jnp.roll(tokens, -1, axis=1))

    def logits(self, tokens: Int[Array, "B L"]) -> Float32[Array, "B L V"]:
        """Logits of the token that follows each one, in nats; for looking at, as training never makes them."""
        hidden = self.states(tokens)
        flat = self.network.logits(hidden.reshape(-1, hidden.shape[2]), self.network.vocabulary(self.parameters))
        return flat.reshape(*tokens.shape, -1)

    def scores(self, tokens: Int[Array, "B L"], lengths: Int[Array, " B"]) -> Float32[Array, " B"]:
        """A reward model's score of each right-padded text, in its reward units.

        Args:
          lengths: of the texts, in tokens.

        Raises:
          ValueError: if the checkpoint has no such head.
        """
        if self.score is None:
            raise ValueError("this checkpoint has no score head: load a ...ForSequenceClassification with "
                             "num_labels=1.")
        mask = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
        return heads.reward(self.states(tokens), self.score[0], mask)


def load(path_or_id: str | pathlib.Path, *, dtype: str | None = None, mesh: Mesh | None = None,
         **options: Any) -> Policy:
    """The policy of a checkpoint folder as transformers writes it, or of a model id on the Hugging Face hub.

    A folder of adapters as peft writes it gives the policy of its base network with the adapters beside the weights.

    Args:
      path_or_id: a folder with config.json and safetensors files, or "owner/name", which is fetched once.
      dtype: of the parameters, "float32" or "bfloat16"; None keeps each as the checkpoint has it.
      mesh: the devices they are cut over (`models.sharding`); None puts them on the first.
      options: further fields of `Shape`: scan_layers, remat, compute ("float32" unless told).

    Raises:
      ValueError: for a family that is not here, or files that do not fit; names file and tensor.
    """
    _check_dtype(dtype)
    folder = hub.folder(str(path_or_id))
    if (folder / peft.CONFIG).is_file():
        return _with_adapters(folder, dtype=dtype, mesh=mesh, **options)
    config = hub.read_json(folder / "config.json")
    shape, scores = published.shape_of(config, **options), is_reward_model(config)
    # a model that scores texts has no matrix of logits of its own
    network = Network(dataclasses.replace(shape, tied=True) if scores else shape)
    like, places = weights.shapes_of(network), weights.layout(config, network.shape)
    if scores:
        places[SCORE] = Tensor(("score.weight",))
        like = {**like, "score": jax.ShapeDtypeStruct((1, network.shape.width), jnp.float32)}
    found = weights.load(folder, places, like, dtype=dtype, mesh=mesh)
    score = found.pop("score", None)
    tokenizer = CheckpointTokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    return Policy(network, found, config, tokenizer, score, folder)


def _with_adapters(folder: pathlib.Path, **how: Any) -> Policy:
    base = hub.read_json(folder / peft.CONFIG).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder / peft.CONFIG} names no base_model_name_or_path: the adapters' base is not known.")
    beside = folder.parent / base  # as a path, it may be relative to the folder's own place
    policy = load(beside if beside.is_dir() else base, **how)
    places = weights.layout(policy.config, policy.network.shape)
    parameters, adapters = peft.load(folder, policy.parameters, places, how["mesh"])
    network = dataclasses.replace(policy.network, adapters=adapters)
    return dataclasses.replace(policy, network=network, parameters=parameters)


def save_adapters(policy: Policy, path: str | pathlib.Path, base: str) -> None:
    """Writes the policy's adapters alone, as a folder that peft and `load` read.

    Args:
      path: a folder that does not exist yet, or is empty.
      base: path or id of the checkpoint that they belong to.

    Raises:
      ValueError: if the policy has no adapters, or the folder holds something.
    """
    if not lora.there(policy.parameters):
        raise ValueError("the policy has no adapters to write: it was trained whole (scale.train), or they are merged. "
                         "Write it whole with `save`.")
    config = policy.config or published.config_of(policy.network.shape)
    places = weights.layout(config, policy.network.shape)
    with new_folder(path) as folder:
        peft.save(folder, policy.parameters, policy.network.adapters, places, base)


def is_reward_model(config: dict[str, Any]) -> bool:
    """Whether a config.json is of a model that scores texts.

    Raises:
      ValueError: if it gives them several numbers.
    """
    if not any(name.endswith(published.SEQUENCE) for name in config.get("architectures") or ()):
        return False
    labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
    if labels != 1:
        raise ValueError(f"config.json: the model gives each text {labels} numbers; a reward model gives 1 "
                         "(num_labels=1).")
    return True


def save(policy: Policy, path: str | pathlib.Path, *, dtype: str | None = None,
         shard_bytes: int = 5_000_000_000) -> None:
    """Writes a folder that `load`, and transformers, load: config.json, weights, and what accompanied the checkpoint.

    Adapters are merged into the weights. The folder appears under its name only when it is complete.

    Args:
      path: a folder that does not exist yet, or is empty.
      dtype: of the tensors, "float32" or "bfloat16"; None keeps each as it is.
      shard_bytes: bytes of tensors per file; more than that is written as several files with an index.

    Raises:
      ValueError: if the folder holds something, or no published family has the network's features.
    """
    _check_dtype(dtype)
    shape, parameters = policy.network.shape, policy.parameters
    config = dict(policy.config or published.config_of(shape))
    if lora.there(parameters):
        parameters = lora.merged(parameters, policy.network.adapters)
    places: dict[Path, Tensor] = weights.layout(config, shape)
    if policy.score is not None:
        places[SCORE], parameters = Tensor(("score.weight",)), {**parameters, "score": policy.score}
    kind = dtype or str(parameters["embedding"].dtype)
    config |= {name: kind for name in ("dtype", "torch_dtype") if name in config} or {"torch_dtype": kind}
    with new_folder(path) as folder:
        safetensors.write(folder, weights.to_tensors(parameters, places, dtype), shard_bytes)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in ACCOMPANYING if policy.folder is not None else ():
            if (policy.folder / name).is_file():
                shutil.copyfile(policy.folder / name, folder / name)


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: allowed are {sorted(DTYPES)}, or None to keep each tensor's own.")


def check_new(path: str | pathlib.Path) -> None:
    """Whether a folder of this name can be made.

    Raises:
      ValueError: if there is something of that name.
    """
    path = pathlib.Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not empty: give a new folder.")


@contextlib.contextmanager
def new_folder(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into, which gets its name when all is written, and is removed if anything goes wrong.

    Raises:
      ValueError: if there is something of that name.
    """
    check_new(path)
    path = pathlib.Path(path)
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if path.exists():
            path.rmdir()
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
