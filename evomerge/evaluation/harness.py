"""lm-eval's tasks on the resident model, prepared once and scored for every candidate.

Requests are built and tokenized once. For each candidate only the model runs. lm-eval's own filters, metrics and
aggregations turn its responses into scores.
"""

import math
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from evomerge.candidate import Descent, Shard, Subset
from evomerge.config.base import Split
from evomerge.config.scoring import ObjectiveConfig
from evomerge.config.search import SearchConfig
from evomerge.config.tables import COSTS, imported
from evomerge.errors import CandidateFailed, EvomergeError, InputError
from evomerge.evaluation import few_shots
from evomerge.evaluation.activations import LayerLosses, OutputsOf
from evomerge.evaluation.calibration import Calibration, texts_of
from evomerge.evaluation.generation import GenerationBatch, GenerationPlan, TransformersWriter, Writer
from evomerge.evaluation.items import Division, part
from evomerge.evaluation.likelihoods import Answers, PreparedRequests, Request, Response, tolerance
from evomerge.evaluation.loading import (
    Target,
    cause,
    distinct_tasks,
    forked,
    load_targets,
    of_metrics,
    only_reported,
)
from evomerge.evaluation.losses import Item as LossItem
from evomerge.evaluation.losses import Losses
from evomerge.evaluation.margins import Choices, choices_of
from evomerge.evaluation.metrics import task_metrics
from evomerge.evaluation.own_scores import Item, OwnItems
from evomerge.evaluation.packing import Tokens as Row
from evomerge.outcomes import Outcomes
from evomerge.quiet import quiet
from evomerge.seen import Digests

_SUBSETS_KEPT = 4  # the generations that are in flight at once share a few
_WRITING = 10  # how many tokens can be read while one is written, roughly; it decides only how evenly shards are cut
WHOLE = Shard(0, 1)


@dataclass(frozen=True, slots=True)
class SplitScores:
    """The scores of a model on one split.

    scores: the metric's value, by objective.
    outcomes: the values of the single items, by objective; only where the score is their mean.
    items: how many items were scored in all.
    truncated: how many prompts lost their beginning, since they do not fit the model's context.
    """

    scores: Mapping[str, float]
    outcomes: Mapping[str, Outcomes]
    items: int
    truncated: int = 0


