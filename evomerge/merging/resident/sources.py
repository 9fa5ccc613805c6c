"""Where the tensors of sources live: on the device that merges them, in the host's memory, or on the disk.

The bits of a merge are the same everywhere. In the host's memory and on the disk, sources are mapped from their files.
So the processes of a node share one copy, which the system may drop and read again. A merge fetches chunks of a fixed
size; a CPU reads them where they lie. On the disk, chunks are released as soon as they are merged.

A tensor that an adapter changes by a product of two small matrices is kept as these factors where memory is short: its
pieces are made of them and of the base's tensor, which it shares with the base, wherever that lives. Any other tensor
that is not stored as it is merged (expanded, permuted, or with its rows in another order) cannot be mapped. It is
private to its process in the host's memory, and made again for every candidate on the disk.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast
from weakref import WeakValueDictionary

import torch

from evomerge.devices import CopyStream, free_memory, is_accelerator
from evomerge.merging.methods.kernels import pieces
from evomerge.merging.methods.parts import Elements, part_of
from evomerge.merging.sources.factors import Factored, Factors
from evomerge.merging.sources.models import Models
from evomerge.merging.sources.tensor_files import MappedTensor, TensorInfo, dtype_of, parameter_count

Where = Literal["device", "host", "disk"]
Kept = Literal["kept", "made"]
Form = Literal["factors", "expanded"]
Streams = dict[torch.device, CopyStream]

_SPARE = 0.9  # the share of free memory that is given away
_BESIDES, _LEAST_BESIDES = 1.25, 1 << 30  # what a worker needs beside sources: of a candidate, and in any case
_AHEAD = 1 << 24  # bytes that are read ahead of a chunk


class Reader(Protocol):
    """What reads a tensor, as `Weights` does."""

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """The tensor of a name, on a device."""
        ...

    def mapped(self, name: str) -> MappedTensor | None:
        """The tensor as it lies in a file; None where it lies in none."""
        ...


class Source(Protocol):
    """One tensor of a source, wherever it lives.

    shape: the tensor's shape.
    """

    @property
    def shape(self) -> torch.Size: ...

    def on(self, device: torch.device) -> Elements:
        """The tensor for a merge on a device."""
        ...

    def release(self) -> None:
        """Says that no merge needs the tensor for now."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class OnDevice:
    """A tensor on the device that merges it, or without data for a rehearsal."""

    tensor: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def on(self, device: torch.device) -> torch.Tensor:
        return self.tensor.to(device)

    def release(self) -> None:
        pass


class OffDevice:
    """A tensor in the host's memory or on the disk."""

    def __init__(self, weights: Reader, name: str, shape: torch.Size, streams: Streams, leaves: bool = False) -> None:
        """weights: reads the source.
        name: the tensor's name.
        shape: the tensor's shape.
        streams: the streams that copy to devices, made on first use.
        leaves: whether its memory is given back after use, as on the disk.
        """
        self._weights, self._name, self._streams, self._leaves = weights, name, streams, leaves
        self._mapped = weights.mapped(name)
        self.shape = shape
        self._read: torch.Tensor | None = None
        self._fetched: WeakValueDictionary[torch.device, _Fetched] = WeakValueDictionary()  # of the merge that goes on

    def on(self, device: torch.device) -> Elements:
        if self._mapped is None and self._read is None:
            self._read = self._weights.read(self._name)
        tensor = self._mapped.tensor if self._mapped is not None else self._read
        assert tensor is not None
        leaving = self._mapped if self._leaves else None
        if is_accelerator(device):
            if device not in self._streams:
                self._streams[device] = CopyStream(device)
            fetched = self._fetched.get(device)
            if fetched is None:
                fetched = self._fetched[device] = _Fetched(tensor, leaving, device, self._streams[device])
            return fetched
        return _Behind(tensor, leaving) if leaving is not None else tensor

    def release(self) -> None:
        if self._leaves and self._mapped is not None:
            self._mapped.release(slice(0, self._mapped.tensor.numel()))
        elif self._leaves:
            self._read = None


