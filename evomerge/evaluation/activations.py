"""The loss without labels that compares layers: how far their outputs are from those of the models of a merge.

The merge reads the prompts of items. What its layers put out at the last tokens of a prompt should be a weighted
average of what the item's sources put out there, and so should the logits behind the last token, which count like one
more layer: without them nothing would say what the final norm and the head should be. The loss of an item is the mean
squared distance from it. Each layer's distance is divided by that of the models from the base, on all prompts of the
objective: at 0 the merge is at its target, and at 1 it is about as far from it as models are from the base. Layers in
which no model differs from the base do not count.

Xu et al. 2025 (ProDistill, arXiv:2502.12706) fit coefficients to distances of this kind, one layer after the other.
Here all layers are compared in one pass.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Protocol

import torch

from evomerge.candidate import Descent
from evomerge.config.scoring import ObjectiveConfig
from evomerge.errors import InputError
from evomerge.evaluation.likelihoods import Request, logits_at
from evomerge.evaluation.losses import Encode, Item, Losses, TaskDocuments
from evomerge.evaluation.packing import Tokens
from evomerge.layers import is_layer

PLACES = 32  # tokens at the end of a row at which layers are compared; all tokens of long prompts would fill disks
_OTHER_LAYERS = (
    "optimizer.learning.loss is activations, but this architecture has no layers that put out one vector for each "
    "token; use likelihood or entropy."
)


class Outputs(Protocol):
    """What a model's layers put out on the rows of all search items, wherever it lies."""

    def read(self, name: str) -> torch.Tensor:
        """The outputs on a row (`name_of`), shape (layers, tokens, channels), or its logits (`head_of`), shape
        (vocabulary,)."""
        ...


OutputsOf = Callable[[str], Outputs]
"""A model's reference -> what its layers put out."""


def name_of(row: Tokens) -> str:
    """16 hexadecimal digits that stand for a row."""
    return hashlib.sha256(json.dumps(row).encode()).hexdigest()[:16]


def digest_of(rows: Sequence[Tokens]) -> str:
    """16 hexadecimal digits that stand for some rows, and for how much of them is kept."""
    return hashlib.sha256(json.dumps([PLACES, *rows]).encode()).hexdigest()[:16]


def head_of(row: Tokens) -> str:
    """What the logits of a row are called."""
    return f"{name_of(row)}.head"


@contextmanager
def _watched(model: Any, shape: torch.Size) -> Iterator[list[torch.Tensor]]:
    """A context in which the outputs of a model's layers are kept. A forward pass raises InputError where they are not
    one vector for each token of the shape."""
    kept: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.dim() != 3 or hidden.shape[:2] != shape:
            raise InputError(_OTHER_LAYERS)
        kept.append(hidden)

    with ExitStack() as stack:
        for name, layer in model.named_modules():
            if is_layer(name):
                stack.callback(layer.register_forward_hook(keep).remove)
        yield kept


