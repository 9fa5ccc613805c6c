"""Tensors in safetensors files: what the header says of them, and their values, read one tensor at a time."""

import json
import math
import mmap
import struct
import warnings
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

    @property
    def contiguous(self) -> bool:
        """Whether the elements of the piece follow one another in the other tensor."""
        steps = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        return all(size == 1 or own == step for size, own, step in zip(self.shape, self.strides, steps, strict=True))

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


def dtype_of(info: TensorInfo) -> "torch.dtype":
    """A tensor's dtype, as torch has it."""
    import torch

    dtype: torch.dtype = getattr(torch, FLOATS[info.dtype])
    return dtype


def torch_dtypes(table: Mapping[str, TensorInfo]) -> list[str]:
    """What torch calls the dtypes of tensors."""
    return [FLOATS[info.dtype] for info in table.values()]


def size_in_bytes(table: Mapping[str, TensorInfo]) -> int:
    """How many bytes all tensors have."""
    return sum(math.prod(info.shape) * dtype_of(info).itemsize for info in table.values())


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


class MappedTensor:
    """A tensor in a safetensors file, mapped into memory that all processes of a node share.

    tensor: its values. Nothing may be written into it.
    """

    def __init__(self, info: TensorInfo, memory: mmap.mmap, start: int, stop: int) -> None:
        """info: what the tensor is.
        memory: its file.
        start: where its first byte lies in the file.
        stop: where its last byte ends.
        """
        import torch

        self._memory, self._start, self._stop = memory, start, stop
        dtype, count = dtype_of(info), math.prod(info.shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            self.tensor: torch.Tensor = torch.frombuffer(memory, dtype=dtype, count=count, offset=start)
        self.tensor = self.tensor.view(info.shape)

    def need(self, piece: slice) -> None:
        """Has elements read soon from the file.

        piece: which elements of the flat tensor.
        """
        self._advise(piece, "MADV_WILLNEED")

    def release(self, piece: slice) -> None:
        """Gives the memory of elements back; where they are used again, they are read again.

        piece: which elements of the flat tensor.
        """
        self._advise(piece, "MADV_DONTNEED")

    def _advise(self, piece: slice, advice: str) -> None:
        size = self.tensor.itemsize
        start = (self._start + piece.start * size) // mmap.PAGESIZE * mmap.PAGESIZE
        stop = min(self._start + piece.stop * size, self._stop)
        if hasattr(mmap, advice) and stop > start:
            self._memory.madvise(getattr(mmap, advice), start, stop - start)


class MappedFiles:
    """Safetensors files that are mapped into memory once, whatever number of their tensors is used."""

    def __init__(self) -> None:
        self._open: dict[Path, tuple[mmap.mmap, int, dict[str, Any]]] = {}

    def find(self, info: TensorInfo) -> MappedTensor | None:
        """A tensor as it lies in its file; None where its elements do not follow one another there, as in some pieces
        of other tensors, or where it is empty, or not aligned.

        Raises InputError for a file that cannot be mapped.
        """
        if 0 in info.shape or info.dtype not in FLOATS or (info.piece is not None and not info.piece.contiguous):
            return None
        try:
            memory, start, header = self._open.get(info.file) or self._map(info.file)
        except (OSError, ValueError, struct.error) as error:
            raise InputError(f"{info.file}: cannot be read ({error}); copy or download it again.") from None
        width = dtype_of(info).itemsize
        first = start + header[info.stored]["data_offsets"][0] + (info.piece.offset if info.piece else 0) * width
        return MappedTensor(info, memory, first, first + math.prod(info.shape) * width) if first % width == 0 else None

    def _map(self, file: Path) -> tuple[mmap.mmap, int, dict[str, Any]]:
        with file.open("rb") as stream:
            memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        (length,) = struct.unpack("<Q", memory[:8])
        self._open[file] = memory, 8 + length, json.loads(memory[8 : 8 + length])
        return self._open[file]
