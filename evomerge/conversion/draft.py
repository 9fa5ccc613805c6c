"""A search file that is being made: its settings, and comments on what was translated and what was not."""

import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evomerge.config.base import RESERVED_NAMES

_WIDTH = 100
_NAMED_PART = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class Note:
    """What the user should know of a conversion.

    key: the top-level key of the search file that the sentence is about; empty for the file as a whole.
    text: the sentence.
    lost: whether it says what could not be translated.
    """

    key: str
    text: str
    lost: bool = False


@dataclass(slots=True)
class Draft:
    """A search file that is being made.

    settings: its content, by top-level key.
    notes: the comments on it.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    def say(self, key: str, text: str) -> None:
        """Adds a comment to a top-level key."""
        self.notes.append(Note(key, text))

    def lose(self, key: str, text: str) -> None:
        """Adds a comment on what could not be translated."""
        self.notes.append(Note(key, text, lost=True))

    @property
    def lost(self) -> list[str]:
        """The sentences on what could not be translated, in the order of the file."""
        return [_one_line(note.text) for note in self._sorted() if note.lost]

    def text(self, opening: str) -> str:
        """The search file in YAML, with its comments above the keys that they are about.

        opening: its first sentence.
        """
        blocks = [_comment([opening, *self._about("")])]
        for key, value in self.settings.items():
            written = yaml.safe_dump(
                {key: value},
                sort_keys=False,
                allow_unicode=True,
                width=_WIDTH + 20,
                default_flow_style=False if key == "models" or not isinstance(value, dict | list) else None,
            )
            blocks.append(_comment(self._about(key)) + written)
        return "\n".join(blocks)

    def _about(self, key: str) -> list[str]:
        return [("Not kept: " if note.lost else "") + note.text for note in self._sorted() if self._place(note) == key]

    def _sorted(self) -> list[Note]:
        places = ["", *self.settings]
        return sorted(self.notes, key=lambda note: places.index(self._place(note)))

    def _place(self, note: Note) -> str:
        """The key above which a note stands: at the top of the file where the file lacks its key."""
        return note.key if note.key in self.settings else ""


def _comment(sentences: Iterable[str]) -> str:
    lines = [line for text in sentences for line in textwrap.wrap(_one_line(text), _WIDTH)]
    return "".join(f"# {line}\n" for line in lines)


def _one_line(text: str) -> str:
    """A text without line breaks and characters that YAML refuses in comments."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def named(references: Sequence[str]) -> dict[str, str]:
    """Names for models, as a search file needs them.

    references: of the models, no two alike.
    Returns the references by name.
    """
    names: dict[str, str] = {}
    for reference in references:
        parts = reference.rpartition("+")[2].partition("@")[0].removeprefix("zoo:").rstrip("/").split("/")
        short, long = _name(parts[-1:]), _name(parts[-2:])
        numbered = (f"{short}-{number}" for number in range(2, len(references) + 3))
        free = next(name for name in (short, long, *numbered) if name not in names and name not in RESERVED_NAMES)
        names[free] = reference
    return names


def _name(parts: Sequence[str]) -> str:
    return _NAMED_PART.sub("-", "-".join(parts)).lstrip("_.-") or "model"


def name_of(models: Mapping[str, str], reference: str) -> str:
    """The name of a model in a search file; `base` where it is none of the models."""
    return next((name for name, other in models.items() if other == reference), "base")


@dataclass(frozen=True, slots=True)
class Folder:
    """Where the search file will lie. Its relative paths start there, while those of mergekit start at the working
    directory."""

    path: Path

    def relocated(self, reference: str) -> str:
        """A model reference as the search file has it. Hub ids and absolute paths stay as they are."""
        if reference.startswith("zoo:") or Path(reference).is_dir():
            return self.place(reference)
        return "+".join(self.place(part) for part in reference.split("+"))

    def place(self, path: str, is_path: bool = False) -> str:
        """A path as the search file has it.

        path: a path, or what may be one.
        is_path: whether it is one, though nothing may be there.
        """
        local = is_path or path.startswith(("./", "../")) or (not path.startswith("zoo:") and _exists(path))
        if not local or path.startswith(("/", "~")):
            return path
        moved = os.path.relpath(Path.cwd() / path, os.path.abspath(self.path))
        return moved if moved.startswith("..") or is_path else f"./{moved}"


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False
