"""What the file of an archive holds, read straight from SQLite.

Optuna makes an object of every parameter of every trial, and imports two libraries of databases to do so. Whoever only
wants to see where a run stands should not wait for that.
"""

import json
import math
import sqlite3
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.archive.gradients import TABLE as GRADIENTS
from evomerge.archive.gradients import GradientRecord, of_row
from evomerge.candidate import Candidate, Kind
from evomerge.recipe import Recipe

_SCHEMA = "v3.2.0.a"  # of the tables that are read here, as Optuna numbers them
_FINISHED = ("COMPLETE", "FAIL")
_INFINITE = {"INF_POS": math.inf, "INF_NEG": -math.inf}


class KeptCandidate(Candidate):
    """A candidate whose recipe is read when it is first asked for. A recipe has some numbers for every tensor, and what
    shows how a search goes needs none of them."""

    __slots__ = ("_recipe", "_stored")
    _recipe: Recipe | None
    _stored: str

    def __init__(
        self, stored: str, id: str, kind: Kind, generation: int, index: int, genome: tuple[float, ...] | None
    ) -> None:
        """stored: the recipe in JSON.

        The other parameters are those of `Candidate`.
        """
        given = {"id": id, "kind": kind, "generation": generation, "index": index, "genome": genome}
        for name, value in (given | {"_stored": stored, "_recipe": None}).items():
            object.__setattr__(self, name, value)

    @property
    def recipe(self) -> Recipe:
        """How it is merged."""
        if self._recipe is None:
            object.__setattr__(self, "_recipe", Recipe.model_validate_json(self._stored))
        assert self._recipe is not None
        return self._recipe


@dataclass(frozen=True, slots=True)
class KeptTrial:
    """A finished trial.

    values: its scores by objective; None where it failed.
    params: the values of its genes by name. A categorical gene has the index of its choice.
    user_attrs: all else that is known of it, by key. The recipe is as it is stored, in JSON.
    """

    values: list[float] | None
    params: dict[str, float]
    user_attrs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class KeptStudy:
    """A study.

    user_attrs: what is known of the whole of it, by key.
    trials: its finished trials, in the order in which they were written.
    """

    user_attrs: Mapping[str, Any]
    trials: Sequence[KeptTrial]


@dataclass(frozen=True, slots=True)
class Kept:
    """What a file holds.

    studies: by name.
    gradients: those of all runs that begin with a name, by that name.
    """

    studies: Mapping[str, KeptStudy]
    gradients: Mapping[str, Sequence[GradientRecord]]


def read(file: Path) -> Kept | None:
    """What a file holds; None where its tables are others than are known here, so that Optuna has to read them.

    Another process may be writing to the file.

    file: an SQLite database.
    Raises sqlite3.Error where it is damaged.
    """
    # opened for writing, since only then SQLite can take back what a killed process has left half done
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=60)) as database:
        database.row_factory = sqlite3.Row
        database.execute("BEGIN")  # all that follows sees the same moment
        tables = {row["name"] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "alembic_version" not in tables or "trials" not in tables:
            return None
        if [row[0] for row in database.execute("SELECT version_num FROM alembic_version")] != [_SCHEMA]:
            return None
        return Kept(_studies(database), _gradients(database) if GRADIENTS in tables else {})


def _studies(database: sqlite3.Connection) -> dict[str, KeptStudy]:
    names = dict(database.execute("SELECT study_id, study_name FROM studies").fetchall())
    attributes: dict[int, dict[str, Any]] = defaultdict(dict)
    for study, key, value in database.execute("SELECT study_id, key, value_json FROM study_user_attributes"):
        attributes[study][key] = json.loads(value)
    trials: dict[int, list[KeptTrial]] = defaultdict(list)
    values, params, own = _values(database), _params(database), _attributes(database)
    for trial, study, state in database.execute("SELECT trial_id, study_id, state FROM trials ORDER BY trial_id"):
        if state in _FINISHED:
            by_objective = values.get(trial)
            scores = [by_objective[number] for number in sorted(by_objective)] if by_objective else None
            trials[study].append(KeptTrial(scores, params.get(trial, {}), own.get(trial, {})))
    return {name: KeptStudy(attributes[study], trials[study]) for study, name in names.items()}


def _values(database: sqlite3.Connection) -> dict[int, dict[int, float]]:
    found: dict[int, dict[int, float]] = defaultdict(dict)
    for trial, objective, value, kind in database.execute(
        "SELECT trial_id, objective, value, value_type FROM trial_values"
    ):
        found[trial][objective] = _INFINITE.get(kind, value)
    return found


def _params(database: sqlite3.Connection) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = defaultdict(dict)
    for trial, name, value in database.execute("SELECT trial_id, param_name, param_value FROM trial_params"):
        found[trial][name] = value
    return found


def _attributes(database: sqlite3.Connection) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = defaultdict(dict)
    for trial, key, value in database.execute("SELECT trial_id, key, value_json FROM trial_user_attributes"):
        found[trial][key] = value if key == "recipe" else json.loads(value)
    return found


def _gradients(database: sqlite3.Connection) -> dict[str, list[GradientRecord]]:
    found: dict[str, list[GradientRecord]] = defaultdict(list)
    for row in database.execute(f"SELECT * FROM {GRADIENTS}"):
        found[row["study"]].append(of_row(row))
    return found
