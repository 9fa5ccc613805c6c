"""Losses on search items that gradients can follow, in mini-batches that are packed anew.

The loss of an item is the negative log-likelihood of its reference. Where the item has options, it is the cross-entropy
over them, by the likelihoods that the task's metric compares. A log-likelihood is divided by the mean number of tokens
of the objective's references, so that long answers do not count more than short ones. The loss of an objective is the
mean over its items.

Without labels, the loss of an item is the entropy of the model's answer: over the options, or over the first token that
it would write (Yang et al. 2024, AdaMerging, arXiv:2310.02575, section 3.3).
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from evomerge.candidate import Descent
from evomerge.config.scoring import ObjectiveConfig
from evomerge.errors import CandidateFailed
from evomerge.evaluation.items import part
from evomerge.evaluation.likelihoods import PreparedRequests, Request, entropies, likelihoods
from evomerge.evaluation.loading import Target
from evomerge.evaluation.references import Reference, options_of, references

_ALIKE = 0.7  # rows that are shorter are read apart, since padding costs as much as text
TaskDocuments = Sequence[Sequence[Any]]  # lm-eval's instances of each document


class Encode(Protocol):
    """Makes requests of lm-eval's instances."""

    def __call__(self, instance: Any, continuation: str | None = None) -> list[Request]:
        """The requests for the log-likelihood of an instance's own continuation, or of a text that follows its prompt;
        none where that has no tokens. With an empty text, one that reads what follows the prompt."""
        ...


@dataclass(frozen=True, slots=True)
class Item:
    """A document of an objective with what its loss is made of.

    objective: the objective's name.
    requests: the requests for log-likelihoods: one for each option, or two where those without the question are
        subtracted, which come last.
    right: for each option, whether it is right; empty where all requests are the reference.
    lengths: for each request, what its log-likelihood is divided by.
    unlabelled: whether the loss is an entropy: over the options, or where there are none over the token that follows
        the prompt.
    """

    objective: str
    requests: tuple[Request, ...]
    right: tuple[bool, ...]
    lengths: tuple[float, ...]
    unlabelled: bool = False

    @property
    def open(self) -> bool:
        """Whether its loss is the entropy over all tokens."""
        return self.unlabelled and not self.right

    @property
    def longest(self) -> int:
        """The length of its longest row, in tokens."""
        return max(len(request.context) + len(request.continuation) for request in self.requests)

    def loss(self, values: torch.Tensor) -> torch.Tensor:
        """The item's loss, a scalar.

        values: one for each request, shape (requests,): its log-likelihood, or the entropy where the item is open.
        """
        if self.open:
            return values.sum()
        if not self.right:
            return -(values / values.new_tensor(self.lengths)).sum()
        given, alone = values[: len(self.right)], values[len(self.right) :]
        scores = (given - alone if len(alone) else given) / given.new_tensor(self.lengths)
        if self.unlabelled:
            chances = scores.log_softmax(0)
            return -(chances.exp() * chances).sum()
        right = torch.tensor(self.right, device=scores.device)
        return scores.logsumexp(0) - scores[right].logsumexp(0)


