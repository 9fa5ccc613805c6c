"""Order statistics of a tensor that many candidates cut at different places, from a table made once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from evomerge.merging.methods.kernels import UNIFORM_STEPS, ascending, kth_smallest

_BESIDE = (-1, 0, 1)  # two shares that are cut off one after the other are each rounded down


@dataclass(frozen=True, slots=True)
class OrderStatistics:
    """Elements of a sorted tensor: all of a small one, else those where a density in steps of 1/65536 can cut it.

    beyond: how many of the largest elements are left out before a density counts. values: shape (count,), or (65537, 3)
    with the elements that have beyond + int(step / 65536 * count) elements, one less and one more, from themselves to
    the largest.
    """

    count: int
    values: torch.Tensor
    beyond: int = 0

    def at(self, index: int, tensor: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The element at `index` of the sorted tensor, as a scalar tensor; `tensor` is searched where the table lacks
        it."""
        if self.values.dim() == 1:
            return self.values[index]
        kept = self.count - self.beyond - index
        nearest = round(kept * UNIFORM_STEPS / self.count)
        for step in range(max(nearest - 1, 0), min(nearest + 1, UNIFORM_STEPS) + 1):
            if (beside := kept - _kept(step, self.count)) in _BESIDE:
                return self.values[step, _BESIDE.index(beside)]
        return kth_smallest(tensor(), index)


def order_statistics(tensor: torch.Tensor, beyond: int = 0) -> OrderStatistics:
    """The table of a tensor; takes as long as sorting it."""
    values, count = ascending(tensor), tensor.numel()
    if count > len(_BESIDE) * (UNIFORM_STEPS + 1):
        kept = torch.tensor([_kept(step, count) for step in range(UNIFORM_STEPS + 1)])[:, None] + torch.tensor(_BESIDE)
        values = values[(count - beyond - kept).clamp(0, count - 1).to(values.device)]
    return OrderStatistics(count, values, beyond)


def _kept(step: int, count: int) -> int:
    """How many elements a density of so many steps keeps."""
    return int(step / UNIFORM_STEPS * count)
