"""Reference answers: what a model should have answered, for losses that gradients follow.

A reference is used only where it scores better than other answers do, by the task's own filters and metric.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from evomerge.config.scoring import ObjectiveConfig
from evomerge.evaluation.loading import Target
from evomerge.evaluation.margins import Choices, choices_in
from evomerge.evaluation.metrics import task_metrics

_SURE = 100.0  # nats by which an option leads in a made-up response


@dataclass(frozen=True, slots=True)
class Reference:
    """The right answer to one document.

    text: what a model should write, with the delimiter before it and the stop behind it; None where it chooses among
        options, or where the task's requests are the answer themselves.
    answer: the text as filters and metrics see it, without the stop.
    right: for each option whether it is right; empty where there are no options.
    lengths: for each option, the length that the task divides log-likelihoods by.
    mutual: whether the task subtracts the log-likelihood that an option has without the question.
    """

    text: str | None = None
    answer: str = ""
    right: tuple[bool, ...] = ()
    lengths: tuple[float, ...] = ()
    mutual: bool = False


def references(
    task: Any, objective: ObjectiveConfig, filter_name: str, documents: Sequence[Any], chat: bool = False
) -> list[Reference | None]:
    """The reference of each document; None for documents that have none.

    task: lm-eval's.
    objective: the metric that is optimized.
    filter_name: the filter that it is measured after.
    documents: the task's documents.
    chat: whether prompts follow the model's chat template.
    """
    made = [_reference(task, objective.metric, document, chat) for document in documents]
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return made  # its metrics are the likelihood of the text itself
    known = [place for place, reference in enumerate(made) if reference is not None]
    best = _best(task, objective, filter_name, [documents[place] for place in known], [made[place] for place in known])
    kept = {place for place, is_best in zip(known, best, strict=True) if is_best}
    return [reference if place in kept else None for place, reference in enumerate(made)]


def without_references(
    objectives: Sequence[ObjectiveConfig],
    targets: Mapping[str, Target],
    documents: Callable[[Any], Sequence[Any]],
    chat: bool = False,
) -> str | None:
    """A clause about the first objective for which no document has a reference; None where all objectives have some.

    objectives: what is optimized; costs and scores of the user's own are passed over.
    targets: their tasks.
    documents: a task -> its search documents.
    chat: whether prompts follow the model's chat template.
    """
    for objective in objectives:
        if not objective.task:
            continue
        target = targets[objective.task]
        name = objective.filter or target.filters()[0]
        if not any(any(references(task, objective, name, documents(task), chat)) for task in target.tasks):
            return f"{objective.name} has no answer that its own metric would score best"
    return None


def _reference(task: Any, metric: str, document: Any, chat: bool) -> Reference | None:
    try:
        _instances(task, document)
        if task.OUTPUT_TYPE == "multiple_choice":
            return _options(task, metric, document)
        return _written(task, document, chat) if task.OUTPUT_TYPE == "generate_until" else Reference()
    except Exception:  # templates and functions of tasks may raise anything
        return None


def options_of(task: Any, metric: str, document: Any) -> Reference | None:
    """The options of a document with what the metric divides by, whichever is right; None where there are none.

    task: lm-eval's.
    metric: the one that is optimized.
    document: one of the task's.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    try:
        return _compared(choices_in(task, document), metric)
    except Exception:  # templates and functions of tasks may raise anything
        return None


def _options(task: Any, metric: str, document: Any) -> Reference | None:
    choices = choices_in(task, document)
    return _compared(choices, metric) if 0 < choices.right.sum() < len(choices.right) else None


def _compared(choices: Choices, metric: str) -> Reference:
    """The options with the lengths that a metric divides by."""
    lengths = {"acc_norm": choices.characters, "acc_bytes": choices.bytes}.get(metric, np.ones(len(choices.right)))
    divisors = tuple(np.maximum(lengths, 1.0).tolist())
    return Reference(right=tuple(choices.right.tolist()), lengths=divisors, mutual=metric == "acc_mutual_info")


