"""Tensors in safetensors files: what the header says of them, and their values, read one tensor at a time."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import InputError

if TYPE_CHECKING:
    import torch

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a tensor lies in another one.

    tensor: the name of the other tensor.
    shape: the shape of the piece.
    strides: its strides, counted in elements of the other tensor.
    offset: where its first element lies in the other tensor.
    whole: whether it is the other tensor itself.
    """

    tensor: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    whole: bool

    def of(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """The piece as a view of a contiguous tensor; the tensor itself where the piece is the whole of it."""
        if self.whole:
            return tensor
        return tensor.detach().as_strided(self.shape, self.strides, tensor.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is, without its values.

    file: the safetensors file.
    dtype: as safetensors writes it, such as `BF16`.
    shape: the tensor's shape.
    stored: the name in the file.
    piece: which piece of the stored tensor it is; None where it is all of it.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    stored: str
    piece: Piece | None = None


def torch_dtypes(table: Mapping[str, TensorInfo]) -> list[str]:
    """What torch calls the dtypes of tensors."""
    return [FLOATS[info.dtype] for info in table.values()]


def parameter_count(table: Mapping[str, TensorInfo]) -> int:
    """How many elements all tensors have."""
    return sum(math.prod(info.shape) for info in table.values())


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name, from its header: 8 bytes of length, then JSON.

    Raises InputError where the file is invalid, or has another size than its header says.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > 100_000_000:
                raise ValueError("its header is longer than 100 MB")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if file.stat().st_size != 8 + length + end:
            raise ValueError(f"expected {8 + length + end} bytes, got {file.stat().st_size}")
        return {
            name: TensorInfo(file, str(entry["dtype"]), tuple(entry["shape"]), name) for name, entry in header.items()
        }
    except (OSError, struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: not a valid safetensors file ({error}); copy or download it again.") from None


class TensorFiles:
    """Open safetensors files, memory-mapped on the CPU."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}

    def read(self, info: TensorInfo) -> "torch.Tensor":
        """One tensor in its storage dtype. Nothing may be written into it. Raises InputError for a broken file."""
        from safetensors import SafetensorError, safe_open

        try:
            if info.file not in self._open:
                self._open[info.file] = safe_open(str(info.file), framework="pt")
            tensor: torch.Tensor = self._open[info.file].get_tensor(info.stored)
            tensor = tensor if info.piece is None else info.piece.of(tensor).contiguous()
        except (SafetensorError, OSError) as error:
            raise InputError(f"{info.file}: cannot be read ({error}); copy or download it again.") from None
        return tensor

    def close(self) -> None:
        """Closes the files; tensors that were read stay valid."""
        self._open.clear()
