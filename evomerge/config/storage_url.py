"""Storage URLs: their passwords stay out of files and messages, and come from the environment when they are opened."""

import os
import re

from evomerge.errors import InputError

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_IN_FRONT_OF_HOST = re.compile(r"(://[^:@/\s]*):\S+@")
_AMONG_OPTIONS = re.compile(r"([?&](?:password|passwd|sslpassword)=)[^&\s]+")


def masked(text: str) -> str:
    """A URL, or a message that quotes one, with *** in place of every password."""
    return _AMONG_OPTIONS.sub(r"\1***", _IN_FRONT_OF_HOST.sub(r"\1:***@", text))


def refuse_password(url: str) -> str:
    """The URL itself. Raises ValueError where it holds a password, which would be copied into the run directory."""
    literal = _VARIABLE.sub("", url)
    if masked(literal) != literal:
        raise ValueError(
            f"{masked(url)} holds a password, which would be copied into the run directory; write "
            "${EVOMERGE_STORAGE} and set that environment variable to the URL, or use PGPASSWORD or ~/.pgpass"
        )
    return url


def expanded(url: str) -> str:
    """The URL with every ${NAME} replaced by the environment variable. Raises InputError for one that is not set."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise InputError(
                f"storage is {masked(url)}, but the environment variable {match[1]} is not set here; set it to what "
                "the storage's URL needs."
            )
        return os.environ[match[1]]

    return _VARIABLE.sub(value, url)
