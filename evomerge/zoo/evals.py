"""The questions that score the zoo's models: one folder of JSON lines per task, written from fixed seeds.

The task YAML and README in each folder are written by hand; `write` only makes `search.jsonl` and `heldout.jsonl`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from evomerge.zoo.language import Exercise, Language, Lesson, Skill, Split, Style, copy, one_step, read, two_steps

ITEMS: dict[Split, int] = {"search": 200, "heldout": 400}


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


def items(name: str, split: Split, count: int | None = None) -> list[Exercise]:
    """A task's exercises on a split, all different."""
    task = TASKS[name]
    lessons = tuple(Lesson(skill, 1, task.language, task.style) for skill in task.skills)
    # The style is not part of the seed: math_a and math_a_words ask the same questions.
    seed = "/".join([*(skill.__name__ for skill in task.skills), task.language, split])
    return _different(lessons, split, ITEMS[split] if count is None else count, Random(seed))


def _different(lessons: tuple[Lesson, ...], split: Split, count: int, rng: Random) -> list[Exercise]:
    found: dict[Exercise, None] = {}
    for exercise in read(lessons, split, rng):
        found[exercise] = None
        if len(found) == count:
            break
    return list(found)


def lines(name: str, split: Split) -> str:
    """A task's items as JSON lines."""
    rows = ({"question": " ".join(e.question), "answer": " ".join(e.answer)} for e in items(name, split))
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder: Path) -> None:
    """Write every task's data below the folder."""
    for name in TASKS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split in ITEMS:
            (folder / name / f"{split}.jsonl").write_text(lines(name, split), encoding="utf-8")
