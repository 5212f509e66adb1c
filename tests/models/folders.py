"""Checkpoint folders made from the golden ones, as they are or with something wrong."""
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors import numpy as library
from safetensors import safe_open

GOLDEN = pathlib.Path(__file__).parent / "golden"
Tensors = dict[str, np.ndarray]


def copied(name: str, to: pathlib.Path) -> pathlib.Path:
    """A golden folder of one's own, without what transformers said about it."""
    return pathlib.Path(shutil.copytree(GOLDEN / name, to / name, ignore=shutil.ignore_patterns("expected.npz")))


def tensors(folder: pathlib.Path) -> Tensors:
    """Every tensor by name, as the library reads them."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "numpy") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
    return found


def rewritten(folder: pathlib.Path, change: Callable[[Tensors], Any], name: str = "model.safetensors") -> pathlib.Path:
    """One of the files with its tensors changed in place; returns the folder."""
    with safe_open(folder / name, "numpy") as opened:
        held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(held)
    library.save_file(held, folder / name, metadata={"format": "pt"})
    return folder


def edited(folder: pathlib.Path, name: str = "config.json", **fields: Any) -> pathlib.Path:
    """A JSON file with other fields; Ellipsis takes one away. Returns the folder."""
    held = json.loads((folder / name).read_text()) | fields
    (folder / name).write_text(json.dumps({key: value for key, value in held.items() if value is not ...}))
    return folder


def header_of(file: pathlib.Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and the bytes behind it."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:8 + length]), raw[8 + length:]


def with_header(file: pathlib.Path, header: Any, data: bytes) -> None:
    """Writes a safetensors file of these parts; a header that is bytes is written as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