@dataclass(frozen=True, slots=True)
class ShardAnswers:
    """What a model answered to one shard of the batches of some metrics.

    likelihoods: the answers to log-likelihood requests.
    texts: the texts of each batch.
    """

    likelihoods: Answers
    texts: list[list[str]]


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a model has to do to be scored.

    read: how many tokens it reads, padding included.
    written: how many tokens it writes at most.
    """

    read: int
    written: int


class Harness:
    """The tasks of a search, prepared for one resident model. A split is built when it is first needed."""

    def __init__(
        self,
        config: SearchConfig,
        model: Any,
        tokenizer: Any,
        writer: Writer | None = None,
        seen: Digests = frozenset(),
        targets: Mapping[str, Target] | None = None,
        own: OwnItems | None = None,
        outputs_of: OutputsOf | None = None,
    ) -> None:
        """Takes a model and its tokenizer, and builds nothing yet.

        config: the search's.
        model: the resident model.
        tokenizer: the base model's.
        writer: writes texts with the resident model's weights; by default the model itself.
        seen: digests of items that must not be held out (`evomerge.seen`).
        targets: the tasks that the config measures, where they are loaded already; by default they are loaded here.
        own: the items of the user's own scores; by default there are none.
        outputs_of: what the layers of each model put out, where the loss compares layers.
        Raises InputError for a task that cannot be loaded.
        """
        self._config, self._model, self._writer, self._seen = config, model, writer, seen
        self._own = own or OwnItems()
        self._outputs_of = outputs_of
        self._targets = targets or load_targets(config.reported, config.tasks, config.evaluation)
        with quiet():
            from lm_eval.models.huggingface import HFLM

            self._lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.evaluation.batch_size)
        self._splits: dict[str, _PreparedSplit] = {}

    def prepare(self, split: Split) -> None:
        """Builds and tokenizes a split's requests, unless this has been done.

        Raises InputError for a task whose requests cannot be built, and where packed rows get other log-likelihoods
        than full rows.
        """
        for name, metrics in self._parts(split).items():
            if name not in self._splits:
                with quiet():
                    targets = forked(self._targets)
                    self._splits[name] = _PreparedSplit(
                        self._config, self._lm, split, self._seen, targets, metrics, self._own, self._outputs_of
                    )
                    if self._model.device.type != "meta":
                        self._splits[name].check_packing(self._model)

    def _parts(self, split: Split) -> dict[str, list[ObjectiveConfig]]:
        """The metrics that a split measures. Those of tasks that are only reported are a part of their own, so that the
        batches of all others are the same with and without them."""
        measured = list(self._config.measured)
        if split != "heldout":
            return {split: measured}
        apart = only_reported(self._config, self._targets)
        parts = {split: measured, "report": list[ObjectiveConfig]()}
        for metric in self._config.reported[len(measured) :]:
            if metric.task:
                alone = any(task in apart for task in self._targets[metric.task].tasks)
                parts["report" if alone else split].append(metric)
        return {name: metrics for name, metrics in parts.items() if metrics}

    def _prepared(self, split: Split) -> "list[_PreparedSplit]":
        self.prepare(split)
        return [self._splits[name] for name in self._parts(split)]

    def left_out(self, split: Split) -> int:
        """How many items of a split were left out because a search has seen them."""
        parts = self._prepared(split)
        return sum(prepared.left_out for prepared in parts) + parts[0].own_left_out

    def own_items(self, split: Split) -> Mapping[str, Sequence[Item]]:
        """The items of a split that the user's own scores have, by the name of the score."""
        return self._prepared(split)[0].own_items

    def tokens(self, split: Split, shard: Shard = WHOLE) -> Tokens:
        """What a model has to do to be scored on one shard of a split."""
        counts = [prepared.whole.tokens(shard) for prepared in self._prepared(split)]
        return Tokens(sum(count.read for count in counts), sum(count.written for count in counts))

    @property
    def texts(self) -> list[GenerationBatch]:
        """The texts to be written for all prepared splits, as batches."""
        return [batch for split in self._splits.values() for batch in split.whole.texts.batches]

    def rehearse_descent(self, model: Any) -> None:
        """Has a model on the meta device run the pass forward and back that takes the most memory."""
        self.prepare("search")
        self._lm._model = model
        with quiet(), torch.enable_grad():
            self._splits["search"].rehearse_descent(model)

    def rehearse(self, split: Split, model: Any) -> None:
        """Has a model run the batches of a split that take the most memory.

        split: the split whose batches are run.
        model: a model on the meta device, where nothing is computed.
        """
        parts = self._prepared(split)
        self._lm._model = model
        with quiet():
            for prepared in parts:
                prepared.whole.rehearse(model, writes=self._config.evaluation.backend == "hf")

    def evaluate(self, split: Split, model: Any = None, subset: Subset | None = None) -> SplitScores:
        """The scores of a model on a split, or on a subset of its items.

        split: the split.
        model: by default the resident model; it may also be one with other layers than that.
        subset: the items to be scored; None for all of the split.
        Raises CandidateFailed and InputError as `answers` and `scores` do.
        """
        return self.scores(split, subset, [(WHOLE, self.answers(split, model, subset))])

    def answers(
        self, split: Split, model: Any = None, subset: Subset | None = None, shard: Shard = WHOLE
    ) -> list[ShardAnswers]:
        """What a model answers to one shard of a split, or of a subset of its items.

        Shards are made of whole batches, so an answer is the same to the bit however many shards there are.

        split, model, subset: as in `evaluate`.
        shard: which shard.
        Raises CandidateFailed where vLLM disagrees with the model, and InputError for a model with other layers where
        vLLM writes the texts.
        """
        if self._writer is not None and model not in (None, self._model):
            raise InputError(
                "evaluation.backend is vllm, whose engine has the base's layers in their order, and this recipe has "
                "others; use hf."
            )
        parts = self._prepared(split)
        self._lm._model = self._model if model is None else model
        with quiet():
            writer = self._writer or TransformersWriter(self._lm)
            return [prepared.answers(self._lm._model, subset, writer, shard) for prepared in parts]

    def is_empty(self, split: Split, subset: Subset | None, shard: Shard) -> bool:
        """Whether a shard has nothing to be scored, since there are fewer batches than shards."""
        return all(prepared.is_empty(subset, shard) for prepared in self._prepared(split))

    def scores(
        self, split: Split, subset: Subset | None, answered: Sequence[tuple[Shard, Sequence[ShardAnswers]]]
    ) -> SplitScores:
        """The scores that follow from the answers to all shards.

        split, subset: as in `evaluate`.
        answered: every shard with its answers, in any order.
        Raises CandidateFailed where a metric is not finite.
        """
        with quiet():
            return _joined(
                [
                    prepared.scores(subset, [(shard, answers[number]) for shard, answers in answered])
                    for number, prepared in enumerate(self._prepared(split))
                ]
            )

    def descend(self, model: Any, descent: Descent) -> dict[str, float]:
        """The share of one shard in the mean loss of each metric, on search items. Runs the backward passes of their
        weighted sum where derivatives are wanted.

        model: the candidate.
        descent: the mini-batch, and which shard of it.
        Raises CandidateFailed where a loss is not finite.
        """
        self.prepare("search")
        self._lm._model = model
        with quiet(), torch.set_grad_enabled(bool(descent.wanted)):
            return self._splits["search"].descend(model, descent)

    @cached_property
    def compared_rows(self) -> list[Row]:
        """What models read so that the outputs of their layers can be compared, each row once, the longest first.

        Raises InputError where there is nothing to read.
        """
        self.prepare("search")
        with quiet():
            rows = self._splits["search"].compared_rows()
        if not rows:
            raise InputError("no search item has a text on which layers could be compared; use another loss.")
        return rows

    @cached_property
    def learned_digest(self) -> str:
        """16 hexadecimal digits that stand for all search items from which a search can learn along gradients."""
        self.prepare("search")
        with quiet():
            items = self._splits["search"].items_of_tasks(None, sys.maxsize)
        return Calibration(items, self._lm.max_length).digest

    def calibration(self, model: str) -> Calibration:
        """What statistics of a model are measured on, as the search file says.

        model: its name in the search file, or `base`.
        Raises InputError where there is nothing to measure on.
        """
        settings, limit = self._config.statistics, self._lm.max_length
        file = settings.file_of(model)
        if file is not None:
            return Calibration(texts_of(Path(file), self._lm, settings, min(limit, settings.length)), limit)
        self.prepare("search")
        tasks = settings.tasks.get(model)
        with quiet():
            items = self._splits["search"].items_of_tasks(tasks, settings.items)
        if not items:
            raise InputError(
                f"statistics: no search item of {', '.join(tasks) if tasks else 'the tasks'} has a reference answer to "
                f"measure {model} on; give statistics.texts."
            )
        return Calibration(items, limit)


