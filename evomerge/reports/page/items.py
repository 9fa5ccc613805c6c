"""Which held-out items a candidate gained and lost against each parent, and what these items ask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evomerge.config.search import SearchConfig
from evomerge.merging.sources.models import Models
from evomerge.search.controls import BASE, PARENT
from evomerge.search.criteria import sign_of
from evomerge.search.results import Results


@dataclass(frozen=True, slots=True)
class Flips:
    """The held-out items of one metric on which a candidate and a rival differ.

    rival: the rival's id.
    metric: the metric's name.
    count: how many items there are.
    gained: the numbers of the items on which the candidate is better, counted from 0.
    lost: the numbers of the items on which it is worse.
    """

    rival: str
    metric: str
    count: int
    gained: tuple[int, ...]
    lost: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out item as people read it.

    text: the question.
    answer: the right answer.
    """

    text: str
    answer: str


def flips(results: Results, candidate: str) -> list[Flips]:
    """The items that a candidate gained and lost, by parent and metric; the base is the last of the rivals.

    results: the search's.
    candidate: the candidate's id. Without held-out outcomes it has no flips.
    """
    archive, config = results.archive, results.config
    mine = archive.find(candidate, "heldout")
    found: list[Flips] = []
    for rival in [*(f"{PARENT}-{name}" for name in config.models), BASE]:
        theirs = archive.find(rival, "heldout")
        if mine is None or theirs is None or rival == candidate:
            continue
        for metric in config.reported:
            own, other = (record.evaluation.outcomes.get(metric.name) for record in (mine, theirs))
            if own is None or other is None or own.count != other.count or not own.count:
                continue
            leads = sign_of(metric) * (own.values - other.values)
            gained, lost = (tuple(int(item) for item in np.flatnonzero(side)) for side in (leads > 0, leads < 0))
            found.append(Flips(rival, metric.name, own.count, gained, lost))
    return found


def questions(config: SearchConfig, models: Models) -> dict[str, list[Question]]:
    """The held-out items of every metric, in the order of their outcomes.

    config: the search's, resolved. Its tasks are loaded.
    models: the models of the search, which say which items are never held out.
    Raises InputError for a task that cannot be loaded.
    """
    from evomerge.evaluation.items import Division
    from evomerge.evaluation.loading import distinct_tasks, load_targets, of_metrics, only_reported
    from evomerge.evaluation.own_files import read_own
    from evomerge.evaluation.own_scores import OwnItems

    targets, own = load_targets(config.reported, config.tasks, config.evaluation), OwnItems.of(config, read_own(config))
    searched = [*distinct_tasks(of_metrics(config.measured, targets)), *own.searched.values()]
    reported = [*only_reported(config, targets), *own.reported.values()]
    division = Division(searched, config.items, models.seen, reported)
    tasks: dict[str, Sequence[Any]] = {name: (task,) for name, task in {**own.searched, **own.reported}.items()}
    tasks |= {metric.name: targets[metric.task].tasks for metric in config.reported if metric.task}
    return {
        name: [_question(item) for task in of_metric for item in division.items(task, "heldout")]
        for name, of_metric in tasks.items()
    }


def _question(item: Any) -> Question:
    if item.error is not None:
        return Question(f"(cannot be shown: {item.error})", "")
    options = list(item.choices) if isinstance(item.choices, list | tuple) else []
    if isinstance(item.text, int) and not isinstance(item.text, bool) and item.text < len(options):
        return Question(f"{options[item.text]} {item.target}", str(options[item.text]))
    return Question(item.question, _answer(item.target, options))


def _answer(target: Any, options: list[Any]) -> str:
    """The right answer in words; a number stands for an option."""
    if isinstance(target, list | tuple):
        return " / ".join(_answer(one, options) for one in target)
    if isinstance(target, int) and 0 <= target < len(options):
        return str(options[target])
    return str(target)


def shown_questions(
    asked: Mapping[str, list[Question]], found: list[Flips]
) -> dict[tuple[str, str], dict[int, Question]]:
    """The questions of the items that flipped, by rival and metric, and by number. A metric whose items are others than
    those that were scored has none.

    asked: the questions by metric.
    found: what flipped.
    """
    shown: dict[tuple[str, str], dict[int, Question]] = {}
    for flip in found:
        questions_of = asked.get(flip.metric, [])
        if len(questions_of) == flip.count:
            numbers = sorted([*flip.gained, *flip.lost])
            shown[flip.rival, flip.metric] = {number: questions_of[number] for number in numbers}
    return shown
