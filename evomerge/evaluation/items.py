"""Divides the items of each task into search items, selection items and held-out items.

The search sees the search items, selection items choose among the candidates that it reports, and held-out items are
kept for the end.

Items are the same where their content is the same. No item that the search sees is held out, whatever its name and
its task. In all tasks together, search items are chosen first, then held-out items, then selection items. Every time,
items that are the same as an item chosen earlier are left out. Tasks that are only reported come last and have held-out
items alone, so that they change nothing for the others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evomerge.candidate import Subset
from evomerge.config.base import SPLITS, Split
from evomerge.config.scoring import ItemsConfig
from evomerge.errors import InputError
from evomerge.evaluation.rendering import Item, documents_of, items_of, selection_split
from evomerge.randomness import counter_rng
from evomerge.seen import Digests

Side = Literal["validation", "selection", "test"]
_NOTHING: Digests = frozenset()
_SPARE, _FEWEST_SELECTED = 0.2, 20


def both_splits(task: Any) -> bool:
    """Whether a task has a validation and a test split that differ, both in name and in their items."""
    if not (task.has_validation_docs() and task.has_test_docs()):
        return False
    if task.config.validation_split is not None and task.config.validation_split == task.config.test_split:
        return False
    validation, test = items_of(task, "validation"), items_of(task, "test")
    return not (_all_among(validation, test) and _all_among(test, validation))


def side_of_search(task: Any, both: bool) -> Side:
    """The side that a task's search items come from.

    task: lm-eval's.
    both: whether it has both splits (`both_splits`).
    """
    return "validation" if both or not task.has_test_docs() else "test"


def _all_among(items: Sequence[Item], others: Sequence[Item]) -> bool:
    other_digests = _all_digests(others)
    return all(item.digests & other_digests for item in items)


def _all_digests(items: Sequence[Item]) -> Digests:
    return frozenset().union(*(item.digests for item in items))


class Division:
    """The items of all tasks of a search, divided among the splits.

    left_out: by task, how many items are not held out because a search has seen them.
    """

    def __init__(
        self, tasks: Sequence[Any], items: ItemsConfig, seen: Digests = _NOTHING, reported: Sequence[Any] = ()
    ) -> None:
        """Divides the items.

        tasks: lm-eval's.
        items: how many items each split gets.
        seen: digests of items that must not be held out, besides those that this search sees.
        reported: further tasks, which have held-out items only.
        Raises InputError where a task has too few items.
        """
        self._items = items
        searched = {task: _TaskDivision(task, items) for task in sorted(tasks, key=_name)}
        self._searched = searched
        self._divisions: dict[Any, _TaskDivision] = dict(searched)
        self._chosen: dict[Split, dict[Any, list[int]]] = {split: {} for split in SPLITS}
        self.left_out = dict.fromkeys(searched, 0)
        self._chosen["search"] |= {task: task_division.search() for task, task_division in searched.items()}
        excluded = self.digests("search").union(*(_examples(task) for task in searched))
        self._hold_out(searched, seen | excluded)
        excluded |= self.digests("heldout")
        self._chosen["selection"] |= {
            task: task_division.selection(excluded, seen) for task, task_division in searched.items()
        }
        self._report(sorted(reported, key=_name), seen)

    def _hold_out(self, divisions: "Mapping[Any, _TaskDivision]", excluded: Digests) -> None:
        for task, task_division in divisions.items():
            self._chosen["heldout"][task], self.left_out[task] = task_division.heldout(excluded)

    def _report(self, reported: Sequence[Any], seen: Digests) -> None:
        """Divides tasks that are only reported: they have held-out items that the search does not see."""
        excluded = seen | self.digests("search", "selection")
        for task in reported:
            self._divisions[task] = _TaskDivision(task, self._items, searched=False)
            self._chosen["search"][task], self._chosen["selection"][task] = [], []
            self._hold_out({task: self._divisions[task]}, excluded | _examples(task))

    def of(self, task: Any, split: Split) -> list[int]:
        """The numbers of the documents that a split of a task holds, ascending.

        task: lm-eval's.
        split: which of our splits. Where the task has both of lm-eval's (`both_splits`), search and selection count the
            documents of the validation split, and heldout those of the test split. Where the task keeps a split for
            selection (`selection_split`), selection counts its documents.
        """
        return self._chosen[split][task]

    def searched_documents(self, task: Any) -> list[Any]:
        """The documents of a task's search items, in their order."""
        return self._divisions[task].searched_documents(self._chosen["search"][task])

    def items(self, task: Any, split: Split) -> list[Item]:
        """The rendered items of a split of a task, in the order of `of`, which takes the same parameters."""
        return self._divisions[task].items(self._chosen[split][task], split)

    def digests(self, *splits: Split) -> Digests:
        """The digests of all items of the given splits, in all tasks that are searched on."""
        items = (self.items(task, split) for split in splits for task in self._searched)
        return frozenset().union(*map(_all_digests, items))

    def withheld(self, task: Any) -> Digests:
        """The digests of the items that must not be few-shot examples of a task."""
        return self.digests("heldout", "selection") | _all_digests(self.items(task, "heldout"))