def _joined(parts: Sequence[SplitScores]) -> SplitScores:
    """The scores of a split's parts as one."""
    return SplitScores(
        {name: score for scores in parts for name, score in scores.scores.items()},
        {name: outcomes for scores in parts for name, outcomes in scores.outcomes.items()},
        sum(scores.items for scores in parts),
        sum(scores.truncated for scores in parts),
    )


class _PreparedSplit:
    """The tasks of some metrics on a split, with their instances, their tokens, and lm-eval's code to score them."""

    def __init__(
        self,
        config: SearchConfig,
        lm: Any,
        split: Split,
        seen: Digests,
        targets: Mapping[str, Target],
        metrics: Sequence[ObjectiveConfig],
        own: OwnItems,
        outputs_of: OutputsOf | None = None,
    ) -> None:
        self._outputs_of = outputs_of
        self._config, self._lm, self._targets, self._metrics = config, lm, targets, metrics
        tasks, searched = (distinct_tasks(of_metrics(named, targets)) for named in (metrics, config.measured))
        division = Division(
            [*searched, *own.searched.values()],
            config.items,
            seen,
            [*only_reported(config, targets), *own.reported.values()],
        )
        own_tasks = {**own.searched, **own.reported}
        self.own_items = {
            name: [task.test_docs()[place] for place in division.of(task, split)] for name, task in own_tasks.items()
        }
        heldout = split == "heldout"
        self.left_out = sum(division.left_out[task] for task in tasks) if heldout else 0
        self.own_left_out = sum(division.left_out[task] for task in own_tasks.values()) if heldout else 0
        self._tasks = [_PreparedTask(task, config, lm, split, division) for task in tasks]
        documents = [instances for task in self._tasks for instances in task.documents]
        self._encoded = {
            id(instance): _encode(lm, instance, number)
            for number, instances in enumerate(documents)
            for instance in instances
            if instance.request_type != "generate_until"
        }
        self.whole = self._batches([range(len(task.documents)) for task in self._tasks])
        self._subsets: OrderedDict[Subset, _Batches] = OrderedDict()

    @cached_property
    def _losses(self) -> Losses:
        """Made for the first gradient that is asked for."""
        return self._losses_of(self._config.optimizer.learning.loss)

    def _losses_of(self, loss: str) -> Losses:
        measured = [metric for metric in self._config.measured if metric.task]
        documents = {id(task.task): task.documents for task in self._tasks}
        encode = partial(_encode_answer, self._lm)
        chat = self._config.evaluation.apply_chat_template
        given = measured, self._targets, documents, encode, self._config.items.seed, chat
        if loss == "activations":
            base, models = self._config.base, list(self._config.models.values())
            limit = self._lm.max_length
            return LayerLosses(*given, base=base, models=models, max_length=limit, outputs_of=self._outputs_of)
        return Losses(*given, unlabelled=loss == "entropy")

    def compared_rows(self) -> list[Row]:
        losses = self._losses_of("activations")
        assert isinstance(losses, LayerLosses)
        return losses.rows

    def items_of_tasks(self, tasks: Sequence[str] | None, most: int) -> list[LossItem]:
        return self._losses_of("likelihood").of_tasks(tasks, most)

    def descend(self, model: Any, descent: Descent) -> dict[str, float]:
        return self._losses.follow(model, descent, *self._limits)

    def rehearse_descent(self, model: Any) -> None:
        self._losses.rehearse(model, *self._limits)

    @property
    def _limits(self) -> tuple[int, int, torch.device]:
        """Rows at a time, the model's context, and where batches are kept."""
        batch_size = self._config.optimizer.learning.batch_size or self._config.evaluation.batch_size
        return batch_size, self._lm.max_length, torch.device(self._lm.device)

    def _batches(self, chosen: "Sequence[Sequence[int]]") -> "_Batches":
        return _Batches(self._config, self._lm, self._tasks, chosen, self._encoded)

    def _subset(self, subset: Subset | None) -> "_Batches":
        """The batches of a subset's documents, made for the first candidate that is scored on it."""
        if subset is None:
            return self.whole
        if subset not in self._subsets:
            seed = self._config.items.seed
            chosen = [part(seed, subset, task.task.config.task, len(task.documents)) for task in self._tasks]
            self._subsets[subset] = self._batches(chosen)
            while len(self._subsets) > _SUBSETS_KEPT:
                self._subsets.popitem(last=False)
        return self._subsets[subset]

    def check_packing(self, model: Any) -> None:
        """Raises InputError where this model gives packed rows other log-likelihoods than full rows."""
        both = self.whole.requests.sample()
        if both is None:
            return
        full = both[1].run(model)
        try:
            packed = both[0].run(model)
        except Exception as error:  # architectures refuse a mask with all kinds of exceptions
            raise InputError(
                f"evaluation.prefix_sharing is 'mask', which this model does not take ({cause(error)}); use 'none'."
            ) from None
        difference = max(
            abs(mine.log_likelihood - other.log_likelihood) for mine, other in zip(packed, full, strict=True)
        )
        longest = max(len(request.continuation) for request in both[1].requests)
        if not difference <= tolerance(model.dtype) * longest:
            raise InputError(
                "evaluation.prefix_sharing is 'mask', but with it this model's log-likelihoods differ by "
                f"{difference:.2g} from those without; set it to 'none'."
            )

    def answers(self, model: Any, subset: Subset | None, writer: Writer, shard: Shard) -> ShardAnswers:
        return self._subset(subset).answers(model, writer, shard)

    def is_empty(self, subset: Subset | None, shard: Shard) -> bool:
        return not self._subset(subset).units(shard)

    def scores(self, subset: Subset | None, answered: Sequence[tuple[Shard, ShardAnswers]]) -> SplitScores:
        batches = self._subset(subset)
        answers = batches.respond(answered)
        results = {
            id(task.task): task.results(chosen, answers)
            for task, chosen in zip(self._tasks, batches.chosen, strict=True)
        }
        scores, outcomes = {}, {}
        for objective in self._metrics:
            if objective.cost is not None and COSTS[objective.cost].of_texts:
                scores[objective.name], outcomes[objective.name] = self._of_texts(objective.cost, batches.chosen)
            if not objective.task:
                continue
            scores[objective.name], by_item = self._score(objective, results)
            if by_item is not None:
                outcomes[objective.name] = by_item
        return SplitScores(scores, outcomes, sum(map(len, batches.chosen)), batches.truncated)

    def _of_texts(self, cost: str, chosen: Sequence[Sequence[int]]) -> tuple[float, Outcomes]:
        """A cost of the texts that were written to chosen documents: its mean, and what it is for each of them.

        chosen: for each task, the places of its chosen documents.
        """
        measure, encode = imported(COSTS[cost].measure), partial(self._lm.tok_encode, add_special_tokens=False)
        values, flags = list[float](), list[bool]()
        for task, places in zip(self._tasks, chosen, strict=True):
            if task.task.OUTPUT_TYPE != "generate_until":
                continue
            kept = set(places)
            flags += [place in kept for place in range(len(task.documents))]
            values += [measure(task.documents[place][0].resps, encode) for place in places]
        return sum(values) / len(values), Outcomes.of(values, None, None if all(flags) else flags)

    def _score(self, objective: ObjectiveConfig, results: "Mapping[int, _Results]") -> tuple[float, Outcomes | None]:
        """An objective's score, and its items' outcomes where the score is their mean."""
        from lm_eval.api.metrics import aggregate_subtask_metrics

        target = self._targets[objective.task]
        metric, filter_name = objective.metric, objective.filter or target.filters()[0]
        values = [results[id(task)].values[metric, filter_name] for task in target.tasks]
        aggregates = [task.aggregation()[metric] for task in target.tasks]
        scores = [_finite(objective.name, *pair) for pair in zip(aggregates, values, strict=True)]
        by_size = target.by_size is None or target.by_size[metric]
        sizes = [len(task_values) for task_values in values]
        score = scores[0] if target.by_size is None else aggregate_subtask_metrics(scores, sizes, by_size)
        if not target.by_item(metric, sizes):
            return score, None
        margins = [results[id(task)].margins.get(metric) for task in target.tasks]
        given_margins = [task_margins for task_margins in margins if task_margins is not None]
        chosen = [flag for task in target.tasks for flag in results[id(task)].chosen]
        return score, Outcomes.of(
            [float(value) for task_values in values for value in task_values],
            [margin for task_margins in given_margins for margin in task_margins]
            if len(given_margins) == len(margins)
            else None,
            None if all(chosen) else chosen,
        )


