"""Checkpoint: a plain Hugging Face folder, written whole or not at all.

The folder is filled under a temporary name beside its place, and renamed when it is complete and verified. Weights are
written one tensor at a time. This works because a safetensors file is a header, for which shapes and dtypes suffice,
followed by the tensors' bytes.
"""

import json
import re
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError

from evomerge.errors import InputError, WorkFailed
from evomerge.merging.sources.tensor_files import FLOATS
from evomerge.merging.sources.weights import INDEX, WEIGHTS

DTYPES = {getattr(torch, name): stored for stored, name in FLOATS.items()} | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
SIZES = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "K": 1e3, "M": 1e6, "B": 1e9}
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def check_writable(out: Path) -> None:
    """Raises InputError where a new folder `out` cannot be made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not empty; choose a new folder or remove this one.")
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir():
        raise InputError(f"{out}: {parent} is a file; choose a path inside a folder.")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(f"{out}: cannot write there ({error.strerror}); choose a writable folder.") from None


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends. Where the block fails, nothing is left.

    Raises InputError where `out` cannot be made, and WorkFailed where writing fails.
    """
    check_writable(out)
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    done = False
    try:
        yield staging
        for file in staging.iterdir():
            file.chmod(0o644)
        staging.chmod(0o755)
        if out.exists():
            out.rmdir()
        staging.rename(out)
        done = True
    except (OSError, SafetensorError) as error:
        raise WorkFailed(
            f"{out}: the checkpoint could not be written ({error}); free some space and try again."
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):  # another process may use the folders by now
            for parent in [] if done else made:
                parent.rmdir()


def parse_size(text: str, itemsize: int) -> int:
    """A size in bytes.

    text: a size such as `5GB`, or a number of parameters such as `5B`.
    itemsize: bytes of one parameter.
    Raises InputError for any other text.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB|TB|K|M|B)", text.strip().upper())
    size = float(match[1]) * SIZES[match[2]] * (1 if len(match[2]) == 2 else itemsize) if match else 0
    if size < 1:
        raise InputError(f"--max-shard-size is '{text}'; use a size such as 5GB or 500MB, or parameters such as 5B.")
    return int(size)


def write_weights(folder: Path, layout: Layout, tensors: Iterable[tuple[str, torch.Tensor]], shard_size: int) -> None:
    """Writes tensors into the safetensors files of a checkpoint, with an index where there are several files.

    folder: where the files are written.
    layout: the shape and dtype of each tensor, by name.
    tensors: names and values, in the layout's order. A tensor is asked for when the one before it has been written.
    shard_size: the largest size of a file in bytes; a larger tensor has a file of its own.
    """
    shards = _shards(layout, shard_size)
    width = max(5, len(str(len(shards))))
    files = [f"model-{index + 1:0{width}}-of-{len(shards):0{width}}.safetensors" for index in range(len(shards))]
    files = files if len(shards) > 1 else [WEIGHTS]
    coming = iter(tensors)
    for file, names in zip(files, shards, strict=True):
        with (folder / file).open("wb") as stream:
            _write_header(stream, {name: layout[name] for name in names})
            for expected in names:
                name, tensor = next(coming)
                if name != expected or (tuple(tensor.shape), tensor.dtype) != layout[name]:
                    raise ValueError(f"got {name} of {tensor.dtype} {list(tensor.shape)} where {expected} was expected")
                stream.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
                del tensor  # before the next is made
    if len(shards) > 1:
        total = sum(_bytes(*layout[name]) for name in layout)
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _shards(layout: Layout, shard_size: int) -> list[list[str]]:
    """The names of the tensors in each file, in order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in layout.items():
        size = _bytes(*tensor)
        if shards[-1] and filled + size > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_header(stream: IO[bytes], layout: Layout) -> None:
    """Writes a safetensors header: 8 bytes of length, then JSON, padded so that the tensors begin at a multiple of
    8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in layout.items():
        start, end = end, end + _bytes(shape, dtype)
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)
