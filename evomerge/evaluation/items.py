"""Which items of a task the search sees, which choose among what it found, and which are held out."""

import numpy as np
from numpy.typing import NDArray

from evomerge.candidate import Subset
from evomerge.config import ItemsConfig, Split
from evomerge.errors import InputError
from evomerge.randomness import counter_rng


def divide(items: ItemsConfig, task: str, count: int) -> dict[Split, list[int]]:
    """Item numbers by split of a task with one split of its own, each list sorted, no item in two.

    The held-out items are the same with selection items and without wherever their number is given.
    """
    order = counter_rng(items.seed, "items", task).permutation(count)
    for_search = items.search if items.search is not None else max(1, round(count * items.search_fraction))
    search, rest = order[:for_search], order[for_search:]
    for_report = items.heldout if items.heldout is not None else max(0, len(rest) - (items.selection or 0))
    heldout, left = rest[:for_report], rest[for_report:]
    _check_count("search", items.search, len(search), task)
    _check_count("heldout", items.heldout, len(heldout), task)
    return {"search": _sorted(search), "selection": _selection(items, left, task), "heldout": _sorted(heldout)}


def choose(items: ItemsConfig, split: Split, task: str, count: int) -> list[int]:
    """Item numbers of one split of a task with a validation and a test split, of which the first serves the search and
    the selection. count: how many items the task's split has."""
    if split == "heldout":
        chosen = counter_rng(items.seed, "items", task, split).permutation(count)[: items.heldout]
        _check_count(split, items.heldout, len(chosen), task)
        return _sorted(chosen)
    order = counter_rng(items.seed, "items", task, "search").permutation(count)
    for_search = items.search if items.search is not None else max(0, count - (items.selection or 0))
    search, left = order[:for_search], order[for_search:]
    _check_count("search", items.search, len(search), task)
    return _sorted(search) if split == "search" else _selection(items, left, task)


def part(seed: int, subset: Subset, task: str, count: int) -> list[int]:
    """The places of a subset's items among the `count` search items of a task, ascending; at least one."""
    order = counter_rng(seed, "subset", task, subset.number).permutation(count)
    return _sorted(order[: max(1, round(count * subset.share))])


def _selection(items: ItemsConfig, left: NDArray[np.int64], task: str) -> list[int]:
    if items.selection is None:
        return []
    chosen = left[: items.selection]
    _check_count("selection", items.selection, len(chosen), task)
    return _sorted(chosen)


def _sorted(numbers: NDArray[np.int64]) -> list[int]:
    return [int(number) for number in np.sort(numbers)]


def _check_count(key: str, wanted: int | None, found: int, task: str) -> None:
    if found == 0 or (wanted is not None and found < wanted):
        raise InputError(
            f"items.{key} asks for {wanted or 'some'} items, but task '{task}' has only {found} left for it; "
            "ask for fewer."
        )