@dataclass(frozen=True, slots=True)
class _Results:
    """What became of the chosen documents of a task.

    values: one value per chosen document, by metric and filter.
    margins: one margin per chosen document, by metric.
    chosen: for every document of the task, whether it was chosen.
    """

    values: Mapping[tuple[str, str], list[Any]]
    margins: Mapping[str, list[float]]
    chosen: list[bool]


@dataclass(frozen=True, slots=True)
class _Unit:
    """Batches that must be run by one worker: one batch, or all that write texts from one seed.

    likelihoods: the numbers of batches of log-likelihood requests.
    texts: the numbers of batches of texts.
    cost: roughly how long they take, in tokens.
    """

    likelihoods: tuple[int, ...]
    texts: tuple[int, ...]
    cost: int


def _cost(batch: GenerationBatch) -> int:
    """Roughly how long it takes to write the texts of a batch, in tokens that are read."""
    return batch.ids.numel() + _WRITING * len(batch.ids) * batch.fresh


def _evenly(units: Sequence[_Unit], count: int) -> list[list[_Unit]]:
    """Units divided into shards of about the same cost: the dearest first, each to the cheapest shard so far (Graham
    1969). Some shards are empty where there are fewer units than shards."""
    shards: list[list[_Unit]] = [[] for _ in range(count)]
    costs = [0] * count
    for unit in sorted(units, key=lambda unit: -unit.cost):
        cheapest = costs.index(min(costs))
        shards[cheapest].append(unit)
        costs[cheapest] += unit.cost
    return shards


