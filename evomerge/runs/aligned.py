"""Aligned copies of a search's models: written into the run directory before its workers start, each once.

A copy is whole or not there, and says what it is made of. So a run that was killed goes on with the copies that it has.
Workers on other machines read them where they lie, as they do the run's statistics.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from evomerge.alignment.align import Alignment, Reading, align_model, noted, subject
from evomerge.config.search import SearchConfig
from evomerge.errors import InputError
from evomerge.events import AlignmentStarts, Listener, ModelAligned, Warned
from evomerge.files import ALIGNED
from evomerge.merging.sources.models import models_of
from evomerge.recipe import Aligned
from evomerge.runs.lock import run_lock
from evomerge.search.preparation import Prepared

_JUDGED = 32  # items on which the loss barrier is measured; a barrier that matters is many times their spread


def with_copies(prepared: Prepared, directory: Path, listener: Listener) -> Prepared:
    """The search with aligned copies in the place of the models that it has aligned. Those that are not in the run
    directory are written.

    prepared: the search, with its tasks.
    directory: the run directory; it is made where there is something to write.
    listener: is told of each copy.
    Raises InputError where another process writes to the directory, or where there is nothing to compare models on.
    """
    folders = {name: own.folder for name, own in prepared.config.align.items()}
    asked = [name for name, folder in folders.items() if folder is None]
    if not asked:
        return prepared
    read = _readings(prepared, asked)
    directory.mkdir(parents=True, exist_ok=True)
    with run_lock(directory):
        for leftover in (directory / ALIGNED).glob(".*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        for name in asked:
            _copy(prepared, name, read[name], directory / ALIGNED / name, listener)
    return in_place(prepared, folders | {name: str((directory / ALIGNED / name).resolve()) for name in asked})


def in_place(prepared: Prepared, folders: Mapping[str, str | None]) -> Prepared:
    """The search with aligned copies in the place of models.

    prepared: the search.
    folders: the copies, by the model's name.
    Raises InputError where one is missing.
    """
    config = prepared.config.with_copies(folders)
    return replace(prepared, config=config, models=models_of(config))


def portable(config: SearchConfig, directory: Path) -> SearchConfig:
    """The config as a run directory keeps it: its own copies are found where it is moved, too."""
    own = (directory / ALIGNED).resolve()
    folders = {name: aligned.folder for name, aligned in config.align.items()}
    return config.with_copies(
        {name: f"{ALIGNED}/{name}" if folder == str(own / name) else folder for name, folder in folders.items()}
    )


def brought(config: SearchConfig) -> dict[str, Aligned]:
    """What the alignment of a search's models brought, by the model's name, as their copies say."""
    found = {name: noted(Path(own.folder)) for name, own in config.align.items() if own.folder is not None}
    return {name: _told(config, name, of[1]) for name, of in found.items() if of is not None}


def _copy(prepared: Prepared, name: str, read: Sequence[Reading], folder: Path, listener: Listener) -> None:
    """Writes the aligned copy of a model, unless it is there."""
    config, started = prepared.config, time.perf_counter()
    by, base, model = config.align[name].by, prepared.models.base, prepared.models[config.models[name]]
    there = noted(folder)
    if there is not None and there[0] == subject(base, model, by, read):
        found = there[1]
    else:
        listener(AlignmentStarts(name, by))
        shutil.rmtree(folder, ignore_errors=True)  # made of something else
        found = align_model(base, model, folder, by, read, read[:: max(1, len(read) // _JUDGED)][:_JUDGED])
    doubt = found.doubt(name)
    if doubt is not None:
        listener(Warned(doubt))
    listener(ModelAligned(name, _told(config, name, found).sentence, time.perf_counter() - started))


def _readings(prepared: Prepared, names: Sequence[str]) -> dict[str, list[Reading]]:
    """What statistics of models are measured on, by the model's name, with the right answers as what counts. It may be
    nothing for a model whose weights are compared."""
    from evomerge.workers.worker import Worker, rehearsed_models

    without_data = rehearsed_models(prepared.config, prepared.models)
    worker = Worker(prepared.config, prepared.models, prepared.targets, rehearsal=without_data)
    found: dict[str, list[Reading]] = {}
    for name in names:
        try:
            answers = worker.answers(prepared.config.models[name])
        except InputError:
            if prepared.config.align[name].by == "activations":
                raise
            answers = {}
        found[name] = [Reading(tokens, first) for tokens, first in answers.items()]
    return found


def _told(config: SearchConfig, name: str, found: Alignment) -> Aligned:
    heights = None if found.barriers is None else (found.barriers[0].height, found.barriers[1].height)
    own = config.align[name].by
    return Aligned(
        model=config.models[name], to=config.base, by=own, distance=(found.before, found.after), barrier=heights
    )