def _name(task: Any) -> str:
    return str(task.config.task)


@dataclass
class _TaskDivision:
    """Divides the items of one task: first `search`, then `heldout`, then `selection`.

    task: lm-eval's.
    config: how many items each split gets.
    searched: whether the task has search and selection items; else only `heldout` is called.
    """

    task: Any
    config: ItemsConfig
    searched: bool = True

    def __post_init__(self) -> None:
        self._both = both_splits(self.task)
        self._side = side_of_search(self.task, self._both)
        self._first = items_of(self.task, self._side)
        self._last = items_of(self.task, "test") if self._both else self._first
        self._own_selection = selection_split(self.task) is not None
        # how many items selection takes from the side that it shares
        self._shared = 0 if self._own_selection or not self.searched else self.config.selection or 0
        name, seed = _name(self.task), self.config.seed
        purpose = (name, "search") if self._both else (name,)
        self._order = counter_rng(seed, "items", *purpose).permutation(len(self._first))
        self._rest = self._order  # what is left for the splits that have not been chosen yet

    def items(self, numbers: Sequence[int], split: Split) -> list[Item]:
        source = self._last if split == "heldout" else self._candidates if split == "selection" else self._first
        return [source[number] for number in numbers]

    def searched_documents(self, numbers: Sequence[int]) -> list[Any]:
        there = documents_of(self.task, self._side)
        return [there[number] for number in numbers]

    @property
    def _candidates(self) -> list[Item]:
        """The items among which selection items are chosen."""
        return items_of(self.task, "selection") if self._own_selection else self._first

    def search(self) -> list[int]:
        config, count = self.config, len(self._first)
        wanted = config.search
        if wanted is None and self._both:
            wanted = max(0, count - self._shared)
        elif wanted is None:
            wanted = max(1, round(count * config.search_fraction))
        chosen, self._rest = self._order[:wanted], self._order[wanted:]
        self._check("search", config.search, len(chosen))
        return _sorted(chosen)

    def heldout(self, excluded: Digests) -> tuple[list[int], int]:
        """The numbers of the held-out items, and how many items were left out because they are among the excluded."""
        config, order = self.config, self._rest
        if self._both:
            order = counter_rng(config.seed, "items", _name(self.task), "heldout").permutation(len(self._last))
        fresh = _fresh(order, self._last, excluded)
        wanted = config.heldout
        if wanted is None:
            wanted = len(fresh) if self._both else max(0, len(fresh) - self._shared)
        chosen = fresh[:wanted]
        self._check("heldout", config.heldout, len(chosen), len(order) - len(fresh))
        if not self._both:
            self._rest = fresh[wanted:]
        passed = int(np.flatnonzero(np.isin(order, chosen)).max(initial=-1)) + 1 - len(chosen)
        return _sorted(chosen), passed if config.heldout is not None else len(order) - len(fresh)

    def selection(self, excluded: Digests, seen: Digests) -> list[int]:
        """The numbers of the selection items. Items that an earlier search has seen come last: a model that a search
        made is scored on that search's selection items, too.

        excluded: digests of items that cannot be chosen.
        seen: those of items that an earlier search has seen.
        """
        if not self.config.selection:
            return []
        order, items = self._rest, self._candidates
        if self._own_selection:
            order = counter_rng(self.config.seed, "items", _name(self.task), "selection").permutation(len(items))
        fresh = _fresh(order, items, excluded)
        unseen = _fresh(fresh, items, seen)
        chosen = np.concatenate([unseen, fresh[~np.isin(fresh, unseen)]])[: self.config.selection]
        self._check("selection", self.config.selection, len(chosen), len(order) - len(fresh))
        return _sorted(chosen)

    def _check(self, key: str, wanted: int | None, available: int, passed: int = 0) -> None:
        if available and (wanted is None or available >= wanted):
            return
        same = f" ({passed} more are the same as items that the search sees)" if passed else ""
        raise InputError(
            f"items.{key} asks for {wanted or 'some'} items, but task '{_name(self.task)}' has only {available} left "
            f"for it{same}; ask for fewer."
        )


