"""Which items of each task the search sees, which choose among what it found, and which are held out.

Items are told apart by content, not by split: nothing that the search sees is held out, under whatever name, in
whatever task. The items of the search are chosen first, in all tasks; then those that are held out, then those of the
selection, and each time what is the same as an item before is passed over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evomerge.candidate import Subset
from evomerge.config.base import Split
from evomerge.config.scoring import ItemsConfig
from evomerge.errors import InputError
from evomerge.evaluation.rendering import Item, items_of
from evomerge.randomness import counter_rng
from evomerge.seen import Digests

Side = Literal["validation", "test"]
_NOTHING: Digests = frozenset()


def both_splits(task: Any) -> bool:
    """Whether a task has a validation and a test split that are not the same: by name, or item by item."""
    if not (task.has_validation_docs() and task.has_test_docs()):
        return False
    if task.config.validation_split is not None and task.config.validation_split == task.config.test_split:
        return False
    validation, test = items_of(task, "validation"), items_of(task, "test")
    return not (_all_among(validation, test) and _all_among(test, validation))


def _all_among(items: Sequence[Item], others: Sequence[Item]) -> bool:
    known = _all_digests(others)
    return all(item.digests & known for item in items)


def _all_digests(items: Sequence[Item]) -> Digests:
    return frozenset().union(*(item.digests for item in items))


class Division:
    """The items of all tasks of a search, divided.

    left_out: by task, how many held-out items were passed over because they are known already.
    """

    def __init__(self, tasks: Sequence[Any], items: ItemsConfig, seen: Digests = _NOTHING) -> None:
        """tasks: lm-eval's. seen: digests of items that may not be held out, whatever this search sees.

        Raises InputError where a task has too few items.
        """
        self._items = items
        self._parts = {task: _Part(task, items) for task in sorted(tasks, key=_name)}
        self._chosen: dict[Split, dict[Any, list[int]]] = {}
        self.left_out = dict.fromkeys(self._parts, 0)
        self._chosen["search"] = {task: part.search() for task, part in self._parts.items()}
        known = seen | self.digests("search").union(*(_examples(task) for task in self._parts))
        self._chosen["heldout"] = {}
        for task, part in self._parts.items():
            self._chosen["heldout"][task], self.left_out[task] = part.heldout(known)
        known |= self.digests("heldout")
        self._chosen["selection"] = {task: part.selection(known) for task, part in self._parts.items()}

    def of(self, task: Any, split: Split) -> list[int]:
        """The numbers of the documents that a split of a task holds, ascending: of the validation split for search and
        selection where the task has both (`both_splits`)."""
        return self._chosen[split][task]

    def items(self, task: Any, split: Split) -> list[Item]:
        """The rendered items of a split of a task."""
        return self._parts[task].items(self._chosen[split][task], split)

    def digests(self, *splits: Split) -> Digests:
        """The digests of all items of some splits."""
        items = (self.items(task, split) for split in splits for task in self._parts)
        return frozenset().union(*map(_all_digests, items))


def _name(task: Any) -> str:
    return str(task.config.task)


@dataclass
class _Part:
    """One task on its way into a division."""

    task: Any
    config: ItemsConfig

    def __post_init__(self) -> None:
        self._both = both_splits(self.task)
        side: Side = "validation" if self._both or not self.task.has_test_docs() else "test"
        self._first = items_of(self.task, side)
        self._last = items_of(self.task, "test") if self._both else self._first
        name, seed = _name(self.task), self.config.seed
        purpose = (name, "search") if self._both else (name,)
        self._order = counter_rng(seed, "items", *purpose).permutation(len(self._first))
        self._rest: NDArray[np.int64] = self._order[:0]

    def items(self, numbers: Sequence[int], split: Split) -> list[Item]:
        source = self._last if split == "heldout" else self._first
        return [source[number] for number in numbers]

    def search(self) -> list[int]:
        config, count = self.config, len(self._first)
        wanted = config.search
        if wanted is None and self._both:
            wanted = max(0, count - (config.selection or 0))
        elif wanted is None:
            wanted = max(1, round(count * config.search_fraction))
        chosen, self._rest = self._order[:wanted], self._order[wanted:]
        self._check("search", config.search, len(chosen))
        return _sorted(chosen)

    def heldout(self, known: Digests) -> tuple[list[int], int]:
        """The held-out items, and how many were passed over."""
        config, order = self.config, self._rest
        if self._both:
            order = counter_rng(config.seed, "items", _name(self.task), "heldout").permutation(len(self._last))
        fresh = _fresh(order, self._last, known)
        wanted = config.heldout
        if wanted is None:
            wanted = len(fresh) if self._both else max(0, len(fresh) - (config.selection or 0))
        chosen = fresh[:wanted]
        self._check("heldout", config.heldout, len(chosen), len(order) - len(fresh))
        if not self._both:
            self._rest = fresh[wanted:]
        passed = int(np.flatnonzero(np.isin(order, chosen)).max(initial=-1)) + 1 - len(chosen)
        return _sorted(chosen), passed if config.heldout is not None else len(order) - len(fresh)

    def selection(self, known: Digests) -> list[int]:
        if self.config.selection is None:
            return []
        fresh = _fresh(self._rest, self._first, known)
        chosen = fresh[: self.config.selection]
        self._check("selection", self.config.selection, len(chosen), len(self._rest) - len(fresh))
        return _sorted(chosen)

    def _check(self, key: str, wanted: int | None, found: int, passed: int = 0) -> None:
        if found and (wanted is None or found >= wanted):
            return
        same = f" ({passed} more are the same as items that the search sees)" if passed else ""
        raise InputError(
            f"items.{key} asks for {wanted or 'some'} items, but task '{_name(self.task)}' has only {found} left for "
            f"it{same}; ask for fewer."
        )


def _fresh(order: NDArray[np.int64], items: Sequence[Item], known: Digests) -> NDArray[np.int64]:
    """The numbers in an order without those of items that are known."""
    kept = [number for number in order.tolist() if items[number].digests.isdisjoint(known)]
    return np.array(kept, dtype=np.int64)


def _examples(task: Any) -> Digests:
    """The digests of few-shot examples that come from items of their own, of which none may be held out.

    Where they come from the items that are evaluated, these give way instead (`few_shots`).
    """
    if not task.config.num_fewshot or examples_are_items(task):
        return _NOTHING
    return _all_digests(items_of(task, "fewshot"))


def examples_are_items(task: Any) -> bool:
    """Whether few-shot examples are drawn from the very split whose items are evaluated."""
    config, fewshot = task.config, getattr(task, "fewshot_cfg", None)
    if fewshot is not None and fewshot.split is None and getattr(fewshot, "samples", None) is not None:
        return False
    splits = [config.validation_split, config.test_split]
    chosen = next(filter(None, [fewshot.split if fewshot else None, config.training_split, *splits]), None)
    return chosen is not None and chosen in splits


def part(seed: int, subset: Subset, task: str, count: int) -> list[int]:
    """The places of a subset's items among the `count` search items of a task, ascending; at least one."""
    order = counter_rng(seed, "subset", task, subset.number).permutation(count)
    return _sorted(order[: max(1, round(count * subset.share))])


def _sorted(numbers: NDArray[np.int64]) -> list[int]:
    return [int(number) for number in np.sort(numbers)]
