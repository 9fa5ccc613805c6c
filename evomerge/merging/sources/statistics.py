"""Statistics of models, as they lie on the disk: measured once, read by workers and by `merge` alike.

A folder holds one kind of statistic of one model, as safetensors beside statistics.json, which says what it was
measured on. Its name is `KIND-SUBJECT-DIGEST`. The subject is a hash of what was measured: the model's files, the items
and the settings. The digest is one of the values, so a name stands for the same bits everywhere.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from evomerge.config.documents import validate
from evomerge.errors import InputError
from evomerge.files import STATISTICS
from evomerge.merging.methods.base import JOINT, Kind
from evomerge.merging.sources.models import Models
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


class Notes(BaseModel):
    """What statistics.json says.

    kind: the kind of statistic.
    models: the identities of the models that were measured.
    measured: the settings, digests of the items, and for `JOINT` statistics the identity of the base.
    versions: those of the packages that computed them.
    mean: the mean of all values of the model.
    shared: the tensor whose statistic stands for another tensor's, by that one's name.
    transposed: the tensors that have a row for each channel of their inputs.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    kind: Kind
    models: tuple[str, ...]
    measured: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    mean: float = 1.0
    shared: dict[str, str] = Field(default_factory=dict)
    transposed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Stored:
    """A statistic on the disk.

    folder: where it lies.
    notes: what statistics.json says.
    identity: of the model that it is asked for; files of `JOINT` statistics hold those of several.
    """

    folder: Path
    notes: Notes
    identity: str = ""

    @cached_property
    def weights(self) -> Weights:
        """Its tensors."""
        return Weights(self.folder)

    @property
    def mean(self) -> float:
        """The mean of all values of the model."""
        return self.notes.mean

    def tensor_of(self, name: str) -> str | None:
        """The name that the statistic of the tensor `name` has in the files; None where there is none."""
        stored = self.notes.shared.get(name, name)
        if self.notes.kind in JOINT:
            stored = f"{self.notes.models.index(self.identity)}:{stored}"
        return stored if stored in self.weights.table else None

    def transposed(self, name: str) -> bool:
        """Whether the tensor `name` has a row, not a column, for each channel of its inputs."""
        return name in self.notes.transposed

    def read(self, name: str) -> "torch.Tensor":
        """A tensor of the files, on the CPU."""
        tensor = self.weights.read(name)
        self.weights.close()
        return tensor

    def check(self, again: str) -> None:
        """Reads all values. Raises InputError where they are not those that the folder's name stands for.

        again: what to do to have them measured again.
        """
        from evomerge.merging.methods.kernels import checksum, fingerprint_of

        try:
            found = fingerprint_of(int(checksum(self.read(name), name)) for name in self.weights.table)
        except InputError as error:
            raise InputError(f"{str(error).rpartition('; ')[0]}; remove the folder, and {again}.") from None
        expected = self.folder.name.rpartition("-")[2]
        if found != expected:
            raise InputError(
                f"{self.folder}: its values have changed, since their digest is {found} and the folder's name ends in "
                f"{expected}; restore the files, or remove the folder, and {again}."
            )


def read(folder: Path) -> Stored:
    """The statistic in a folder. Raises InputError where there is none that can be read."""
    file = folder / NOTES
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error}); remove the folder, and measure again.") from None
    return Stored(folder, validate(Notes, content, file))


def remove_unfinished(folder: Path) -> None:
    """Removes what processes that were killed have left of measurements (see `unfinished`).

    folder: where statistics lie. No other process may be writing there.
    """
    for kind in WORDS:
        for path in folder.glob(f"{unfinished(kind)}*"):
            shutil.rmtree(path, ignore_errors=True)


def unfinished(kind: Kind) -> str:
    """What the name of a folder begins with while a statistic is written into it."""
    return f".{kind}-"


