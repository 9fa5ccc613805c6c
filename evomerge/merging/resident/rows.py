"""Rows: the embeddings and heads of models with other vocabularies, each with the rows of the merge's tokens.

They are those of a written merge (`vocabulary`). What a model's rows depend on is little: on the model alone where it
has every token, on the base where that is merged too, and only else on all models that are merged. So they are made on
first use and kept like any source.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from evomerge.merging.plan import TensorMerge
from evomerge.merging.resident.sources import Reader, Source
from evomerge.merging.sources.weights import Weights
from evomerge.merging.vocabulary import Vocabulary

Tensor = tuple[str, str]  # the reference of a model, and the name of its tensor


@dataclass(frozen=True, slots=True)
class _Aligned:
    """One tensor of one model in the rows of the merge, made when it is read.

    given: the tensors that it is made of.
    preferred: the model whose embeddings stand in where others lack a token.
    """

    vocabulary: Vocabulary
    weights: Mapping[str, Weights]
    model: str
    given: tuple[Tensor, ...]
    preferred: str | None

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        tensors = {model: self.weights[model].read(own) for model, own in self.given}
        return self.vocabulary.aligned(tensors, self.preferred, [self.model])[self.model].to(device)

    def mapped(self, name: str) -> None:
        """None, since it lies in no file."""


class Rows:
    """The sources of tensors with one row per token."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        weights: Mapping[str, Weights],
        names: frozenset[str],
        source: Callable[[Reader, str, torch.Tensor, torch.device], Source],
    ) -> None:
        """vocabulary: of all merges.
        weights: the models that are merged, by reference.
        names: of the tensors with one row per token, in the merge.
        source: makes the source of a tensor from what reads it, its name, a tensor like it on the meta device,
            and the device that merges it.
        """
        self._vocabulary, self._weights, self._names, self._source = vocabulary, weights, names, source
        self._complete = {model: vocabulary.complete(model) for model in weights}
        self._held: dict[Tensor, tuple[tuple[Tensor, ...], Source]] = {}

    def __contains__(self, name: str) -> bool:
        """Whether the merge's tensor of a name has one row per token."""
        return name in self._names

    def given(self, tensor: TensorMerge, index: int) -> tuple[Tensor, ...]:
        """The tensors that decide one model's rows, the model's own among them.

        tensor: one of those with a row per token.
        index: the model's place in `tensor.models`; -1 is the base.
        """
        own = tensor.source(index)
        if self._complete[own[0]]:
            return (own,)
        merged = [tensor.source(place) for place in tensor.places]
        preferred = next((each for each in merged if each[0] == tensor.preferred), None)
        if preferred is not None and self._complete[preferred[0]]:
            return preferred, own
        return tuple(merged)

    def source(self, tensor: TensorMerge, index: int, device: torch.device) -> Source:
        """One model's tensor in the rows of the merge.

        tensor, index: as for `given`.
        device: where it is merged.
        """
        own, given = tensor.source(index), self.given(tensor, index)
        if own not in self._held or self._held[own][0] != given:
            self._held.pop(own, None)  # before the next is made
            model, name = own
            info = self._weights[model].find(name)
            assert info is not None  # as it was checked when the models were loaded
            aligned = _Aligned(self._vocabulary, self._weights, model, given, tensor.preferred)
            like = torch.empty(self._vocabulary.size, *info.shape[1:], device="meta")
            self._held[own] = given, self._source(aligned, name, like, device)
        return self._held[own][1]