class Losses:
    """The losses of a search's objectives and constraints on its search items."""

    def __init__(
        self,
        objectives: Sequence[ObjectiveConfig],
        targets: Mapping[str, Target],
        documents: Mapping[int, TaskDocuments],
        encode: Encode,
        seed: int,
        chat: bool = False,
        unlabelled: bool = False,
    ) -> None:
        """Makes the references, and drops items that have none.

        objectives: the metrics of the search, costs left out.
        targets: their tasks.
        documents: each task's search documents, by the task's `id()`.
        encode: makes requests of lm-eval's instances.
        seed: of the division of items.
        chat: whether prompts follow the model's chat template.
        unlabelled: whether losses are entropies, so that references are not needed.
        """
        self._seed, self._unlabelled = seed, unlabelled
        self._tasks = {objective.name: objective.task for objective in objectives}
        self._items: dict[str, list[tuple[str, list[Item | None]]]] = {}
        for objective in objectives:
            target = targets[objective.task]
            filter_name = objective.filter or target.filters()[0]
            made = [
                (task.config.task, self.make(task, objective, filter_name, documents[id(task)], encode, chat))
                for task in target.tasks
            ]
            self._items[objective.name] = _normalized(made)

    def make(
        self,
        task: Any,
        objective: ObjectiveConfig,
        filter_name: str,
        documents: TaskDocuments,
        encode: Encode,
        chat: bool,
    ) -> list[Item | None]:
        """An item for each document of a task; None for documents without a loss.

        task: lm-eval's.
        objective: the metric.
        filter_name: the filter whose output the metric compares.
        documents: the task's instances, by document.
        encode: makes requests of instances.
        chat: whether prompts follow the model's chat template.
        """
        items = _unlabelled_items if self._unlabelled else _items
        return items(task, objective, filter_name, documents, encode, chat)

    def losses_of(
        self, model: Any, items: Sequence[Item], descent: Descent | None, max_length: int, device: torch.device
    ) -> torch.Tensor:
        """The loss of each item, float32, shape (items,).

        model: the candidate.
        items: those of a batch.
        descent: what is asked for; None in a rehearsal.
        max_length: the model's context in tokens.
        device: where batches are kept.
        """
        return _losses(model, items, max_length, device)

    def of_tasks(self, tasks: Collection[str] | None, most: int) -> list[Item]:
        """The items that have a reference, each once, in their order.

        tasks: the names of the objectives' tasks whose items are asked for; None for all of them.
        most: at most how many items of a task are taken.
        """
        taken: dict[tuple[Request, ...], Item] = {}
        for name, by_task in self._items.items():
            if tasks is None or self._tasks[name] in tasks:
                for _, items in by_task:
                    for item in [item for item in items if item is not None][:most]:
                        taken.setdefault(item.requests, item)
        return list(taken.values())

    def chosen(self, descent: Descent) -> dict[str, list[Item]]:
        """The items of one shard of a mini-batch, by objective.

        descent: the mini-batch, and which shard of it.
        """
        return {
            name: self._mini_batch(name, descent)[descent.shard :: descent.shards] for name in descent.weights_by_name
        }

    def _mini_batch(self, objective: str, descent: Descent) -> list[Item]:
        """The items of the whole mini-batch, in their order."""
        chosen = []
        for task, items in self._items[objective]:
            subset = descent.subset
            places = range(len(items)) if subset is None else part(self._seed, subset, task, len(items))
            chosen += [item for place in places if (item := items[place]) is not None]
        return chosen

    def follow(
        self, model: Any, descent: Descent, batch_size: int, max_length: int, device: torch.device
    ) -> dict[str, float]:
        """The share of one shard in the mean loss of each objective. Runs the backward passes of their weighted sum.

        model: the candidate.
        descent: the mini-batch, which shard of it, and the weight of each objective.
        batch_size: how many rows the model reads at a time.
        max_length: the model's context in tokens.
        device: where batches are kept.
        Raises CandidateFailed where a loss is not finite.
        """
        weights = descent.weights_by_name
        counts = {name: len(self._mini_batch(name, descent)) for name in weights}
        totals = dict.fromkeys(weights, 0.0)
        together = [item for items in self.chosen(descent).values() for item in items]
        for batch in _batches(together, batch_size):
            losses = self.losses_of(model, batch, descent, max_length, device)
            for item, loss in zip(batch, losses.tolist(), strict=True):
                totals[item.objective] += loss / counts[item.objective]
            factors = losses.new_tensor([weights[item.objective] / counts[item.objective] for item in batch])
            if factors.any() and losses.requires_grad:
                torch.autograd.backward((losses * factors).sum())
        for name, total in totals.items():
            if not math.isfinite(total):
                raise CandidateFailed(f"the loss of {name} is {total}")
        return totals

    def rehearse(self, model: Any, batch_size: int, max_length: int, device: torch.device) -> None:
        """Runs the pass forward and back that takes the most memory, and drops the result.

        model: the candidate, on the meta device.
        batch_size, max_length, device: as in `follow`.
        """
        items = [item for by_task in self._items.values() for _, own in by_task for item in own if item is not None]
        batches = _batches(items, batch_size)
        largest = max(batches, key=lambda batch: batch[0].longest * sum(len(item.requests) for item in batch))
        torch.autograd.backward(self.losses_of(model, largest, None, max_length, device).sum())


