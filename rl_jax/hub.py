"""Checkpoints of the Hugging Face hub as local folders."""
import json
import pathlib
import re
from typing import Any

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
INSTALL = "pip install rl_jax[hf]"
NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\S+))?")


def folder(path_or_id: str) -> pathlib.Path:
    """The folder of a checkpoint: weights, configuration, tokenizer and chat template.

    A folder that exists is itself and needs nothing. The files of a repository on the hub are
    fetched once and kept where huggingface-hub keeps them.

    Args:
      path_or_id: a folder, or "owner/name", or "owner/name@revision" for a branch, tag or commit.

    Raises:
      ValueError: if it is neither, or cannot be fetched; says what to do.
      ImportError: if it must be fetched and huggingface-hub is not installed.
    """
    path = pathlib.Path(path_or_id).expanduser()
    if path_or_id and path.is_dir():
        return path
    name = NAME.fullmatch(path_or_id)
    if name is None:
        raise ValueError(f"{path_or_id!r} is neither a folder that exists nor a repository of the Hugging Face hub: "
                         "give the path of a checkpoint's folder, or \"owner/name\" or \"owner/name@revision\".")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ImportError(f"fetching {path_or_id!r} needs huggingface-hub ({error}): {INSTALL}, or give the path of a "
                          "folder with the checkpoint.") from error
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(
            name["repository"], revision=name["revision"], allow_patterns=list(PATTERNS)))
    except errors.GatedRepoError as error:
        wrong = (f"{name['repository']} is gated: accept its terms on its page while logged in, then `hf auth login` "
                 f"here or set HF_TOKEN ({error})")
    except errors.RevisionNotFoundError as error:
        wrong = f"{name['repository']} has no revision {name['revision']!r} ({error})"
    except errors.RepositoryNotFoundError as error:
        wrong = ("there is no such folder, and the hub knows no such repository or lets only those see it who are "
                 f"logged in (`hf auth login`, or set HF_TOKEN): {error}")
    except errors.HFValidationError as error:
        wrong = f"there is no such folder, and the hub has no such names: {error}"
    except OSError as error:  # no network, switched off by HF_HUB_OFFLINE, a full disk
        wrong = (f"there is no such folder, and it is not in the cache and cannot be fetched ({error}). Fetch it where "
                 f"there is a network (`hf download {name['repository']}`) and give the folder's path")
    raise ValueError(f"{path_or_id!r}: {wrong}.")


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in one of a checkpoint's JSON files.

    Raises:
      ValueError: if the file is missing or holds no JSON object; names it.
    """
    if not file.is_file():
        raise ValueError(f"there is no {file}: give the folder of a checkpoint as transformers writes it.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}: expected an object.")
    return found