def spare_for_selection(tasks: Sequence[Any], items: ItemsConfig) -> int | None:
    """How many items of every task can be selection items where a config does not say: a fifth of those that search
    items come from, or half as many as there are search items; None where these would be too few.

    tasks: lm-eval's.
    items: how many items the other splits get.
    """
    counts = []
    for task in tasks:
        both = both_splits(task)
        there = len(items_of(task, side_of_search(task, both)))
        taken = (items.search or 0) + (0 if both else items.heldout or 0)
        if items.search is None and not both:
            taken += round(there * items.search_fraction)
        wanted = there * _SPARE if items.search is None else items.search / 2
        if selection_split(task) is not None:
            there, taken, wanted = len(items_of(task, "selection")), 0, math.inf
        counts.append(round(min(there - taken, wanted)))
    least = min(counts, default=0)
    return least if least >= _FEWEST_SELECTED else None


def _fresh(order: NDArray[np.int64], items: Sequence[Item], excluded: Digests) -> NDArray[np.int64]:
    """The numbers in an order, without those of excluded items."""
    kept = [number for number in order.tolist() if items[number].digests.isdisjoint(excluded)]
    return np.array(kept, dtype=np.int64)


def _examples(task: Any) -> Digests:
    """The digests of a task's few-shot examples, where they come from a split of their own. None may be held out.

    Empty where examples come from the evaluated items: then the examples are restricted instead (`few_shots`).
    """
    if not task.config.num_fewshot or examples_are_items(task):
        return _NOTHING
    return _all_digests(items_of(task, "fewshot"))


def examples_are_items(task: Any) -> bool:
    """Whether a task draws its few-shot examples from the split whose items are evaluated."""
    config, fewshot = task.config, getattr(task, "fewshot_cfg", None)
    if fewshot is not None and fewshot.split is None and getattr(fewshot, "samples", None) is not None:
        return False
    splits = [config.validation_split, config.test_split]
    chosen = next(filter(None, [fewshot.split if fewshot else None, config.training_split, *splits]), None)
    return chosen is not None and chosen in [*splits, selection_split(task)]


def part(seed: int, subset: Subset, task: str, count: int) -> list[int]:
    """The places of a subset's items among the search items of a task, ascending; at least one.

    seed: of the division (`items.seed`).
    subset: its number and its share of the items.
    task: the task's name.
    count: how many search items the task has.
    """
    order = counter_rng(seed, "subset", task, subset.number).permutation(count)
    return _sorted(order[: max(1, round(count * subset.share))])


def _sorted(numbers: NDArray[np.int64]) -> list[int]:
    return [int(number) for number in np.sort(numbers)]
