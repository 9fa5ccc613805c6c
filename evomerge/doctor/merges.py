"""Whether all ways to make a merge make the same weights."""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from evomerge.config.search import SearchConfig
from evomerge.devices import resolve_compile
from evomerge.doctor import Finding, Patient
from evomerge.errors import EvomergeError, InputError
from evomerge.export import checkpoint
from evomerge.merging.resident.models import ResidentModels
from evomerge.randomness import counter_rng
from evomerge.recipe import Recipe
from evomerge.spaces import at

_DRAWN = 2  # recipes, besides the one in the middle of the space
_ROOM = 1.5  # times the size of a checkpoint, which must be free to write one


def fingerprints(patient: Patient) -> Iterator[Finding]:
    """The fingerprints of some recipes of the space, made in every way that this machine has."""
    recipes = list(_recipes(patient))
    expected: list[str] = []
    first = ""
    for name, make in _ways(patient).items():
        try:
            fingerprint = make()
            found = [fingerprint(recipe) for recipe in recipes]
            del fingerprint  # with the models that it holds
        except EvomergeError as error:
            yield Finding("fingerprints", name, "a merge", str(error), False)
            continue
        if not expected:
            expected, first = found, name
            yield Finding("fingerprints", name, f"{len(recipes)} merges", ", ".join(found), True)
        else:
            yield Finding("fingerprints", name, f"those on {first}", ", ".join(found), found == expected)


def recipe_in_the_middle(patient: Patient) -> Recipe:
    """The recipe in the middle of the search's space."""
    space = patient.prepared.space
    return space.decode(at(space.genes, np.full(len(space.genes), 0.5)))


def _recipes(patient: Patient) -> Iterator[Recipe]:
    space, config = patient.prepared.space, patient.prepared.config
    yield recipe_in_the_middle(patient)
    for index in range(_DRAWN):
        yield space.decode(space.draw(counter_rng(config.seed, "doctor", index)))


def _ways(patient: Patient) -> dict[str, Callable[[], Callable[[Recipe], str]]]:
    """By name, what makes ready for merging in a way. Only one of them holds models at a time."""
    config = patient.prepared.config
    ways: dict[str, Callable[[], Callable[[Recipe], str]]] = {}

    def add(name: str, device: str, compiled: bool = False, quantized: bool = False) -> None:
        def ready() -> Callable[[Recipe], str]:
            models = ResidentModels(
                patient.prepared.models, device, config.evaluation.dtype, compiled, quantized=quantized
            )
            return lambda recipe: models.materialize(recipe, quantized)

        ways[name] = ready

    for device in patient.devices:
        add(f"{device}", device)
        if not config.space.changes_layers:
            add(f"{device}, before it is quantized", device, quantized=True)
    if _compiles():
        add("cpu, compiled", "cpu", compiled=True)
    ways["cpu, as `evomerge merge` writes it"] = lambda: _written(patient)
    return ways


def _compiles() -> bool:
    try:
        return resolve_compile(True, "cpu", 0)
    except InputError:
        return False


def _written(patient: Patient) -> Callable[[Recipe], str]:
    """Writes checkpoints to a temporary folder. Raises InputError where there is too little room on the disk."""
    config = patient.prepared.config
    width: int = getattr(torch, config.evaluation.dtype).itemsize
    needed = _ROOM * width * sum(math.prod(info.shape) for info in patient.prepared.models.table.values())
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < needed:
        raise InputError(
            f"{tempfile.gettempdir()}: {free / 2**30:.1f} GiB are free, and a checkpoint takes {needed / 2**30:.1f}; "
            "set TMPDIR to a larger disk."
        )
    head_apart = patient.prepared.models.head_apart
    return lambda recipe: _write(recipe, config, head_apart)


def _write(recipe: Recipe, config: SearchConfig, head_apart: bool) -> str:
    provenance = recipe.evomerge.model_copy(update={"head_apart": head_apart})
    whole = recipe.model_copy(update={"dtype": config.evaluation.dtype, "evomerge": provenance})
    with tempfile.TemporaryDirectory() as folder:
        fingerprint, _ = checkpoint.merge(whole, Path(folder) / "merged", "the recipe", tokenizer=False, card=False)
    return fingerprint