class _Batches:
    """The requests of chosen documents as frozen batches."""

    def __init__(
        self,
        config: SearchConfig,
        lm: Any,
        tasks: "Sequence[_PreparedTask]",
        chosen: Sequence[Sequence[int]],
        encoded: Mapping[int, list[Request]],
    ) -> None:
        """chosen: for each task, the places of its chosen documents, ascending.
        encoded: the requests of each instance, by its `id()`.
        """
        self.chosen = chosen
        instances = [
            instance
            for task, places in zip(tasks, chosen, strict=True)
            for place in places
            for instance in task.documents[place]
        ]
        self.likelihoods = [instance for instance in instances if instance.request_type != "generate_until"]
        self.generations = [instance for instance in instances if instance.request_type == "generate_until"]
        self._spans = [len(encoded[id(instance)]) for instance in self.likelihoods]
        self.requests = PreparedRequests(
            [request for instance in self.likelihoods for request in encoded[id(instance)]],
            config.evaluation.batch_size,
            lm.max_length,
            torch.device(lm.device),
            packed=config.evaluation.prefix_sharing == "mask",
        )
        self.texts = GenerationPlan(lm, self.generations, config.evaluation.batch_size)
        self._together = self.texts.draws or config.evaluation.backend == "vllm"
        self._shards: dict[int, list[list[_Unit]]] = {}

    @property
    def truncated(self) -> int:
        return self.requests.truncated + self.texts.truncated

    def units(self, shard: Shard) -> list[_Unit]:
        """The batches of a shard, in their order."""
        if shard.count not in self._shards:
            self._shards[shard.count] = _evenly(list(self._all_units()), shard.count)
        return self._shards[shard.count][shard.number]

    def _all_units(self) -> Iterator[_Unit]:
        for number, batch in enumerate(self.requests.batches):
            yield _Unit((number,), (), batch.ids.numel())
        texts = tuple(range(len(self.texts.batches)))
        for chosen in [texts] if texts and self._together else [(number,) for number in texts]:
            yield _Unit((), chosen, sum(_cost(self.texts.batches[number]) for number in chosen))

    def _chosen(self, shard: Shard) -> tuple[list[int], list[int]]:
        """The numbers of a shard's batches: those of log-likelihoods, and those of texts."""
        units = self.units(shard)
        likelihoods, texts = ([unit.likelihoods for unit in units], [unit.texts for unit in units])
        return sorted(sum(likelihoods, ())), sorted(sum(texts, ()))

    def tokens(self, shard: Shard) -> Tokens:
        """The tokens of a shard."""
        likelihoods, texts = self._chosen(shard)
        writing = [self.texts.batches[number] for number in texts]
        read = sum(self.requests.batches[number].ids.numel() for number in likelihoods)
        return Tokens(
            read + sum(batch.ids.numel() for batch in writing), sum(len(batch.ids) * batch.fresh for batch in writing)
        )

    def answers(self, model: Any, writer: Writer, shard: Shard) -> ShardAnswers:
        """What a model answers to a shard."""
        likelihoods, texts = self._chosen(shard)
        return ShardAnswers(self.requests.answers(model, likelihoods), self.texts.answers(writer, texts))

    def respond(self, answered: Sequence[tuple[Shard, ShardAnswers]]) -> dict[int, list[Response]]:
        """Puts all responses where lm-eval looks for them. Returns the responses to log-likelihood requests, by
        the `id()` of the instance.

        answered: every shard with its answers.
        """
        chosen = [self._chosen(shard) for shard, _ in answered]
        given = [own for _, own in answered]
        read = [(numbers, own.likelihoods) for (numbers, _), own in zip(chosen, given, strict=True)]
        written = {
            number: texts
            for (_, numbers), own in zip(chosen, given, strict=True)
            for number, texts in zip(numbers, own.texts, strict=True)
        }
        responses = iter(self.requests.responses(read))
        answers = {}
        for instance, span in zip(self.likelihoods, self._spans, strict=True):
            answers[id(instance)] = [next(responses) for _ in range(span)]
            _respond(instance, answers[id(instance)])
        for instance, texts in zip(self.generations, self.texts.texts(written), strict=True):
            instance.resps, instance.filtered_resps = texts, {}
        return answers

    def rehearse(self, model: Any, writes: bool) -> None:
        """Has a model on the meta device run the batches that take the most memory.

        writes: whether the model writes texts itself.
        """
        self.requests.rehearse(model)
        if writes:
            self.texts.rehearse()


