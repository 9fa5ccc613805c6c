"""What a tracker takes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """A place that keeps numbers of a run and draws them. Any exception makes it be left alone from then on."""

    def settings(self, content: Mapping[str, Any]) -> None:
        """Takes the search's config, as plain values."""
        ...

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Takes numbers.

        step: the number of candidates and controls that have been scored so far.
        values: the numbers, by names such as `search/math`.
        """
        ...

    def file(self, path: Path) -> None:
        """Takes a file of the run directory."""
        ...

    def close(self) -> None:
        """Writes what is left."""
        ...
