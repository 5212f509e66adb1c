"""A checkpoint folder of safetensors files: opened, checked and read tensor by tensor, and written."""
import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
BYTES = {"F32": 4, "BF16": 2, "F16": 2}
CHUNK_BYTES = 64 << 20
Slices = tuple[slice, ...]


class Entry(NamedTuple):
    """Where a tensor is.

    Attributes:
      file: that holds it.
      shape, dtype: as the file says; dtype in safetensors' names ("BF16").
      begin, end: its bytes, counted from the end of the header.
    """

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str
    begin: int
    end: int


class Folder:
    """The tensors of a checkpoint folder, whole: every file that the index names is there and as long as it says."""

    def __init__(self, path: pathlib.Path, *, single: str = SINGLE):
        """Reads the headers; no tensor.

        Args:
          single: name of the file, where there is one without an index.

        Raises:
          ValueError: naming the file, and the tensor, for what is missing, cut off or unreadable.
        """
        self.path, self._single = path, single
        self.entries: dict[str, Entry] = {}
        for file, names in self._files().items():
            found = _header(file)
            if names is not None:
                missing = sorted(names - found.keys())
                if missing:
                    raise ValueError(f"{file} lacks {_some(missing)}, which {INDEX} says it holds. Fetch the file "
                                     "again.")
            self.entries |= found
        self._open: tuple[pathlib.Path, Any] | None = None

    def _files(self) -> dict[pathlib.Path, set[str] | None]:
        """Every file with the names that the index gives it; None without an index."""
        index = self.path / INDEX
        if not index.is_file():
            if not (self.path / self._single).is_file():
                there = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else "no such folder"
                raise ValueError(f"{self.path} has neither {self._single} nor {INDEX} (there is: {there}). Weights "
                                 "must be in safetensors files; others are converted by the library that wrote them.")
            return {self.path / self._single: None}
        try:
            files: dict[pathlib.Path, set[str]] = {}
            for name, file in json.loads(index.read_text())["weight_map"].items():
                files.setdefault(self.path / file, set()).add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} cannot be read: {error!r}. Fetch the file again.") from error
        for file, names in files.items():
            if not file.is_file():
                raise ValueError(f"the shard {file} is missing; {INDEX} says that it holds {_some(sorted(names))}.")
        return dict(sorted(files.items()))

    def check(self, wanted: Mapping[str, tuple[int, ...]], ignored: Iterable[str] = (), *,
              config: str = "config.json") -> None:
        """Whether the folder holds these tensors, in these shapes and a dtype that can be read, and no others.

        Args:
          wanted: shapes by name.
          ignored: names, or ends of names, that may be there and are not read.
          config: the file that asks for them.

        Raises:
          ValueError: naming file and tensor, with what was found and what was expected.
        """
        missing = sorted(wanted.keys() - self.entries.keys())
        if missing:
            raise ValueError(f"{self.path} lacks {_some(missing)}, which its {config} asks for.")
        extra = sorted(name for name in self.entries.keys() - wanted.keys() if not name.endswith(tuple(ignored)))
        if extra:
            raise ValueError(f"{self.entries[extra[0]].file} holds {_some(extra)}, which its {config} does not ask "
                             "for: this is another model than it says.")
        for name, shape in wanted.items():
            entry = self.entries[name]
            if entry.shape != shape:
                raise ValueError(f"{entry.file}: tensor {name!r} has the shape {entry.shape}, and {config} asks for "
                                 f"{shape}.")
            if entry.dtype not in DTYPES:
                raise ValueError(f"{entry.file}: tensor {name!r} is of type {entry.dtype}: allowed are "
                                 f"{sorted(DTYPES)}. Quantised checkpoints must be converted first.")

    def read(self, name: str, where: Slices, dtype: np.dtype) -> np.ndarray:
        """A part of a tensor, converted; the file is read in pieces, so that nothing but the result takes memory.

        Args:
          where: a slice per axis.
        """
        entry = self.entries[name]
        view = self._file(entry.file).get_slice(name)
        starts, stops, _ = zip(*(s.indices(size) for s, size in zip(where, entry.shape, strict=True)), strict=True)
        out = np.empty([b - a for a, b in zip(starts, stops, strict=True)], dtype)
        rest = tuple(slice(a, b) for a, b in zip(starts[1:], stops[1:], strict=True))
        step = max(1, CHUNK_BYTES // max(1, out[:1].nbytes))
        for row in range(starts[0], stops[0], step):
            until = min(row + step, stops[0])
            out[row - starts[0]:until - starts[0]] = view[(slice(row, until), *rest)]
        return out

    def _file(self, file: pathlib.Path) -> Any:
        """The open file; one at a time, so that what was read of the others can leave memory."""
        if self._open is None or self._open[0] != file:
            self.close()
            library = _library()
            try:
                self._open = file, library.safe_open(file, framework="numpy")
            except library.SafetensorError as error:
                raise ValueError(f"{file} cannot be read ({error}). Fetch the file again.") from error
        return self._open[1]

    def close(self) -> None:
        """Lets go of the open file."""
        self._open = None


def _header(file: pathlib.Path) -> dict[str, Entry]:
    """The tensors of a file by name.

    The library refuses a file that was cut off, too, but cannot say which tensor it lacks.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError(f"its header should have {length} bytes, and the whole file has {size}")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        found = {name: Entry(file, tuple(one["shape"]), one["dtype"], *one["data_offsets"])
                 for name, one in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no safetensors file, or its header is damaged ({error}). Fetch the file "
                         "again.") from error
    for name, entry in found.items():
        held, needed = entry.end - entry.begin, BYTES.get(entry.dtype, 0) * math.prod(entry.shape)
        if entry.begin < 0 or held < 0 or entry.dtype in DTYPES and held != needed:
            raise ValueError(f"{file}: the header gives tensor {name!r} {held} bytes, and {entry.dtype} of the shape "
                             f"{entry.shape} takes {needed}. Fetch the file again.")
    cut_off = sorted((entry.end, name) for name, entry in found.items() if entry.end > size - 8 - length)
    if cut_off:
        end, name = cut_off[0]
        raise ValueError(f"{file} is cut off: tensor {name!r} ends at byte {8 + length + end}, and the file has "
                         f"{size}. Fetch the file again.")
    return found


def write(path: pathlib.Path, tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int, *,
          single: str = SINGLE) -> None:
    """The tensors as one file, or as several with an index, none larger than `shard_bytes` but for a larger tensor.

    Args:
      path: an existing folder.
      tensors: names and arrays, made one after the other; those of one file are held at a time.
      shard_bytes: bytes of tensors per file.
      single: name of the file, if there is only one.
    """
    save_file = _library("numpy").save_file
    metadata, files, total = {"format": "pt"}, [], 0
    for number, shard in enumerate(_shards(tensors, shard_bytes), start=1):
        file = path / f"shard-{number}"
        save_file({name: np.ascontiguousarray(a) for name, a in shard.items()}, file, metadata=metadata)
        files.append((file, list(shard)))
        total += sum(a.nbytes for a in shard.values())
    if len(files) == 1:
        files[0][0].rename(path / single)
        return
    where = {}
    for number, (file, names) in enumerate(files, start=1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file.rename(path / final)
        where |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    held = 0
    for name, array in tensors:
        if shard and held + array.nbytes > shard_bytes:
            yield shard
            shard, held = {}, 0
        shard[name] = array
        held += array.nbytes
    yield shard


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"


def _library(part: str = "") -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(f"published weights need safetensors ({error}): pip install rl_jax[hf].") from error
    return safetensors.numpy if part else safetensors
