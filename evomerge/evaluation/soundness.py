"""Checks a task's rendered items before any model sees them.

An item can have an empty question, option or answer, an answer that is none of the options, or a field that no document
has. lm-eval scores it all the same, but the score means nothing. A task is refused where all of its items have such a
fault; where only some have, the user is warned with an example.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from evomerge.config.base import Split
from evomerge.errors import InputError
from evomerge.evaluation.items import Division
from evomerge.evaluation.rendering import Item

_FIELD = re.compile(r"[A-Za-z_]\w*")
_CLOSE = 0.7


@dataclass(frozen=True, slots=True)
class _Finding:
    """What is wrong with some items.

    what: the fault, as the predicate of a sentence about the items.
    items: the numbers of the items.
    example: the first item's content.
    fatal: whether a task is refused where all of its items have the fault.
    """

    what: str
    items: list[int]
    example: str
    fatal: bool = True


def check(tasks: Sequence[Any], division: Division, splits: Sequence[Split]) -> Iterator[str]:
    """A sentence for each fault that some of a task's items have.

    tasks: lm-eval's.
    division: the division of their items.
    splits: the splits that are checked.
    Raises InputError for a task whose items all have the same fault, so that no score means anything.
    """
    for task in tasks:
        yield from _field_names(task, division.items(task, "search") or division.items(task, "heldout"))
        for split in splits:
            numbers, items = division.of(task, split), division.items(task, split)
            for finding in _findings(task, numbers, items):
                if finding.fatal and len(finding.items) == len(items):
                    raise InputError(f"{_opening(task, finding, items, split)}; correct the task's file or its data.")
                yield f"{_opening(task, finding, items, split)}."


def _opening(task: Any, finding: _Finding, items: Sequence[Item], split: Split) -> str:
    count, first = len(finding.items), finding.items[0]
    share = f"all {count}" if count == len(items) else f"{count} of {len(items)}"
    return f"task '{task.config.task}': {share} {split} items {finding.what} (item {first}: {finding.example})"


def _field_names(task: Any, items: Sequence[Item]) -> Iterator[str]:
    """A sentence for each setting of a task that looks like the name of a field but names none: lm-eval would use the
    name itself as the text."""
    fields = list(getattr(task, "features", ()) or ())
    for key in ("doc_to_text", "doc_to_target"):
        value = getattr(task.config, key, None)
        if not isinstance(value, str) or not _FIELD.fullmatch(value) or value in fields:
            continue
        if any(isinstance(item.choices, list) and value in item.choices for item in items):
            continue
        opening = (
            f"task '{task.config.task}': {key} is '{value}', which no document has as a field, so that every item has "
            "this very text"
        )
        close = get_close_matches(value, fields, n=1, cutoff=_CLOSE)
        if close:
            raise InputError(f"{opening}; did you mean '{close[0]}'?")
        yield f"{opening} (fields: {', '.join(fields[:8])})."


def _findings(task: Any, numbers: Sequence[int], items: Sequence[Item]) -> Iterator[_Finding]:
    pairs = list(zip(numbers, items, strict=True))
    broken = [(number, item) for number, item in pairs if item.error is not None]
    yield from _finding("cannot be rendered", broken, lambda item: _reason(item.error))
    whole = [(number, item) for number, item in pairs if item.error is None]
    yield from _of_questions(task, whole)
    if task.OUTPUT_TYPE == "multiple_choice":
        yield from _of_options(task, whole)
    elif not callable(task.config.process_results):  # a task's own code may need no answer
        empty = [(number, item) for number, item in whole if _is_empty(item.target)]
        yield from _finding("have an empty answer", empty, lambda item: f"the question is {_quoted(item.text)}")
    yield from _repeated(whole)


def _of_questions(task: Any, pairs: Sequence[tuple[int, Item]]) -> Iterator[_Finding]:
    """Empty questions, of a task that has questions: some tasks have only options and answers."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling" or task.config.doc_to_text in (None, ""):
        return
    empty = [(number, item) for number, item in pairs if isinstance(item.text, str) and not item.text.strip()]
    alone = task.OUTPUT_TYPE == "generate_until"
    yield from _finding("have an empty question", empty, lambda item: f"the answer is {_quoted(item.target)}", alone)


def _of_options(task: Any, pairs: Sequence[tuple[int, Item]]) -> Iterator[_Finding]:
    def shown(item: Item) -> str:
        gold = item.text if task.multiple_input else item.target
        return f"options {_quoted(item.choices)}, answer {_quoted(gold)}"

    lists = [(number, item) for number, item in pairs if isinstance(item.choices, list) and item.choices]
    yield from _finding("have no options", [pair for pair in pairs if pair not in lists], shown)
    empty = [pair for pair in lists if any(not str(option).strip() for option in pair[1].choices)]
    yield from _finding("have an empty option", empty, shown)
    doubled = [pair for pair in lists if len(set(map(str, pair[1].choices))) < len(pair[1].choices)]
    yield from _finding("have the same option twice", doubled, shown, fatal=False)
    if not callable(task.config.process_results):
        wrong = [pair for pair in lists if not _is_option(task, pair[1])]
        yield from _finding("have an answer that is none of the options", wrong, shown)


def _is_option(task: Any, item: Item) -> bool:
    gold = item.text if task.multiple_input else item.target
    return any(
        0 <= answer < len(item.choices) if isinstance(answer, int) else answer in item.choices
        for answer in (gold if isinstance(gold, list) else [gold])
    )


def _repeated(pairs: Sequence[tuple[int, Item]]) -> Iterator[_Finding]:
    """Items that are the same as another item of their split."""
    counts = Counter(digest for _, item in pairs for digest in item.digests)
    doubled = [pair for pair in pairs if any(counts[digest] > 1 for digest in pair[1].digests)]
    yield from _finding("stand there more than once", doubled, lambda item: _quoted(item.text), fatal=False)


def _finding(what: str, pairs: Sequence[tuple[int, Item]], example: Any, fatal: bool = True) -> Iterator[_Finding]:
    if pairs:
        yield _Finding(what, [number for number, _ in pairs], example(pairs[0][1]), fatal)


def _is_empty(target: Any) -> bool:
    if isinstance(target, list):
        return not any(str(answer).strip() for answer in target)
    return target is None or not str(target).strip()


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _reason(error: BaseException | None) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:120].rstrip(".")