class _PreparedTask:
    """One of lm-eval's tasks with the instances of a split, by document."""

    def __init__(self, task: Any, config: SearchConfig, lm: Any, split: Split, division: Division) -> None:
        self.task = task
        try:
            _build(task, config, lm, split, division)
            self.documents = _by_document(task._instances)
            self._choices: list[Choices] | None = choices_of(task, self.documents)
        except EvomergeError:
            raise
        except Exception as error:
            raise InputError(
                f"task '{task.config.task}': lm-eval cannot build its requests ({cause(error)}); correct its file, or "
                "evaluation.num_fewshot where that is set."
            ) from None

    def results(self, chosen: Sequence[int], answers: Mapping[int, Sequence[Response]]) -> _Results:
        """The results of some documents, by lm-eval's own filters and metrics.

        chosen: the places of the documents; the results are in this order.
        answers: the responses to log-likelihood requests, by the `id()` of the instance.
        """
        values = task_metrics(self.task, [self.documents[place] for place in chosen])
        kept = set(chosen)
        return _Results(values, self._margins(chosen, answers), [place in kept for place in range(len(self.documents))])

    def _margins(self, chosen: Sequence[int], answers: Mapping[int, Sequence[Response]]) -> dict[str, list[float]]:
        if self.task.OUTPUT_TYPE == "loglikelihood":
            return {"acc": [answers[id(self.documents[place][0])][0].margin for place in chosen]}
        if self._choices is None:
            return {}
        margins: dict[str, list[float]] = defaultdict(list)
        for place in chosen:
            likelihoods = [answers[id(instance)][0].log_likelihood for instance in self.documents[place]]
            for metric, margin in self._choices[place].margins(likelihoods).items():
                margins[metric].append(margin)
        return margins