def _items(
    task: Any, objective: ObjectiveConfig, filter_name: str, documents: TaskDocuments, encode: Encode, chat: bool
) -> list[Item | None]:
    made = references(task, objective, filter_name, [instances[0].doc for instances in documents], chat)
    items = [
        None if reference is None else _item(objective.name, reference, instances, encode)
        for reference, instances in zip(made, documents, strict=True)
    ]
    return [item if item is not None and item.requests else None for item in items]  # an empty text has no windows


def _unlabelled_items(
    task: Any, objective: ObjectiveConfig, filter_name: str, documents: TaskDocuments, encode: Encode, chat: bool
) -> list[Item | None]:
    """Items whose answers are not looked at. A rolling likelihood is that of the text itself, so it stays as it is."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return _items(task, objective, filter_name, documents, encode, chat)
    items: list[Item | None] = []
    for instances in documents:
        options = options_of(task, objective.metric, instances[0].doc)
        if options is not None:
            item = _item(objective.name, options, instances, encode)
            items.append(replace(item, unlabelled=True))
        else:
            (request,) = encode(instances[0], "")
            items.append(Item(objective.name, (request,), (), (1.0,), unlabelled=True))
    return items


def _item(objective: str, reference: Reference, instances: Sequence[Any], encode: Encode) -> Item:
    if reference.text is not None:
        requests = encode(instances[0], reference.text)
        return Item(objective, tuple(requests), (), (1.0,) * len(requests))
    given = instances[: len(reference.right)] if reference.right and not reference.mutual else instances
    requests = [request for instance in given for request in encode(instance)]
    return Item(objective, tuple(requests), reference.right, reference.lengths or (1.0,) * len(requests))


def _normalized(by_task: list[tuple[str, list[Item | None]]]) -> list[tuple[str, list[Item | None]]]:
    """Items whose log-likelihoods are divided by the mean number of tokens of all references."""
    plain = [item for _, items in by_task for item in items if item is not None and not (item.right or item.unlabelled)]
    if not plain:
        return by_task
    tokens = sum(len(request.continuation) for item in plain for request in item.requests) / len(plain)

    def normalized(item: Item | None) -> Item | None:
        if item is None or item.right or item.unlabelled:
            return item
        return Item(item.objective, item.requests, (), (tokens,) * len(item.requests))

    return [(task, [normalized(item) for item in items]) for task, items in by_task]


def _batches(items: Sequence[Item], batch_size: int) -> Iterator[list[Item]]:
    """The items, the longest first, in batches of at most `batch_size` rows. All rows of an item are in one batch, and
    open items are in batches of their own."""
    batch: list[Item] = []
    rows = 0
    for item in sorted(items, key=lambda item: (item.open, -item.longest)):
        if batch and (rows + len(item.requests) > batch_size or item.open != batch[0].open):
            yield batch
            batch, rows = [], 0
        batch.append(item)
        rows += len(item.requests)
    if batch:
        yield batch


def _losses(model: Any, items: Sequence[Item], max_length: int, device: torch.device) -> torch.Tensor:
    """The loss of each item, float32, shape (items,)."""
    requests = [request for item in items for request in item.requests]
    prepared = PreparedRequests(requests, len(requests), max_length, device, alike=_ALIKE)
    values = entropies(model, prepared) if items[0].open else likelihoods(model, prepared)
    pieces = torch.split(values, [len(item.requests) for item in items])
    return torch.stack([item.loss(piece) for item, piece in zip(items, pieces, strict=True)])
