"""Parts: tensors that are read piece by piece, wherever they lie.

A merge reads a plain tensor as it is. Of a tensor that lies elsewhere (in the host's memory, on a disk, or in factors
of a product) it reads pieces, and never more than two at a time.
"""

from collections.abc import Iterator
from typing import Protocol

import torch

STAGED = 1 << 24  # elements of a piece that is brought to a device


class Held(Protocol):
    """A tensor of which one piece at a time is on the device where it is merged.

    shape: the tensor's shape.
    dtype: its dtype.
    device: where it is merged, and where its pieces are.
    """

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def numel(self) -> int:
        """How many elements it has."""
        ...

    def part(self, piece: slice) -> torch.Tensor:
        """A piece of the flat tensor, on the device. Nothing may be written into it.

        piece: which elements.
        """
        ...

    def ahead(self, piece: slice) -> None:
        """Says which piece is asked for next, so that it can be on its way while the one before is merged. It may be
        asked for several times, since tensors may be made of a common one."""
        ...

    def done(self, piece: slice) -> None:
        """Says that a piece is not needed for now."""
        ...


Elements = torch.Tensor | Held


def part_of(tensor: Elements, piece: slice) -> torch.Tensor:
    """A piece of a flat tensor, on the device where it is merged.

    tensor: a tensor, wherever it lies.
    piece: which elements.
    """
    return tensor.reshape(-1)[piece] if isinstance(tensor, torch.Tensor) else tensor.part(piece)


def whole_of(tensor: Elements) -> torch.Tensor:
    """All of a tensor, in its shape, on the device where it is merged."""
    return tensor if isinstance(tensor, torch.Tensor) else tensor.part(slice(0, tensor.numel())).view(tensor.shape)


def walk(tensors: tuple[Elements, ...], starts: range) -> Iterator[tuple[slice, tuple[torch.Tensor, ...]]]:
    """Pieces in order, each with what it is of every tensor. The next piece is on its way while one is worked on.

    tensors: all of one size.
    starts: where the pieces start; on the meta device all pieces are alike, so there is only the first.
    """
    held = [tensor for tensor in tensors if not isinstance(tensor, torch.Tensor)]
    count = tensors[0].numel()
    cuts = [slice(start, min(start + starts.step, count)) for start in starts]
    cuts = cuts[:1] if tensors[0].device.type == "meta" else cuts
    for tensor in held if cuts else ():
        tensor.ahead(cuts[0])
    for number, piece in enumerate(cuts):
        parts = tuple(part_of(tensor, piece) for tensor in tensors)
        for tensor in held if number + 1 < len(cuts) else ():
            tensor.ahead(cuts[number + 1])
        yield piece, parts
        for tensor in held:
            tensor.done(piece)
