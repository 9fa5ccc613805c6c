"""Rehearsal: candidates made without data, so that what they take can be counted before anything is loaded.

Tensors that are alike (of one shape, merged by the same numbers) take alike. So the first of them is merged, and the
last, beside which the most is kept. Each of the others leaves only a tensor as large as what is kept of it.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from evomerge.layers import layer_index
from evomerge.merging.methods.parts import Elements
from evomerge.merging.methods.slopes import Key, smooth_parameters
from evomerge.merging.plan import MergePlan, TensorMerge
from evomerge.merging.resident.models import ResidentModels, bytes_of, checksums, key_of_kept, least_and_largest
from evomerge.recipe import Recipe

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Traffic:
    """The bytes that the merge of a candidate moves.

    sources: read from the sources.
    kept: read of what is kept for all candidates, such as uniform fields.
    written: of the candidate.
    """

    sources: int
    kept: int
    written: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.sources + self.kept + self.written


@dataclass(slots=True)
class _First:
    """What the first tensor of its kind has kept: by name, models and whether they count, the bytes."""

    kept: dict[tuple[Hashable, tuple[int, ...], bool], int] = field(default_factory=dict)


class RehearsedModels(ResidentModels):
    """Resident models without data. `traffic` is what the last candidate moved."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what ResidentModels takes; `rehearsal` is true."""
        self._firsts: dict[Hashable, _First] = {}
        self._lasts: dict[Hashable, str] = {}
        self._first: _First | None = None
        self._stands_in: set[Hashable] = set()
        self._moved: list[tuple[int, int, int]] = []
        self._followed: set[Hashable] = set()
        super().__init__(*args, **{**kwargs, "rehearsal": True})

    @property
    def traffic(self) -> Traffic:
        """What the last candidate moved."""
        sources, kept, written = (
            (sum(column) for column in zip(*self._moved, strict=True)) if self._moved else (0, 0, 0)
        )
        return Traffic(sources, kept, written)

    @torch.no_grad()
    def rehearse(self, recipe: Recipe) -> None:
        """Does everything that a candidate makes the device do, but reads no result back."""
        self._moved.clear()
        self._followed.clear()
        plan = self.plan(recipe)
        self._lasts = {self._likeness(plan, tensor, self._dtype): tensor.name for tensor in plan.tensors}
        if self._int8:
            self._make_quantized(plan)
            return
        parameters, made = self._make(plan)
        if made:
            least_and_largest(_distinct(made))
        checksums(_distinct(parameters))

    @torch.no_grad()
    def rehearse_slopes(self, wanted: Sequence[str]) -> None:
        """Computes the derivatives of the last candidate's merge as a backward pass would, once for each kind of
        tensor.

        wanted: the names of the parameters.
        """
        plan = self._plan
        assert plan is not None
        self._followed.clear()
        for merge in plan.tensors:
            if smooth_parameters(plan.method, merge.shared, wanted):
                shape = self._source_of(merge, 0, torch.device("meta")).shape
                self._slopes_of(plan, merge, torch.empty(shape, dtype=self._dtype, device="meta"), wanted)

    def _slopes_of(
        self, plan: MergePlan, merge: TensorMerge, gradient: torch.Tensor, wanted: Sequence[str]
    ) -> Mapping[Key, torch.Tensor]:
        likeness = self._likeness(plan, merge, gradient.dtype)
        if likeness in self._followed:
            return {}
        self._followed.add(likeness)
        return super()._slopes_of(plan, merge, gradient, wanted)

    def _merge(self, plan: MergePlan, tensor: TensorMerge, out: torch.Tensor) -> None:
        likeness = self._likeness(plan, tensor, out.dtype)
        first = self._firsts.get(likeness)
        if first is None or self._lasts.get(likeness) == tensor.name:
            first = self._first = self._firsts.setdefault(likeness, _First())
            super()._merge(plan, tensor, out)
            self._first = None
        else:
            given = self._given(tensor, out.device)
            for (what, models, counts), size in first.kept.items():
                own = given if counts else given[:1]
                key = key_of_kept(tensor.name, own, what, models)
                if key not in self._kept:
                    self._stands_in.add(key)
                    super()._once(tensor.name, own, what, models, partial(_nothing, size))
        sources = sum(elements.numel() * elements.dtype.itemsize for elements in self._elements(tensor))
        self._moved.append((sources, sum(first.kept.values()), out.nbytes))

    def _once(
        self, name: str, given: tuple[Hashable, ...], what: Hashable, models: tuple[int, ...], make: Callable[[], T]
    ) -> T:
        key = key_of_kept(name, given, what, models)
        if key in self._stands_in:  # one that is not merged alike by every method
            self._stands_in.remove(key)
            del self._kept[key]
        result = super()._once(name, given, what, models, make)
        if self._first is not None and key in self._kept:
            self._first.kept[what, models, len(given) > 1] = bytes_of(result)
        return result

    def _likeness(self, plan: MergePlan, tensor: TensorMerge, dtype: torch.dtype) -> Hashable:
        """Equal for tensors whose merges take alike."""
        return (
            plan.method.name,
            plan.rescale,
            plan.seed,
            dtype,
            tuple((type(each), each.shape, each.dtype, getattr(each, "ranks", ())) for each in self._elements(tensor)),
            tensor.positions,
            tuple(_frozen(values) for values in tensor.per_model),
            _frozen(tensor.shared),
            layer_index(tensor.name) is None,
        )

    def _elements(self, tensor: TensorMerge) -> list[Elements]:
        here = torch.device("meta")
        return [self._source_of(tensor, index, here).on(here) for index in tensor.places]


def _frozen(values: Mapping[str, Any]) -> Hashable:
    return tuple(sorted(values.items()))


def _nothing(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device="meta")


def _distinct(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One tensor of each shape and dtype."""
    return dict({(tensor.shape, tensor.dtype): (name, tensor) for name, tensor in tensors.items()}.values())