class FromFactors:
    """A tensor that is kept as factors, and as the base's tensor, which other models may share."""

    def __init__(self, start: Source, dtype: torch.dtype, factors: Sequence[Factors], device: torch.device) -> None:
        """start: the tensor without what the factors add.
        dtype: its dtype.
        factors: what is added to it.
        device: where the tensor is merged, and where the factors are kept.
        """
        self.start, self._dtype, self._factors = start, dtype, [each.to(device) for each in factors]

    @property
    def shape(self) -> torch.Size:
        return self.start.shape

    def on(self, device: torch.device) -> Factored:
        return Factored(self.start.on(device), self._factors)

    def stays_finite(self) -> bool:
        """Whether the tensor is finite wherever `start` is: by a bound, which may say no in vain."""
        return all(each.is_small(self._dtype) for each in self._factors)

    def release(self) -> None:
        self.start.release()


class Rehearsed:
    """A tensor without data that lives off the device: only its chunks count as the device's memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """tensor: on the meta device."""
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device

    def on(self, device: torch.device) -> "Rehearsed":
        return self

    def release(self) -> None:
        pass

    def numel(self) -> int:
        return self.shape.numel()

    def part(self, piece: slice) -> torch.Tensor:
        return torch.empty(piece.stop - piece.start, dtype=self.dtype, device="meta")

    def ahead(self, piece: slice) -> None:
        pass

    def done(self, piece: slice) -> None:
        pass


class _Behind:
    """A tensor that a CPU merges where it lies; memory is given back behind the merge."""

    def __init__(self, tensor: torch.Tensor, leaving: MappedTensor | None) -> None:
        """tensor: on the CPU.
        leaving: the mapping to give back; None where it stays.
        """
        self._flat, self._leaving = tensor.reshape(-1), leaving
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device

    def numel(self) -> int:
        return self._flat.numel()

    def part(self, piece: slice) -> torch.Tensor:
        return self._flat[piece]

    def ahead(self, piece: slice) -> None:
        block = _AHEAD // self.dtype.itemsize
        if self._leaving is not None and piece.start // block != piece.stop // block:
            self._leaving.need(slice(piece.stop, piece.stop + block))

    def done(self, piece: slice) -> None:
        """Gives memory back block by block, since a call for every small chunk would take longer than its merge."""
        block = _AHEAD // self.dtype.itemsize
        if self._leaving is not None and piece.start // block != piece.stop // block:
            self._leaving.release(slice(piece.start // block * block, piece.stop))


class _Fetched(_Behind):
    """A tensor of which a device fetches chunks, the next one while the one before is merged."""

    def __init__(
        self, tensor: torch.Tensor, leaving: MappedTensor | None, device: torch.device, stream: CopyStream
    ) -> None:
        """tensor, leaving: as for a CPU.
        device: where it is merged.
        stream: copies to the device.
        """
        super().__init__(tensor, leaving)
        self.device, self._stream = device, stream
        self._coming: dict[tuple[int, int], tuple[torch.Tensor, object]] = {}
        self._buffers: list[torch.Tensor] = []

    def part(self, piece: slice) -> torch.Tensor:
        coming = self._coming.get((piece.start, piece.stop))
        if coming is None:
            return self._flat[piece].to(self.device)
        buffer, copy = coming
        self._stream.wait(copy)
        return buffer[: piece.stop - piece.start]

    def ahead(self, piece: slice) -> None:
        if (piece.start, piece.stop) in self._coming:
            return
        size = piece.stop - piece.start
        full = len(self._buffers) == 2
        buffer = self._buffers.pop(0) if full else torch.empty(size, dtype=self.dtype, device=self.device)
        self._coming = {key: held for key, held in self._coming.items() if held[0] is not buffer}
        self._buffers.append(buffer)
        self._coming[piece.start, piece.stop] = buffer, self._stream.copy(buffer[:size], self._flat[piece])


@dataclass(frozen=True, slots=True)
class Choice:
    """Where sources live, whether uniform fields are kept, and what adapters are kept as."""

    sources: Where
    fields: Kept
    adapters: Form = "expanded"


def choose(
    sources: int, fields: int, rest: int, device: float | None, host: float, workers: int = 1, expanded: int = 0
) -> Choice:
    """The fastest way in which everything fits into memory; it never changes a bit of a merge.

    sources: the bytes of all sources, adapters as factors.
    fields: the bytes of what is kept for each element for all candidates.
    rest: the bytes of everything else of a worker: the model, tables, activations.
    device: the free bytes of a worker's device; None where it is the CPU, whose memory is the host's.
    host: the free bytes of the node.
    workers: how many workers the node has.
    expanded: the bytes that expanded adapters take beside `sources`, in every worker.
    """
    room = host * _SPARE
    forms: list[tuple[Form, int]] = [("expanded", expanded)]
    if expanded:
        forms.append(("factors", 0))
    for form, more in forms:
        if device is None:  # mapped sources are shared, so the device's and the host's placement are one
            if sources + workers * (rest + fields + more) <= room:
                return Choice("host", "kept", form)
            if sources + workers * (rest + more) <= room:
                return Choice("host", "made", form)
        elif sources + more + fields + rest <= device * _SPARE:
            return Choice("device", "kept", form)
        elif sources + more + rest <= device * _SPARE:
            return Choice("device", "made", form)
    form = forms[-1][0]  # factors are fewer bytes to copy
    if device is None:
        return Choice("disk", "made", form)
    kept: Kept = "kept" if fields + rest <= device * _SPARE else "made"
    return Choice("host" if sources <= room else "disk", kept, form)


def finite(tensor: Elements) -> torch.Tensor:
    """Whether all elements are finite, a scalar tensor, found piece by piece."""
    if tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    ends = [torch.stack(part_of(tensor, piece).aminmax()) for piece in pieces(tensor.numel(), tensor.device)]
    return torch.isfinite(torch.stack(ends)).all()


def resolve(
    sources: str, fields: str, adapters: str, models: Models, dtype: str, device: torch.device, workers: int
) -> Choice:
    """What `auto` stands for on this machine, by sizes that are known before anything is loaded.

    sources: where sources live, as a search file says.
    fields: whether fields are kept, as a search file says.
    adapters: what adapters are kept as, as a search file says.
    models: the models, with their headers read.
    dtype: the dtype of merges.
    device: where models are merged.
    workers: how many workers the node has.
    """
    elements = [parameter_count(model.table) for model in models.values()]
    candidate = max(elements, default=0) * getattr(torch, dtype).itemsize
    least, expanded = _bytes_of(models)
    chosen = choose(
        sources=least + expanded * (adapters == "expanded"),
        fields=2 * sum(elements),
        rest=int(_BESIDES * candidate) + _LEAST_BESIDES,
        device=free_memory(device) if is_accelerator(device) else None,
        host=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        workers=workers,
        expanded=expanded * (adapters == "auto"),
    )
    where = chosen.sources if sources == "auto" else cast(Where, sources)
    as_chosen = where == chosen.sources or (where == "device" and not is_accelerator(device))
    form: Form = chosen.adapters if as_chosen or not expanded else "factors"
    return Choice(
        where,
        chosen.fields if fields == "auto" else cast(Kept, fields),
        form if adapters == "auto" else cast(Form, adapters),
    )


def _bytes_of(models: Models) -> tuple[int, int]:
    """The bytes of all sources with adapters as factors, and how many more they are where adapters are expanded. A
    tensor that several models have in common counts once."""
    plain: dict[TensorInfo, int] = {}
    private = factors = expanded = 0
    for model in models.values():
        weights = model.weights
        for name, info in weights.table.items():
            size, changes = _size(info), weights.products(name)
            if changes:
                factors += sum(_size(matrix) for change in changes for matrix in (change.a, change.b))
                expanded += size
            if changes or not weights.changes(name):
                plain[weights.plain.find(name) or info] = size
            else:
                private += size
    return sum(plain.values()) + private + factors, expanded


def _size(info: TensorInfo) -> int:
    return math.prod(info.shape) * _width(info)


def _width(info: TensorInfo) -> int:
    return dtype_of(info).itemsize
