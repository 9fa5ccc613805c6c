"""Few-shot examples: lm-eval draws them, but never one that is the same as a held-out item or as the item asked.

Where no example is the same as any of these items, the examples are exactly those that lm-eval draws.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from evomerge.config.base import SPLITS, Split
from evomerge.errors import InputError
from evomerge.evaluation.items import Division, both_splits, examples_are_items
from evomerge.evaluation.rendering import Side, document_digest, items_of, selection_documents, selection_split
from evomerge.seen import Digests

SEED = 1234


def prepare(task: Any, division: Division, split: Split) -> None:
    """Makes a task ready to build the requests of a split: sets the documents and the few-shot examples.

    task: lm-eval's; it is changed in place.
    division: says which items are held out.
    split: the split whose requests will be built.
    Raises InputError where too few examples are left.
    """
    _leave_own_answer_out(task, split)
    if split == "selection" and selection_split(task) is not None:
        task.test_docs = task.validation_docs = partial(selection_documents, task)
    elif split != "heldout" and both_splits(task):
        task.test_docs = task.validation_docs
    task.set_fewshot_seed(SEED)
    if task.config.num_fewshot and hasattr(task, "sampler"):
        _withhold(task, division)
        _Guard(task).install()


def shown(task: Any, division: Division) -> Digests:
    """The digests of the few-shot examples that are shown with the items of search and selection.

    task: lm-eval's; it is changed in place and cannot be used for anything else afterwards.
    division: says which items each split holds.
    Raises InputError where lm-eval cannot draw enough examples.
    """
    count = task.config.num_fewshot
    if not count or not hasattr(task, "sampler"):
        return frozenset()
    example_digests: set[bytes] = set()
    digests = _by_document(task)
    sampler, settings = task.sampler, task.fewshot_cfg
    for split, asked in _asked(task, division).items():
        task.sampler, task.fewshot_cfg = copy(sampler), copy(settings)
        prepare(task, division, split)
        for number, document in enumerate(task.eval_docs):
            task.sampler.guard.own = digests.get(document_digest(document), frozenset())
            drawn = _drawn(task, count, document if _draws_evaluated(task) else None)
            if number in asked:
                example_digests.update(*(digests[document_digest(example)] for example in drawn))
    return frozenset(example_digests)


def _asked(task: Any, division: Division) -> dict[Split, set[int]]:
    """The numbers of the documents of search and selection, by the split that their requests are built for."""
    search, selection = (set(division.of(task, split)) for split in SPLITS[:2])
    if selection_split(task) is None:
        search, selection = search | selection, set()
    asked: dict[Split, set[int]] = {"search": search, "selection": selection}
    return {split: numbers for split, numbers in asked.items() if numbers}


def _drawn(task: Any, count: int, document: Any) -> Sequence[Any]:
    try:
        drawn: Sequence[Any] = task.sampler.sample(n=count, eval_doc=document)
    except (ValueError, AssertionError) as error:  # as lm-eval's samplers say that there are too few
        raise InputError(
            f"task '{task.config.task}': lm-eval cannot draw {count} few-shot examples ({error}); correct its file, or "
            "evaluation.num_fewshot where that is set."
        ) from None
    return drawn


def _leave_own_answer_out(task: Any, split: Split) -> None:
    """Makes lm-eval leave an item out of its own few-shot examples, where these come from the item's own split.

    lm-eval leaves the item out only where fewshot_split has the name of the test split. Elsewhere it would show the
    answer.
    """
    config, fewshot = task.config, getattr(task, "fewshot_cfg", None)
    if fewshot is None or fewshot.samples is not None:
        return
    splits = [config.validation_split, config.test_split]
    own = selection_split(task) if split == "selection" else None
    evaluated = own or next(filter(None, splits[::-1] if split == "heldout" else splits), None)
    if evaluated == next(filter(None, [fewshot.split, config.training_split, *splits]), None):
        fewshot.split = config.test_split


def _draws_evaluated(task: Any) -> bool:
    """Whether lm-eval draws from the evaluated split, so that it must be told which document not to draw."""
    return bool(task.fewshot_cfg.split == task.config.test_split)


def _withhold(task: Any, division: Division) -> None:
    """Removes the items of heldout and selection from the examples that a task can draw."""
    if not examples_are_items(task):
        return
    withheld, digests = division.withheld(task), _by_document(task)
    pool = task.sampler.df
    kept = [document for document in pool if not digests[document_digest(document)] & withheld]
    if len(kept) < len(pool):
        _check_enough(task, len(kept) - 1)  # one of the documents kept may be the item that is asked
        task.sampler.replace_df(kept)


def _check_enough(task: Any, left: int) -> None:
    if left < task.config.num_fewshot:
        raise InputError(
            f"task '{task.config.task}' shows {task.config.num_fewshot} few-shot examples, but only {max(0, left)} are "
            "left beside the items that are asked, selected by and held out; use fewer items, or give the task a "
            "fewshot_split of its own."
        )


def _by_document(task: Any) -> Mapping[bytes, Digests]:
    """The digests of every item of a task, by the digest of its document."""
    sides: tuple[Side, ...] = ("validation", "selection", "test", "fewshot")
    return {item.document: item.digests for side in sides for item in items_of(task, side)}


@dataclass
class _Guard:
    """Wraps a task's sampler, so that an item's examples are never the same as the item.

    task: lm-eval's.
    own: the digests of the item that examples are drawn for.
    """

    task: Any
    own: Digests = frozenset()
    _digests: Mapping[bytes, Digests] = field(init=False)

    def __post_init__(self) -> None:
        self._digests = _by_document(self.task)
        self._sample = self.task.sampler.sample
        self._context = self.task.fewshot_context

    def install(self) -> None:
        self.task.sampler.sample = self.sample
        self.task.sampler.guard = self
        self.task.fewshot_context = self.context

    def context(self, doc: Any, *given: Any, **named: Any) -> Any:
        self.own = self._digests.get(document_digest(doc), frozenset())
        return self._context(doc, *given, **named)

    def sample(self, n: int, *given: Any, **named: Any) -> Sequence[Any]:
        drawn: Sequence[Any] = self._sample(n, *given, **named)
        if all(self._other(document) for document in drawn):
            return drawn
        pool = self.task.sampler.df
        left = [document for document in pool if self._other(document)]
        _check_enough(self.task, len(left))
        self.task.sampler.replace_df(left)
        again: Sequence[Any] = self._sample(n)
        self.task.sampler.replace_df(pool)
        return again

    def _other(self, document: Any) -> bool:
        digest = document_digest(document)
        return not (self._digests.get(digest, frozenset({digest})) & self.own)
