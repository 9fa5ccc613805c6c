"""Order statistics of a tensor, from a table that is made once and serves many candidates."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._pytree import register_dataclass

from evomerge.merging.methods.kernels import UNIFORM_STEPS, ascending, kth_smallest

_BESIDE = (-1, 0, 1)  # where two shares are cut off, each is rounded down, so their sum may be one element off


@dataclass(frozen=True, slots=True)
class OrderStatistics:
    """Elements of a sorted tensor: all of a small tensor; of a large one those where a density in steps of 1/65536 can
    cut it.

    count: how many elements the tensor has.
    values: the elements. A small tensor has shape (count,). A large one has shape (65537, 3): the columns of row k hold
        the first of the largest n - 1, n and n + 1 elements, where n = beyond + int(k / 65536 * count).
    beyond: how many of the largest elements are dropped before the density is counted.
    """

    count: int
    values: torch.Tensor
    beyond: int = 0

    def at(self, index: int, tensor: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The element at an index of the sorted tensor, as a scalar tensor.

        index: from 0 for the least element.
        tensor: gives the tensor, which is searched where the table lacks the element.
        """
        if self.values.dim() == 1:
            return self.values[index]
        kept = self.count - self.beyond - index
        nearest = round(kept * UNIFORM_STEPS / self.count)
        for step in range(max(nearest - 1, 0), min(nearest + 1, UNIFORM_STEPS) + 1):
            if (beside := kept - _kept(step, self.count)) in _BESIDE:
                return self.values[step, _BESIDE.index(beside)]
        return kth_smallest(tensor(), index)


register_dataclass(OrderStatistics)  # so that its tensor is found where results are kept and counted


def order_statistics(tensor: torch.Tensor, beyond: int = 0) -> OrderStatistics:
    """The table of a tensor. Making it takes as long as sorting the tensor.

    tensor: of any shape.
    beyond: how many of the largest elements are dropped before the density is counted.
    """
    values, count = ascending(tensor), tensor.numel()
    if count > len(_BESIDE) * (UNIFORM_STEPS + 1):
        shares = torch.arange(UNIFORM_STEPS + 1, dtype=torch.float64) / UNIFORM_STEPS
        kept = (shares * count).to(torch.int64)[:, None] + torch.tensor(_BESIDE)  # as `_kept` counts
        values = values[(count - beyond - kept).clamp(0, count - 1).to(values.device)]
    return OrderStatistics(count, values, beyond)


def _kept(step: int, count: int) -> int:
    """How many of `count` elements a density of step / 65536 keeps."""
    return int(step / UNIFORM_STEPS * count)