def outputs(model: Any, rows: Sequence[Tokens]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What each layer of a model puts out at the last `PLACES` tokens of some rows, or at as many as a row has, and the
    logits behind the last token of each row.

    model: a causal model of transformers.
    rows: what it reads, together.
    Returns for each layer a tensor of shape (rows, tokens, channels), on the layer's device, and logits of shape (rows,
    vocabulary). Rows that are shorter than others have anything at the end.
    Raises InputError where layers do not put out one vector for each token.
    """
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=model.device)
    starts = torch.tensor([max(0, len(row) - PLACES) for row in rows])
    places = (starts[:, None] + torch.arange(min(PLACES, length))).clamp(max=length - 1)
    ends = torch.tensor([place * length + len(row) - 1 for place, row in enumerate(rows)], device=model.device)
    with _watched(model, ids.shape) as kept:
        logits = logits_at(model, {"input_ids": ids, "use_cache": False}, ends)
    if not kept:
        raise InputError(_OTHER_LAYERS)
    numbers = torch.arange(len(rows))[:, None]
    return [hidden[numbers.to(hidden.device), places.to(hidden.device)] for hidden in kept], logits


class LayerLosses(Losses):
    """The losses of a search's objectives, which compare layers. See `Losses`."""

    def __init__(
        self, *given: Any, base: str, models: Sequence[str], max_length: int, outputs_of: OutputsOf | None = None
    ) -> None:
        """given: as for `Losses`.
        base: the base's reference.
        models: those of the other models.
        max_length: the model's context in tokens.
        outputs_of: what the layers of each of them put out on `rows`; None where no loss is asked for.
        """
        super().__init__(*given)
        self._base, self._models, self._max_length = base, models, max_length
        self._outputs_of = outputs_of
        self._scales: dict[str, torch.Tensor] = {}

    def make(
        self,
        task: Any,
        objective: ObjectiveConfig,
        filter_name: str,
        documents: TaskDocuments,
        encode: Encode,
        chat: bool,
    ) -> list[Item | None]:
        """The prompts of each document, each once; where a task has texts without prompts, these."""
        end = None if task.OUTPUT_TYPE == "loglikelihood_rolling" else ""
        items: list[Item | None] = []
        for instances in documents:
            requests = tuple(dict.fromkeys(request for each in instances for request in encode(each, end)))
            item = Item(objective.name, requests, (), (1.0,) * len(requests), unlabelled=True)
            items.append(item if requests else None)  # an empty text has no windows
        return items

    @cached_property
    def rows(self) -> list[Tokens]:
        """What a model reads for all items, each row once, the longest first."""
        return self._rows(item for by_task in self._items.values() for _, own in by_task for item in own)

    def _rows(self, items: Iterable[Item | None]) -> list[Tokens]:
        rows = {self._row(request) for item in items if item is not None for request in item.requests}
        return sorted(rows, key=lambda row: (-len(row), row))

    def _row(self, request: Request) -> Tokens:
        """What a model reads for a request: as much of its end as the context takes."""
        return (*request.context, *request.continuation)[-(self._max_length + 1) : -1]

    def losses_of(
        self, model: Any, items: Sequence[Item], descent: Descent | None, max_length: int, device: torch.device
    ) -> torch.Tensor:
        """See `Losses`. Without a descent, targets are zero and layers are not scaled."""
        rows = [self._row(request) for item in items for request in item.requests]
        hidden, logits = outputs(model, rows)
        targets: Iterable[torch.Tensor | None] = [None] * len(hidden)
        heads, factors = None, torch.ones(len(hidden) + 1, len(rows))
        if descent is not None:
            owners = [item.objective for item in items for _ in item.requests]
            sources = [descent.sources_by_name[owner] for owner in owners]
            averages = [self._average(name_of(row), own) for row, own in zip(rows, sources, strict=True)]
            targets = torch.nn.utils.rnn.pad_sequence([own.transpose(0, 1) for own in averages]).permute(2, 1, 0, 3)
            heads = torch.stack([self._average(head_of(row), own) for row, own in zip(rows, sources, strict=True)])
            factors = torch.stack([self._factors(owner) for owner in owners], dim=1)
        counts = torch.tensor([min(len(row), PLACES) for row in rows])
        shares = (torch.arange(hidden[0].shape[1]) < counts[:, None]) / counts[:, None]  # of a row's tokens in its loss
        total = _squares(logits, heads) * factors[-1].to(logits.device)
        for own, target, factor in zip(hidden, targets, factors[:-1], strict=True):
            distances = (_squares(own, target) * shares.to(own.device)).sum(dim=-1)
            total = total + (distances * factor.to(own.device)).to(total.device)
        pieces = torch.split(total.to(device), [len(item.requests) for item in items])
        return torch.stack([piece.mean() for piece in pieces])

    def _read(self, model: str, name: str) -> torch.Tensor:
        assert self._outputs_of is not None
        return self._outputs_of(model).read(name)

    def _average(self, name: str, sources: Mapping[str, float]) -> torch.Tensor:
        """The weighted average of what sources put out, float32."""
        first, *others = (weight * self._read(model, name).float() for model, weight in sources.items())
        return sum(others, first)

    def _factors(self, objective: str) -> torch.Tensor:
        """What the distances of each layer and of the logits are multiplied by, float32, shape (layers + 1,). The
        products add up to 1 where each distance is that of the models from the base."""
        if objective not in self._scales:
            self._scales[objective] = self._made_factors(objective)
        return self._scales[objective]

    def _made_factors(self, objective: str) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        for row in self._rows(item for _, items in self._items[objective] for item in items):
            base, logits = (self._read(self._base, name(row)).double() for name in (name_of, head_of))
            for model in self._models:
                away = (self._read(model, name_of(row)).double() - base).square().mean(dim=(1, 2))
                behind = (self._read(model, head_of(row)).double() - logits).square().mean()
                total = total + torch.cat([away, behind[None]])
                count += 1
        scales, counted = total / count, total > 0
        return torch.where(counted, 1 / (scales * counted.sum()), 0.0).float()


def _squares(own: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
    """The mean squared distance over the last dimension, float32."""
    away = own.float() if target is None else own.float() - target.to(own.device)
    return away.square().mean(dim=-1)