def _written(task: Any, document: Any, chat: bool) -> Reference | None:
    gold = task.doc_to_target(document)
    if task.config.doc_to_choice is not None and isinstance(gold, int):
        gold = task.doc_to_choice(document)[gold]
    if isinstance(gold, list):
        gold = gold[0] if gold else ""
    if not str(gold).strip():
        return None
    until = (task.config.generation_kwargs or {}).get("until") or [""]
    stops = [until] if isinstance(until, str) else until
    answer = f"{_delimiter(task, document, chat)}{gold}"
    return Reference(text=answer + stops[0], answer=_cut(answer, stops))


def _delimiter(task: Any, document: Any, chat: bool) -> str:
    """What stands between a prompt and its answer, as in lm-eval's few-shot examples."""
    prefix = task.doc_to_prefix(document)
    if prefix:
        return "" if prefix[-1].isspace() else " "
    return "" if chat else str(task.config.target_delimiter)


def _cut(answer: str, stops: Sequence[str]) -> str:
    """What is left of an answer that holds a stop, at which writing ends."""
    for stop in filter(None, stops):
        answer = answer.split(stop)[0]
    return answer


def _best(
    task: Any, objective: ObjectiveConfig, filter_name: str, documents: Sequence[Any], made: Sequence[Reference | None]
) -> list[bool]:
    """For each document, whether its reference scores at least as well as another document's answer or none at all, and
    better than one of them."""
    key = objective.metric, filter_name
    sign = -1.0 if objective.goal == "minimize" else 1.0
    instances = [_instances(task, document) for document in documents]
    answers = [reference.answer if reference is not None else "" for reference in made]
    rights = [reference.right if reference is not None else () for reference in made]

    def scores(of: Callable[[int], Any]) -> list[Any]:
        for number, members in enumerate(instances):
            for instance, response in zip(members, of(number), strict=True):
                instance.resps, instance.filtered_resps = [response], {}
        try:
            return _single(task, objective.metric, task_metrics(copy(task), instances)[key])
        except Exception:  # metrics are code of the task
            return []

    def options(number: int, wanted: bool) -> list[Any]:
        """Responses by which one option leads: the first that is right, or the first that is wrong."""
        count, right = len(instances[number]), rights[number]
        leader = right.index(wanted) if right else None
        if leader is None:
            return [(0.0, True) if wanted else (-_SURE, False)] * count
        return [(0.0, True) if place == leader else (-_SURE * 100, False) for place in range(count)]

    if task.OUTPUT_TYPE == "generate_until":
        own = scores(lambda number: [answers[number]])
        others = [scores(lambda number: [answers[number - 1]]), scores(lambda _: [""])]
    else:
        own, others = scores(lambda number: options(number, True)), [scores(lambda number: options(number, False))]
    columns = [own, *others]
    if any(len(column) != len(documents) for column in columns):
        return [False] * len(documents)
    if not all(isinstance(value, Real) for column in columns for value in column):
        return _best_together(task, objective.metric, sign, columns)
    return [
        all(sign * mine >= sign * other for other in rest) and any(mine != other for other in rest)
        for mine, *rest in zip(*columns, strict=True)
    ]


def _single(task: Any, metric: str, values: list[Any]) -> list[Any]:
    """The metric of each document alone, where documents have numbers. They may be something else than the metric, such
    as the log-likelihoods of a perplexity."""
    if not all(isinstance(value, Real) for value in values):
        return values
    return [float(task.aggregation()[metric]([value])) for value in values]


def _best_together(task: Any, metric: str, sign: float, columns: Sequence[list[Any]]) -> list[bool]:
    """For a metric that has no value for one document, such as a perplexity: whether all references together score
    better than all other answers."""
    try:
        own, *others = (sign * float(task.aggregation()[metric](column)) for column in columns)
    except Exception:  # metrics are code of the task
        return [False] * len(columns[0])
    return [all(own > other for other in others)] * len(columns[0])


def _instances(task: Any, document: Any) -> list[Any]:
    """lm-eval's requests for a document, whose prompts do not matter."""
    context: Any = [""] * len(task.doc_to_choice(document)) if task.multiple_input else ""
    made = task.construct_requests(doc=document, ctx=context, metadata=(task.config.task, 0, 1))
    return made if isinstance(made, list) else [made]
