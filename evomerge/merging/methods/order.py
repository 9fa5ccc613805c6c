"""Order statistics of a long vector of magnitudes, from a table that is made once and serves many candidates.

The vector is read piece by piece and never held as a whole. Its elements are not negative, so their bits have the order
of the elements. A first count by their upper bits tells where each rank lies, and a second count by their lower bits
tells which element it is (distribution counting; Knuth, The Art of Computer Programming, vol. 3, 5.2, Algorithm D).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import register_dataclass

from evomerge.merging.methods.kernels import UNIFORM_STEPS, ascending, kth_smallest, pieces

Values = Callable[[slice], torch.Tensor]
"""A vector that is made piece by piece: which elements -> float32, none of them negative."""
Ranks = npt.NDArray[np.int64]

_BESIDE = (-1, 0, 1)  # where two shares are cut off, each is rounded down, so their sum may be one element off
_SHORT = len(_BESIDE) * (UNIFORM_STEPS + 1)  # elements of a vector that is kept itself
_SORTED = 1 << 24  # elements that are sorted at most; more of them are counted, which takes less memory and time
_LOWER = 15  # lower bits of the 31 that an element has without its sign
_GROUP = 1 << 11  # how many values of the upper bits are looked into at a time, with 128 KiB of counts for each


@dataclass(frozen=True, slots=True)
class OrderStatistics:
    """Elements of a sorted vector: all of a short one; of a long one those where a density in steps of 1/65536 can cut
    it.

    count: how many elements the vector has.
    values: the elements. A short vector has shape (count,). A long one has shape (65537, 3): the columns of row k hold
        the first of the largest n - 1, n and n + 1 elements, where n = beyond + int(k / 65536 * count).
    beyond: how many of the largest elements are dropped before the density is counted.
    """

    count: int
    values: torch.Tensor
    beyond: int = 0

    def at(self, index: int, vector: Values) -> torch.Tensor:
        """The element at an index of the sorted vector, as a scalar tensor.

        index: from 0 for the least element.
        vector: the vector, which is read where the table lacks the element.
        """
        if self.values.dim() == 1:
            return self.values[index]
        kept = self.count - self.beyond - index
        nearest = round(kept * UNIFORM_STEPS / self.count)
        steps = np.arange(max(nearest - 1, 0), min(nearest + 1, UNIFORM_STEPS) + 1)
        for step, beside in zip(steps.tolist(), (kept - _kept(steps, self.count)).tolist(), strict=True):
            if beside in _BESIDE:
                return self.values[step, _BESIDE.index(beside)]
        return elements_at(vector, self.count, np.array([index]), self.values.device)[0]


register_dataclass(OrderStatistics)  # so that its tensor is found where results are kept and counted


def order_statistics(vector: Values, count: int, device: torch.device, beyond: int = 0) -> OrderStatistics:
    """The table of a vector.

    vector: the vector.
    count: how many elements it has.
    device: where it is.
    beyond: how many of the largest elements are dropped before the density is counted.
    """
    if count <= _SHORT:
        return OrderStatistics(count, ascending(vector(slice(0, count))), beyond)
    kept = _kept(np.arange(UNIFORM_STEPS + 1), count)[:, None] + np.array(_BESIDE)
    ranks = (count - beyond - kept).clip(0, count - 1)
    values = elements_at(vector, count, ranks.ravel(), device)
    return OrderStatistics(count, values.view(ranks.shape), beyond)


def elements_at(vector: Values, count: int, ranks: Ranks, device: torch.device) -> torch.Tensor:
    """The elements of a sorted vector at some ranks, float32, shape (ranks,).

    vector: the vector.
    count: how many elements it has.
    ranks: from 0 for the least element, shape (ranks,), in any order.
    device: where the vector is.
    """
    if count <= _SORTED:
        whole = vector(slice(0, count))
        if len(ranks) == 1:
            return kth_smallest(whole, int(ranks[0])).view(1)
        return ascending(whole)[torch.from_numpy(ranks).to(device)]
    counts = torch.zeros(1 << 31 - _LOWER, dtype=torch.int64, device=device)
    for piece in pieces(count, device):
        upper = _bits(vector(piece)) >> _LOWER
        counts.index_add_(0, upper, torch.ones_like(upper, dtype=counts.dtype))
    if counts.is_meta:  # for a rehearsal, which counts bytes
        places = torch.empty(len(ranks), dtype=torch.int64, device=device)
        return _bits_at(vector, count, np.zeros(1, dtype=np.int64), places).view(torch.float32)
    on_host = counts.cpu().numpy()
    ends = on_host.cumsum()
    bins = np.searchsorted(ends, ranks, side="right")  # the upper bits of the element at each rank
    within = ranks - (ends - on_host)[bins]
    found = torch.empty(len(ranks), dtype=torch.int32, device=device)
    wanted = np.unique(bins)
    for start in range(0, len(wanted), _GROUP):
        group = wanted[start : start + _GROUP]
        chosen = np.flatnonzero((bins >= group[0]) & (bins <= group[-1]))
        before = (on_host[group].cumsum() - on_host[group])[np.searchsorted(group, bins[chosen])]
        places = torch.from_numpy(within[chosen] + before).to(device)
        found[torch.from_numpy(chosen).to(device)] = _bits_at(vector, count, group, places)
    return found.view(torch.float32)


def _bits_at(vector: Values, count: int, group: Ranks, places: torch.Tensor) -> torch.Tensor:
    """Bits of the elements whose upper bits are in a group, at some places among them in ascending order; int32.

    group: values of the upper bits, ascending.
    places: from 0 for the least of those elements, shape (places,).
    """
    device, size = places.device, _GROUP if places.is_meta else len(group)
    rows = torch.full((1 << 31 - _LOWER,), size, dtype=torch.int32, device=device)  # the last row takes all others
    uppers = torch.from_numpy(group).to(device)
    rows[uppers] = torch.arange(len(group), dtype=torch.int32, device=device)
    dtype = torch.int32 if count < 1 << 31 else torch.int64
    counts = torch.zeros(size + 1 << _LOWER, dtype=dtype, device=device)
    for piece in pieces(count, device):
        bits = _bits(vector(piece))
        cell = (rows[bits >> _LOWER] << _LOWER) + (bits & (1 << _LOWER) - 1)
        counts.index_add_(0, cell, torch.ones_like(cell, dtype=dtype))
    cells = torch.searchsorted(counts.cumsum_(0), places.to(dtype), right=True)
    return ((uppers[cells >> _LOWER] << _LOWER) + (cells & (1 << _LOWER) - 1)).to(torch.int32)


def _bits(magnitudes: torch.Tensor) -> torch.Tensor:
    """The bits of float32 numbers without their sign, int32."""
    return magnitudes.view(torch.int32) & 0x7FFFFFFF


def _kept(steps: Ranks, count: int) -> Ranks:
    """How many of `count` elements densities of steps / 65536 keep."""
    return (steps / UNIFORM_STEPS * count).astype(np.int64)