def _build(task: Any, config: SearchConfig, lm: Any, split: Split, division: Division) -> None:
    """Builds a task's instances for all documents, then keeps the split's. So the few-shot examples do not depend on
    which documents the split holds."""
    chosen = set(division.of(task, split))
    few_shots.prepare(task, division, split)
    evaluation = config.evaluation
    task.build_all_requests(
        system_instruction=evaluation.system_instruction,
        apply_chat_template=evaluation.apply_chat_template,
        fewshot_as_multiturn=evaluation.multiturn,
        chat_template=lm.apply_chat_template if evaluation.apply_chat_template else None,
        tokenizer_name=lm.tokenizer_name if evaluation.apply_chat_template else "",
    )
    task._instances = [instance for instance in task._instances if instance.doc_id in chosen]


def _by_document(instances: Sequence[Any]) -> list[list[Any]]:
    """The instances of each document, in the order of its options; documents in their order."""
    by_document: dict[int, list[Any]] = defaultdict(list)
    for instance in sorted(instances, key=lambda instance: (instance.doc_id, instance.idx)):
        by_document[instance.doc_id].append(instance)
    return list(by_document.values())


def _encode(lm: Any, instance: Any, document: int | None) -> list[Request]:
    """The log-likelihood requests of an instance: one, or for a rolling log-likelihood one per window."""
    if instance.request_type == "loglikelihood_rolling":
        return _windows(lm, instance.args[0])
    return _encode_pair(lm, instance, document)


