"""The questions that score the zoo's models: one folder of JSON lines per task, written from fixed seeds.

The task YAML and README in each folder are written by hand; `write` only makes the data of `ITEMS`.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Literal

from evomerge.zoo.language import (
    Exercise,
    Language,
    Lesson,
    Skill,
    Split,
    Style,
    Words,
    copy,
    in_a,
    one_step,
    read,
    two_steps,
)

Part = Literal["search", "selection", "heldout"]
ITEMS: dict[Part, int] = {"search": 200, "selection": 100, "heldout": 400}
# Selection items are search questions that no task searches on, in either language.
SIDES: dict[Part, Split] = {"search": "search", "selection": "search", "heldout": "heldout"}


@dataclass(frozen=True, slots=True)
class Task:
    """What a task asks.

    skills: the skills, in equal shares.
    language: the language of its questions.
    style: the style of its answers.
    """

    skills: tuple[Skill, ...]
    language: Language = "a"
    style: Style = "digits"


TASKS = {
    "base_qa": Task((copy, one_step)),
    "math_a": Task((two_steps,)),
    "math_a_words": Task((two_steps,), style="words"),
    "lang_b": Task((copy, one_step), language="b"),
    "cross_math_b": Task((two_steps,), language="b"),
}


def items(name: str, part: Part, count: int | None = None) -> list[Exercise]:
    """A task's exercises in one of its files, all different."""
    task = TASKS[name]
    lessons = tuple(Lesson(skill, 1, task.language, task.style) for skill in task.skills)
    # The style is not part of the seed: math_a and math_a_words ask the same questions.
    rng = Random("/".join([*(skill.__name__ for skill in task.skills), task.language, part]))
    taken = _searched() if part == "selection" else frozenset()
    fresh = (exercise for exercise in read(lessons, SIDES[part], rng) if in_a(exercise.question) not in taken)
    return list(islice(_different(fresh), ITEMS[part] if count is None else count))


@cache
def _searched() -> frozenset[Words]:
    """The questions that any task searches on, worded in language A."""
    return frozenset(in_a(exercise.question) for name in TASKS for exercise in items(name, "search"))


def _different(exercises: Iterable[Exercise]) -> Iterator[Exercise]:
    found: set[Exercise] = set()
    for exercise in exercises:
        if exercise not in found:
            found.add(exercise)
            yield exercise


def lines(name: str, part: Part) -> str:
    """A task's items as JSON lines."""
    rows = ({"question": " ".join(e.question), "answer": " ".join(e.answer)} for e in items(name, part))
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder: Path) -> None:
    """Write every task's data below the folder."""
    for name in TASKS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for part in ITEMS:
            (folder / name / f"{part}.jsonl").write_text(lines(name, part), encoding="utf-8")
