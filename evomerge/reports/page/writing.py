"""Writes the page of a run, once or again and again while its search runs."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from evomerge.errors import InputError
from evomerge.files import write_text
from evomerge.reports.page.html import page
from evomerge.reports.page.story import Story
from evomerge.runs import directory as runs
from evomerge.runs.lock import is_running

_PAUSE = 10.0  # seconds between two pages of a running search
_REST = 5.0  # times as long as a page took, so that the search keeps the machine


def write(directory: Path, output: Path, items: bool = False, watched: bool = False) -> Story:
    """Writes the page of a run and returns what it was made of.

    directory: the run directory.
    output: the file, which is replaced if it exists.
    items: whether the page has the text of items.
    watched: whether the page reads itself again while the search runs.
    Raises InputError where the run cannot be read or the file cannot be written.
    """
    check_output(output)
    running = is_running(directory)  # asked first: what is written until it ends is then on the page
    story = Story(runs.read(directory), running, str(directory), items)
    write_text(output, page(story, watched))
    return story


def watch(
    directory: Path,
    output: Path,
    items: bool = False,
    pause: float = _PAUSE,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Story]:
    """Writes the page of a run again and again until nobody works on the run any more. Yields what each page was made
    of.

    pause: seconds between two pages at least.
    sleep: waits for so many seconds.
    The other parameters are those of `write`, which raises the same errors.
    """
    while True:
        began = time.monotonic()
        story = write(directory, output, items, watched=True)
        took = time.monotonic() - began
        yield story
        if not story.running:
            return
        sleep(max(pause, _REST * took))


def check_output(output: Path) -> None:
    """Raises InputError where a page cannot be written to a file."""
    if output.is_dir():
        raise InputError(f"{output}: is a folder; give -o the name of a file.")
    if not output.parent.is_dir():
        raise InputError(f"{output}: the folder {output.parent} does not exist; make it, or choose another -o.")
    if not os.access(output.parent, os.W_OK):
        raise InputError(f"{output}: the folder {output.parent} cannot be written to; choose another -o.")
