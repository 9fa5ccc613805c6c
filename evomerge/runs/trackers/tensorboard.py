"""TensorBoard: event files in the folder `tensorboard` of the run directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from evomerge.runs.journal import OpenRun

FOLDER = "tensorboard"


class TensorBoard:
    """See `Tracker`."""

    def __init__(self, run: OpenRun) -> None:
        """run: the run. Raises ImportError where TensorBoard is not installed."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run.directory / FOLDER))

    def settings(self, content: Mapping[str, Any]) -> None:
        """Shows the config as text."""
        self._text("search", yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True), 0)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Draws each number over the evaluations."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def file(self, path: Path) -> None:
        """Shows a file as text."""
        self._text(path.name, path.read_text(encoding="utf-8"), 0)

    def _text(self, name: str, text: str, step: int) -> None:
        """Text as TensorBoard shows it word by word: as a block of code, since it reads text as Markdown."""
        self._writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()
