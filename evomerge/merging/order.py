"""Order statistics of a tensor that many candidates cut at different places, from a table made once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from evomerge.merging.kernels import UNIFORM_STEPS, ascending, kth_smallest

_BESIDE = (-1, 0, 1)  # two shares that are cut off one after the other are each rounded down


@dataclass(frozen=True, slots=True)
class OrderStatistics:
    """Elements of a sorted tensor: all of a small one, else those where a density in steps of 1/65536 can cut it.

    values: shape (count,), or (65537, 3) with the elements that have int(step / 65536 * count) elements, one less and
    one more, from themselves to the largest.
    """

    count: int
    values: torch.Tensor

    def at(self, index: int, tensor: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The element at `index` of the sorted tensor, as a scalar tensor; `tensor` is searched where the table lacks
        it."""
        if self.values.dim() == 1:
            return self.values[index]
        kept = self.count - index
        nearest = round(kept * UNIFORM_STEPS / self.count)
        for step in range(max(nearest - 1, 0), min(nearest + 1, UNIFORM_STEPS) + 1):
            if (beside := kept - _kept(step, self.count)) in _BESIDE:
                return self.values[step, _BESIDE.index(beside)]
        if self.values.device.type != "cpu":
            return kth_smallest(tensor(), index)  # to look at a part of it would wait for the device
        return self._between(max(nearest - 1, 0), min(nearest + 1, UNIFORM_STEPS), index, tensor().flatten())

    def _between(self, fewer: int, more: int, index: int, flat: torch.Tensor) -> torch.Tensor:
        """The same among those elements alone that lie between two of the table."""
        low, high = self.values[more, 1], self.values[fewer, 1]
        below = int((flat < low).sum())
        return kth_smallest(flat[(flat >= low) & (flat <= high)], index - below)


def order_statistics(tensor: torch.Tensor) -> OrderStatistics:
    """The table of a tensor; takes as long as sorting it."""
    values, count = ascending(tensor), tensor.numel()
    if count > len(_BESIDE) * (UNIFORM_STEPS + 1):
        kept = torch.tensor([[_kept(step, count) + beside for beside in _BESIDE] for step in range(UNIFORM_STEPS + 1)])
        values = values[(count - kept).clamp(0, count - 1).to(values.device)]
    return OrderStatistics(count, values)


def _kept(step: int, count: int) -> int:
    """How many elements a density of so many steps keeps."""
    return int(step / UNIFORM_STEPS * count)