def _encode_answer(lm: Any, instance: Any, continuation: str | None = None) -> list[Request]:
    """The requests for the log-likelihood of an instance's own answer, or of a text that a model might write.

    Such a text follows the tokens of the prompt alone, as when it is written. There is no request where it has no
    tokens. For an empty text there is one that reads what follows the prompt, whatever that is.
    """
    if continuation is None:
        return _encode(lm, instance, None)
    if not continuation:
        written = instance.request_type == "generate_until"
        prompt = lm.tok_encode(instance.args[0]) if written else _encode_pair(lm, instance, None)[0].context
        context = tuple(prompt) or (lm.prefix_token_id,)
        return [Request(context, context[-1:])]
    prompt, whole = lm.tok_encode(instance.args[0]), lm.tok_encode(instance.args[0] + continuation)
    written = whole[len(prompt) :] if whole[: len(prompt)] == prompt else []
    written = written or lm.tok_encode(continuation, add_special_tokens=False)
    return [Request(tuple(prompt or [lm.prefix_token_id]), tuple(written))] if written else []


def _encode_pair(lm: Any, instance: Any, document: int | None) -> list[Request]:
    """The request for the log-likelihood of an instance's own answer."""
    context, continuation = instance.args
    if context:
        before, after = lm._encode_pair(context, continuation)
    else:
        prefix = lm.prefix_token_id
        after = lm.tok_encode(continuation, add_special_tokens=False)
        before, after = (after[:1], after[1:]) if after[:1] == [prefix] else ([prefix], after)
    if not before or not after:
        role, text = ("answer", continuation) if before else ("question", context)
        raise InputError(
            f"task '{instance.task_name}': the {role} of item {instance.doc_id} ({text!r}) has no tokens of its own; "
            "it must not be empty, and an answer that follows a word begins with a space."
        )
    return [Request(tuple(before), tuple(after), document)]


def _windows(lm: Any, text: str) -> list[Request]:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    windows = get_rolling_token_windows(
        token_list=lm.tok_encode(text), prefix_token=lm.prefix_token_id, max_seq_len=lm.max_length, context_len=1
    )
    return [Request(tuple(before), tuple(after)) for before, after in map(make_disjoint_window, windows)]


def _respond(instance: Any, responses: Sequence[Response]) -> None:
    """Puts responses where lm-eval's filters look for them."""
    likelihood = sum(response.log_likelihood for response in responses)
    if math.isnan(likelihood):  # every comparison with it is false, so a metric would hide it
        raise CandidateFailed(f"a log-likelihood of task {instance.task_name} is not a number")
    rolling = instance.request_type == "loglikelihood_rolling"
    value: Any = likelihood if rolling else (likelihood, responses[0].greedy)
    instance.resps, instance.filtered_resps = [value] * instance.repeats, {}


def _finite(name: str, aggregate: Callable[[list[Any]], float], values: list[Any]) -> float:
    """A task's score. Raises CandidateFailed where it is not finite."""
    try:
        score = float(aggregate(values))
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        raise CandidateFailed(f"{name} is {score}")
    return score
