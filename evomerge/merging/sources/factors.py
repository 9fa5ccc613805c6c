"""Factors: a weight that an adapter changes, made piece by piece of the base's and the adapter's small matrices.

A piece is W + scale * L R. The product has the same bits on every device, with any number of threads, and in pieces of
any size, because no sum in it is rounded. The rows of L and the columns of R are first rounded to whole multiples of a
power of two, with so few bits that all products and all of their sums are whole numbers that float64 holds exactly
(the error-free product of Ozaki et al. 2012, doi:10.1007/s11075-011-9478-1, with one slice for each factor). Up to
rank 32 that is 24 bits below the largest number of a row or column, as many as a float32 has. Factors in bfloat16 and
float16 are not rounded at all unless the numbers of a row differ by more than those bits.

The scale is multiplied in float64, its result rounded to float32 and added to W in float32, and the sum is rounded into
W's dtype. No multiplication is followed by an addition without a rounding between them, so none can be fused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evomerge.devices import exact_device, widened
from evomerge.merging.methods.parts import Elements, part_of

_EXACT = 53  # bits of a whole number that float64 holds
_EXPONENT = 0x7FF0000000000000  # of a float64; what is left of a positive number is the power of two below it
_BLOCK, _WIDE_BLOCK = 1 << 16, 1 << 22  # elements that are made at a time: in the cache, or in few launches


@dataclass(frozen=True, slots=True)
class Factors:
    """What an adapter adds to a weight: scale * left right.

    left: shape (rows, rank), of any float dtype.
    right: shape (rank, columns).
    scale: the factor of the product.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float

    def to(self, device: torch.device) -> "Factors":
        """The same factors on a device, or on the CPU where the device has no float64."""
        there = exact_device(device)
        return Factors(self.left.to(there), self.right.to(there), self.scale)

    def is_small(self, dtype: torch.dtype) -> bool:
        """Whether no finite number of a dtype can become infinite by what is added to it.

        No element of the product is larger than the sum of the largest products over the rank.
        """
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return False
        largest = widened(self.left).abs().amax(0) * widened(self.right).abs().amax(1)
        least_that_counts = torch.finfo(dtype).max * torch.finfo(dtype).eps / 4  # half of the last place of the largest
        return abs(self.scale) * float(largest.sum()) < least_that_counts / 2


class Factored:
    """A tensor (`methods.parts.Held`) that is made of another one and of factors, where it is read."""

    def __init__(self, start: Elements, changes: Sequence[Factors]) -> None:
        """start: the tensor without the changes, wherever it lives.
        changes: what is added to it, in this order, each rounded into its dtype.
        """
        self.shape, self.dtype, self.device = start.shape, start.dtype, start.device
        self._start = start
        self._changes = [_Change(change.to(start.device), start.device) for change in changes]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the changes."""
        return tuple(change.rank for change in self._changes)

    def numel(self) -> int:
        return self._start.numel()

    def part(self, piece: slice) -> torch.Tensor:
        values = part_of(self._start, piece)
        for change in self._changes:
            values = change.added(values, piece.start)
        return values

    def ahead(self, piece: slice) -> None:
        if not isinstance(self._start, torch.Tensor):
            self._start.ahead(piece)

    def done(self, piece: slice) -> None:
        if not isinstance(self._start, torch.Tensor):
            self._start.done(piece)


class _Change:
    """Factors that are ready to be multiplied."""

    def __init__(self, factors: Factors, device: torch.device) -> None:
        self._left, self._scale, self._device = factors.left, factors.scale, device
        self._right = _few_bits(factors.right, 0)
        self.rank = factors.left.shape[1]

    def added(self, values: torch.Tensor, start: int) -> torch.Tensor:
        """A piece of the flat tensor with the change.

        values: the piece without it.
        start: the piece's first element.
        """
        out, columns, stop = torch.empty_like(values), self._right.shape[1], start + len(values)
        size = _BLOCK if self._right.device.type == "cpu" else _WIDE_BLOCK
        rows = range(start // columns, -(-stop // columns), max(1, size // columns))
        for row in rows[:1] if out.is_meta else rows:  # without data all blocks are alike
            left = _few_bits(self._left[row : min(row + rows.step, rows.stop)], 1)
            product = torch.mm(left, self._right).mul_(self._scale).to(torch.float32).to(self._device).view(-1)
            first = row * columns
            low, high = max(first, start), min(first + len(product), stop)
            own = slice(low - start, high - start)
            out[own] = product[low - first : high - first].add_(values[own].to(torch.float32))
        return out


def _few_bits(factor: torch.Tensor, dim: int) -> torch.Tensor:
    """A factor in float64, rounded so that no sum over the rank has to be.

    factor: of any float dtype; float64 is rounded to float32 first.
    dim: its dimension of the rank, along which all numbers become multiples of one power of two.
    """
    bits = (_EXACT - (factor.shape[dim] - 1).bit_length()) // 2
    wide = widened(factor.to(torch.float32))
    power = (wide.abs().amax(dim, keepdim=True).view(torch.int64) & _EXPONENT).view(torch.float64)
    ruler = power * (1.5 * 2.0 ** (_EXACT - bits))  # its last place is the power of two to round to
    return (wide + ruler) - ruler
