"""Weights & Biases, with its own login and settings (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and the like)."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.runs.journal import OpenRun

PROJECT = "evomerge"


class WeightsAndBiases:
    """See `Tracker`."""

    def __init__(self, run: OpenRun) -> None:
        """run: the run. Resumed, it goes on with the same W&B run. Raises ImportError where wandb is not installed."""
        import wandb

        place = f"{run.directory.resolve()} {run.config.digest()}"
        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.directory.name,
            id=hashlib.sha256(place.encode()).hexdigest()[:16],
            resume="allow",
            dir=str(run.directory),
        )

    def settings(self, content: Mapping[str, Any]) -> None:
        """Keeps the config."""
        self._run.config.update(dict(content), allow_val_change=True)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Draws each number over the evaluations. A resumed run may come to a step again, which W&B then ignores."""
        self._run.log(dict(values), step=step)

    def file(self, path: Path) -> None:
        """Keeps a file as an artifact."""
        artifact = self._wandb.Artifact(f"{self._run.id}-{path.stem}", type="recipe")
        artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def close(self) -> None:
        """Writes what is left."""
        self._run.finish()
