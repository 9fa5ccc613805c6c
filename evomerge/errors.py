"""The errors that users see.

    EvomergeError
    ├── InputError          what was asked for is wrong: exit status 2, nothing written
    └── WorkFailed          the work itself failed: exit status 1
        ├── CandidateFailed one candidate could not be merged or scored; the search goes on
        └── WorkerPoisoned  a worker's device answers no longer; the worker must be made anew, in another process

Every message is one sentence: where (file and key path), what was expected, what arrived, and what to do.
Anything else that escapes is a bug in evomerge.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

_LISTED, _CLOSEST = 40, 3


class EvomergeError(Exception):
    """The root of every error that evomerge raises on purpose."""

    exit_status = 1


class InputError(EvomergeError):
    """The configuration, recipe, model or path that the user gave is wrong."""

    exit_status = 2


class WorkFailed(EvomergeError):
    """The input was fine, but the work could not be done."""


class CandidateFailed(WorkFailed):
    """One candidate could not be merged or scored. Recorded in the archive; never stops a search."""


class WorkerPoisoned(WorkFailed):
    """A worker can evaluate nothing any more. Pools that can start another process do, and the search goes on."""


@contextmanager
def naming(where: object) -> Iterator[None]:
    """Within it, the message of an InputError opens with a place.

    where: a file, or a key path in a file.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that is most like an unknown name; None where none is like it. Case makes no difference.

    name: the unknown name.
    valid: the valid names.
    """
    by_lower = {other.lower(): other for other in sorted(valid)}
    lower = name.lower()
    near, far = (get_close_matches(lower, by_lower, n=1, cutoff=cutoff) for cutoff in (0.75, 0.5))
    begins = [other for other in by_lower if other == re.split(r"[^a-z]", lower)[0]]  # base, of base_model
    found = near or begins or far
    return by_lower[found[0]] if found else None


def choices(name: str, valid: Iterable[str]) -> str:
    """A phrase for a message about an unknown name: the closest valid name, then all valid names.

    Of a long list, such as the tensors of a model, it has only the few closest names.

    name: the unknown name.
    valid: the valid names.
    """
    names = sorted(valid)
    if len(names) > _LISTED:
        several = get_close_matches(name, names, n=_CLOSEST, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, several))}? " if several else ""
        return f"{hint}there are {len(names)} valid names"
    close = closest(name, names)
    hint = f"did you mean '{close}'? " if close else ""
    return f"{hint}valid names: {', '.join(names) or '(none)'}"


def first_line(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
