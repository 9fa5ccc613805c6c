"""Statistics of models, as they lie on the disk: measured once, read by workers and by `merge` alike.

A folder holds one kind of statistic of one model, as safetensors beside statistics.json, which says what it was
measured on. Its name is `KIND-SUBJECT-DIGEST`. The subject is a hash of what was measured: the model's files, the items
and the settings. The digest is one of the values, so a name stands for the same bits everywhere.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from evomerge.errors import InputError
from evomerge.files import STATISTICS
from evomerge.merging.methods.base import JOINT, Kind
from evomerge.merging.sources.models import Model
from evomerge.merging.sources.weights import Weights
from evomerge.recipe import Recipe

if TYPE_CHECKING:
    import torch

NOTES = "statistics.json"
WORDS: Mapping[Kind, str] = {
    "fisher": "the Fisher information",
    "grams": "the Gram matrices of inputs",
    "merged_grams": "the Gram matrices of inputs behind merged layers",
    "activations": "the magnitudes of activations",
    "outputs": "the outputs of layers",
    "row_weights": "the weights of rows",
}
Names = Mapping[str, Mapping[str, str]]
"""The names of folders with statistics, by the model's reference and the kind."""


def subject(kind: Kind, models: Sequence[str], measured: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that stand for what is measured.

    kind: the kind of statistic.
    models: the identities of the models' files (`Model.identity`).
    measured: the settings, and digests of the items.
    """
    content = json.dumps([kind, list(models), measured], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


class Readable(Protocol):
    """A statistic of a model, wherever it lies.

    mean: the mean of all values of the model.
    """

    @property
    def mean(self) -> float: ...

    def tensor_of(self, name: str) -> str | None:
        """What the statistic of the tensor `name` is called; None where there is none."""
        ...

    def transposed(self, name: str) -> bool:
        """Whether the tensor `name` has a row, not a column, for each channel of its inputs."""
        ...

    def read(self, name: str) -> "torch.Tensor":
        """A tensor by what it is called, on the CPU."""
        ...


@dataclass(frozen=True)
class Stored:
    """A statistic on the disk.

    folder: where it lies.
    notes: what statistics.json says.
    identity: of the model that it is asked for; files of `JOINT` statistics hold those of several.
    """

    folder: Path
    notes: Mapping[str, Any]
    identity: str = ""

    @cached_property
    def weights(self) -> Weights:
        """Its tensors."""
        return Weights(self.folder)

    @property
    def mean(self) -> float:
        """The mean of all values of the model."""
        return float(self.notes.get("mean", 1.0))

    def tensor_of(self, name: str) -> str | None:
        """The name that the statistic of the tensor `name` has in the files; None where there is none."""
        stored = self.notes.get("shared", {}).get(name, name)
        if self.notes["kind"] in JOINT:
            stored = f"{self.notes['models'].index(self.identity)}:{stored}"
        return stored if stored in self.weights.table else None

    def transposed(self, name: str) -> bool:
        """Whether the tensor `name` has a row, not a column, for each channel of its inputs."""
        return name in self.notes.get("transposed", ())

    def read(self, name: str) -> "torch.Tensor":
        """A tensor of the files, on the CPU."""
        tensor = self.weights.read(name)
        self.weights.close()
        return tensor


def read(folder: Path) -> Stored:
    """The statistic in a folder. Raises InputError where there is none that can be read."""
    try:
        notes = json.loads((folder / NOTES).read_text(encoding="utf-8"))
        assert {"kind", "models"} <= notes.keys()
    except (OSError, ValueError, AttributeError, AssertionError) as error:
        raise InputError(f"{folder / NOTES}: cannot be read ({error}); measure it again.") from None
    return Stored(folder, notes)


class Shelf:
    """Folders in which statistics are looked for."""

    def __init__(self, folders: Sequence[Path] = (), names: Names | None = None, where: str = "the recipe") -> None:
        """folders: where statistics lie, the first one first.
        names: the names of the folders that a recipe was scored with.
        where: what the recipe is called, which opens an error's message.
        """
        self._folders, self._names, self._where = list(dict.fromkeys(folders)), dict(names or {}), where

    def name(self, kind: Kind, reference: str) -> str | None:
        """The name of the folder that the recipe was scored with; None where it does not say."""
        return self._names.get(reference, {}).get(kind)

    def look(self, pattern: str, versions: Mapping[str, str] | None = None) -> Stored | None:
        """A statistic by a pattern of its folder's name, rather one that was measured with the given versions."""
        found = [read(path.parent) for folder in self._folders for path in sorted(folder.glob(f"{pattern}/{NOTES}"))]
        return next((each for each in found if each.notes.get("versions") == versions), found[0] if found else None)

    def find(self, kind: Kind, reference: str, identity: str) -> Stored:
        """The statistic of a model: the one that the recipe names, or else the only one of the model's files.

        kind: the kind of statistic.
        reference: the model's.
        identity: of the model's files.
        Raises InputError where there is none, or where several could be meant.
        """
        name = self.name(kind, reference)
        found = {
            path.parent.name: stored
            for folder in self._folders
            for path in sorted(folder.glob(f"{name or f'{kind}-*'}/{NOTES}"))
            if identity in (stored := read(path.parent)).notes["models"] and stored.notes["kind"] == kind
        }
        what = f"{WORDS[kind]} of {reference}"
        if not found:
            looked = ", ".join(map(str, self._folders)) or "no folder"
            raise InputError(
                f"{self._where}: the merge needs {what}{f' ({name})' if name else ''}, but it is not in {looked}; make "
                "it with `evomerge measure SEARCH.yaml -o FOLDER`, and give --statistics FOLDER."
            )
        if len(found) > 1:
            raise InputError(
                f"{self._where}: {what} was measured {len(found)} times ({', '.join(sorted(found))}); keep the one "
                "that is meant in a folder of its own, and give --statistics."
            )
        return replace(next(iter(found.values())), identity=identity)

    def finder(self, models: Mapping[str, Model]) -> "Find":
        """Finds the statistics of models, each once.

        models: the models, by reference.
        """

        @cache
        def find(kind: Kind, reference: str) -> Stored:
            return self.find(kind, reference, models[reference].identity)

        return find


def shelf_of(recipe: Recipe, where: str, folder: Path | None = None) -> Shelf:
    """The folders in which a recipe's statistics are looked for: the given one, that of its run, and those beside it.

    recipe: the recipe.
    where: its file, or what else it is called.
    folder: a folder that the user gives.
    Raises InputError where that is no folder.
    """
    if folder is not None and not folder.is_dir():
        raise InputError(f"--statistics is {folder}, which is no folder; give the one that `evomerge measure` wrote.")
    noted = recipe.evomerge.statistics
    beside = Path(where).absolute().parent
    places = [folder, Path(noted.folder) if noted and noted.folder else None, beside / STATISTICS, beside]
    return Shelf([place for place in places if place is not None], noted.names if noted else None, where)


Find = Callable[[Kind, str], Readable]
"""A kind and a model's reference -> what was measured. Raises InputError where it is missing."""
