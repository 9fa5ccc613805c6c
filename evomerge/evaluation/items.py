"""Which items of a task the search sees, and which are held out."""

import numpy as np

from evomerge.config import ItemsConfig
from evomerge.errors import InputError
from evomerge.randomness import counter_rng


def divide(items: ItemsConfig, task: str, count: int) -> tuple[list[int], list[int]]:
    """Search and held-out item numbers of a task with one split, both sorted and disjoint."""
    order = counter_rng(items.seed, "items", task).permutation(count)
    for_search = items.search if items.search is not None else max(1, round(count * items.search_fraction))
    search, rest = order[:for_search], order[for_search:]
    heldout = rest if items.heldout is None else rest[: items.heldout]
    _check_count("search", items.search, len(search), task)
    _check_count("heldout", items.heldout, len(heldout), task)
    return np.sort(search).tolist(), np.sort(heldout).tolist()


def choose(items: ItemsConfig, split: str, task: str, count: int) -> list[int]:
    """Item numbers of one split of a task that has two."""
    wanted = items.search if split == "search" else items.heldout
    chosen = counter_rng(items.seed, "items", task, split).permutation(count)[:wanted]
    _check_count(split, wanted, len(chosen), task)
    return [int(number) for number in np.sort(chosen)]


def _check_count(key: str, wanted: int | None, found: int, task: str) -> None:
    if found == 0 or (wanted is not None and found < wanted):
        raise InputError(
            f"items.{key} asks for {wanted or 'some'} items, but task '{task}' has only {found} left for it; "
            "ask for fewer."
        )