class Shelf:
    """Folders in which statistics are looked for."""

    def __init__(
        self,
        folders: Sequence[Path] = (),
        names: Names | None = None,
        where: str = "the recipe",
        base: str | None = None,
        again: str = "measure it with `evomerge measure SEARCH.yaml -o FOLDER`",
    ) -> None:
        """folders: where statistics lie. The first one that holds what is looked for decides.
        names: the names of the folders that a recipe was scored with.
        where: what the recipe is called, which opens an error's message.
        base: the reference of the base over which models are merged; by default that of the models.
        again: what to do to have a statistic measured.
        """
        self._folders, self._names, self._where = list(dict.fromkeys(folders)), dict(names or {}), where
        self._base, self._again, self._unchanged = base, again, set[Path]()

    def look(
        self, kind: Kind, reference: str, models: Models, subject: str, versions: Mapping[str, str]
    ) -> Stored | None:
        """The statistic that the recipe names, or else one of a subject, rather one that was measured with the given
        versions; None where there is none.

        kind: the kind of statistic.
        reference: the model's.
        models: the models, by reference.
        subject: what was measured (see `subject`).
        versions: those of the packages that compute statistics.
        Raises InputError where its values have changed.
        """
        found = self._lying(kind, reference, models, subject)
        best = next((each for each in found if each.notes.versions == versions), found[0] if found else None)
        return None if best is None else self._checked(best)

    def find(self, kind: Kind, reference: str, models: Models) -> Stored:
        """The statistic of a model: the one that the recipe names, or else the only one of the model's files.

        kind: the kind of statistic.
        reference: the model's.
        models: the models, by reference.
        Raises InputError where there is none, where several could be meant, or where its values have changed.
        """
        found = self._lying(kind, reference, models)
        name, what = self._name(kind, reference), f"{WORDS[kind]} of {reference}"
        if not found:
            looked = ", ".join(map(str, self._folders)) or "no folder"
            raise InputError(
                f"{self._where}: the merge needs {what}{f' ({name})' if name else ''}, and no such statistic of these "
                f"models lies in {looked}; {self._again}."
            )
        if len(found) > 1:
            names = ", ".join(each.folder.name for each in found)
            raise InputError(
                f"{self._where}: the merge needs {what}, and {found[0].folder.parent} holds {len(found)} measurements "
                f"({names}); move all but the one that is meant to another place."
            )
        return self._checked(found[0])

    @property
    def missing(self) -> list[str]:
        """The names of the folders that the recipe was scored with and that lie nowhere."""
        names = dict.fromkeys(name for kinds in self._names.values() for name in kinds.values())
        return [name for name in names if not any((folder / name / NOTES).is_file() for folder in self._folders)]

    def finder(self, models: Models) -> "Find":
        """Finds the statistics of models, each once.

        models: the models, by reference.
        """

        @cache
        def find(kind: Kind, reference: str) -> Stored:
            return self.find(kind, reference, models)

        return find

    def _name(self, kind: Kind, reference: str) -> str | None:
        """The name of the folder that the recipe was scored with; None where it does not say."""
        return self._names.get(reference, {}).get(kind)

    def _checked(self, stored: Stored) -> Stored:
        """A statistic, once all of its values have been read, which happens once. Raises InputError where they have
        changed."""
        if stored.folder not in self._unchanged:
            stored.check(self._again)
            self._unchanged.add(stored.folder)
        return stored

    def _lying(self, kind: Kind, reference: str, models: Models, subject: str = "*") -> list[Stored]:
        """The statistics of a model in the first folder that holds any: the one that the recipe names, or else all of a
        subject."""
        name, identity = self._name(kind, reference), models[reference].identity
        base = (models[self._base] if self._base is not None else models.base).identity if kind in JOINT else None

        def fits(notes: Notes) -> bool:
            over = notes.measured.get("base", base if name else None)  # earlier versions did not record it
            return notes.kind == kind and identity in notes.models and over == base

        def lying(folder: Path) -> Iterator[Stored]:
            for path in [folder / name] if name else sorted(folder.glob(f"{kind}-{subject}-*")):
                if (path / NOTES).is_file() and fits((stored := read(path)).notes):
                    yield replace(stored, identity=identity)

        return next((found for folder in self._folders if (found := list(lying(folder)))), [])


def shelf_of(recipe: Recipe, where: str, folder: Path | None = None) -> Shelf:
    """The folders in which a recipe's statistics are looked for: the given one, that of its run, and those beside it.

    recipe: the recipe.
    where: its file, or what else it is called.
    folder: a folder that the user gives.
    Raises InputError where that is no folder, or holds a single statistic itself.
    """
    if folder is not None and not folder.is_dir():
        raise InputError(f"--statistics is {folder}, which is no folder; give the one that `evomerge measure` wrote.")
    if folder is not None and (folder / NOTES).is_file():
        raise InputError(f"--statistics is {folder}, which is a single statistic; give the folder that it lies in.")
    noted = recipe.evomerge.statistics
    beside = Path(where).absolute().parent
    places = [folder, Path(noted.folder) if noted and noted.folder else None, beside / STATISTICS, beside]
    again = f"measure it with `evomerge measure SEARCH.yaml -o {beside / STATISTICS}`"
    names = noted.names if noted else None
    return Shelf([place for place in places if place is not None], names, where, recipe.base_model, again)


Find = Callable[[Kind, str], Readable]
"""A kind and a model's reference -> what was measured. Raises InputError where it is missing."""
