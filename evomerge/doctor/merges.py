"""Whether all ways to make a merge make the same weights."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evomerge.config.search import SearchConfig
from evomerge.devices import free_memory, is_accelerator, resolve_compile
from evomerge.doctor import Finding, Patient
from evomerge.errors import InputError, first_line
from evomerge.export import checkpoint
from evomerge.merging import vocabulary
from evomerge.merging.resident.models import ResidentModels
from evomerge.merging.resident.sources import Kept, Where
from evomerge.merging.sources.models import Models
from evomerge.merging.sources.tensor_files import parameter_count
from evomerge.randomness import counter_rng
from evomerge.recipe import Recipe
from evomerge.search.preparation import Prepared
from evomerge.spaces import at

_DRAWN = 2  # recipes, besides the one in the middle of the space
_OFF_DEVICE: tuple[Where, ...] = ("host", "disk")
_FILLED = 0.9  # of the free memory, at most
_NO_CHECKPOINT = "no checkpoint can hold layers that run side by side"
_ROOM = 1.5  # times the size of a checkpoint, which must be free to write one


@dataclass(frozen=True, slots=True)
class Way:
    """A way to make merges.

    name: says on which device, and how.
    ready: loads what it needs, and returns what makes the fingerprint of a recipe's merge. Only one way at a time holds
        models.
    missing: why this machine has too little memory or room for it; None where it has enough.
    """

    name: str
    ready: Callable[[], Callable[[Recipe], str]]
    missing: str | None = None


def fingerprints(patient: Patient) -> Iterator[Finding]:
    """The fingerprints of some recipes of the space, made in every way that this machine has room for."""
    recipes = list(_recipes(patient))
    expected: list[str] = []
    first = ""
    for way in _ways(patient, any(recipe.evomerge.parallel for recipe in recipes)):
        if way.missing is not None:
            yield Finding("fingerprints", way.name, "those of the other ways", f"left out: {way.missing}", True)
            continue
        try:
            found = _made(way, recipes)
        except Exception as error:  # a way that is broken must not hide the others
            yield Finding("fingerprints", way.name, "a merge", first_line(error), False)
            continue
        wanted = f"those of {first}" if expected else f"{len(recipes)} merges"
        yield Finding("fingerprints", way.name, wanted, ", ".join(found), not expected or found == expected)
        if not expected:
            expected, first = found, way.name
    if not expected:
        yield Finding("fingerprints", "this machine", "room for a merge", "none", False)


def _made(way: Way, recipes: Sequence[Recipe]) -> list[str]:
    fingerprint = way.ready()
    return [fingerprint(recipe) for recipe in recipes]


def recipe_in_the_middle(patient: Patient) -> Recipe:
    """The recipe in the middle of the search's space."""
    return recipe_of_the_middle(patient.prepared)


def recipe_of_the_middle(prepared: Prepared) -> Recipe:
    """The recipe in the middle of a prepared search's space."""
    space = prepared.space
    return space.decode(at(space.genes, np.full(len(space.genes), 0.5)))


def _recipes(patient: Patient) -> Iterator[Recipe]:
    space, config = patient.prepared.space, patient.prepared.config
    yield recipe_in_the_middle(patient)
    for index in range(_DRAWN):
        yield space.decode(space.draw(counter_rng(config.seed, "doctor", index)))


def _ways(patient: Patient, parallel: bool) -> Iterator[Way]:
    """The ways to make merges.

    parallel: whether some of them have layers that run side by side, and so no checkpoint.
    """
    for device in patient.devices:
        yield _way(patient, device, device)
        for place in _OFF_DEVICE:
            yield _way(patient, f"{device}, sources on the {place}", device, sources=place)
        yield _way(patient, f"{device}, fields made again", device, fields="made")
        if not patient.prepared.config.space.changes_layers:
            yield _way(patient, f"{device}, before they are quantized", device, quantized=True)
    if _compiles():
        yield _way(patient, "cpu, compiled", "cpu", compiled=True)
    yield Way(
        "cpu, as `evomerge merge` writes them",
        lambda: _written(patient),
        _NO_CHECKPOINT if parallel else _no_room(patient),
    )


def _way(
    patient: Patient,
    name: str,
    device: str,
    sources: Where = "device",
    fields: Kept = "kept",
    compiled: bool = False,
    quantized: bool = False,
) -> Way:
    """The way of a worker. Where the sources are off the device, it reads them in pieces."""
    prepared = patient.prepared

    def ready() -> Callable[[Recipe], str]:
        models = ResidentModels(
            prepared.models,
            device,
            prepared.config.evaluation.dtype,
            compiled,
            sources=sources,
            fields=fields,
            quantized=quantized,
            vocabulary=vocabulary.of_search(prepared.config, prepared.models),
        )
        return lambda recipe: models.materialize(recipe, quantized)

    return Way(name, ready, _too_little(patient, torch.device(device), sources))


def _too_little(patient: Patient, device: torch.device, sources: Where) -> str | None:
    """A clause where the memory of a device or of the host does not hold a merge and what else is kept there."""
    size, count = _size(patient), len(patient.prepared.models)
    there = size * (1 + count * (sources == "device"))
    here = size * count * (sources == "host") + (0 if is_accelerator(device) else there)
    for name, needed, free in (
        (str(device), there if is_accelerator(device) else 0, free_memory(device)),
        ("the host", here, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")),
    ):
        if needed > _FILLED * free:
            return f"{name} has {free / 2**30:.1f} GiB free, and {needed / 2**30:.1f} are needed"
    return None


def _size(patient: Patient) -> int:
    """How many bytes a merge has."""
    width: int = getattr(torch, patient.prepared.config.evaluation.dtype).itemsize
    return width * parameter_count(patient.prepared.models.table)


def _no_room(patient: Patient) -> str | None:
    """A clause where there is too little room for a checkpoint on the disk."""
    folder = tempfile.gettempdir()
    free, needed = shutil.disk_usage(folder).free, _ROOM * _size(patient)
    if free >= needed:
        return None
    return f"{folder} has {free / 2**30:.1f} GiB free, and a checkpoint takes {needed / 2**30:.1f} (TMPDIR is another)"


def _compiles() -> bool:
    try:
        return resolve_compile(True, "cpu", 0)
    except InputError:
        return False


def _written(patient: Patient) -> Callable[[Recipe], str]:
    """Writes checkpoints to a temporary folder."""
    return lambda recipe: _write(recipe, patient.prepared.config, patient.prepared.models)


def _write(recipe: Recipe, config: SearchConfig, models: Models) -> str:
    provenance = recipe.evomerge.model_copy(update={"head_apart": models.head_apart})
    whole = recipe.model_copy(update={"dtype": config.evaluation.dtype, "evomerge": provenance})
    whole = vocabulary.with_tokens(whole, config, models)
    with tempfile.TemporaryDirectory() as folder:
        fingerprint, _ = checkpoint.merge(whole, Path(folder) / "merged", "the recipe", tokenizer=False, card=False)
    return fingerprint
