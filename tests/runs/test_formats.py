"""Runs and searches of earlier versions: what they hold can be read, and leads to the same weights, for good."""

import json
import math
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from evomerge import recipe
from evomerge.export import choice
from evomerge.export import recipe as export
from evomerge.runs import directory as runs
from evomerge.versions import FORMAT, versions
from tests import commands
from tests.commands import evomerge
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow  # every command reads every format

DATA = REPOSITORY / "tests" / "data"
FORMATS = ["format_1"]


@pytest.fixture(params=FORMATS)
def kept(request: pytest.FixtureRequest) -> Path:
    """A run with controls, failures, selection items and a front, and beside it what its own version printed of it."""
    return DATA / str(request.param)


@pytest.fixture
def directory(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept / "run", tmp_path / "run"))


def printed(kept: Path, command: str) -> Any:
    return json.loads((kept / f"{command}.json").read_text())


def same_or_more(old: Any, new: Any) -> bool:
    """Whether all that an old document says is in a new one, which may have more keys."""
    if isinstance(old, dict):
        return isinstance(new, dict) and all(key in new and same_or_more(old[key], new[key]) for key in old)
    if isinstance(old, list):
        return isinstance(new, list) and len(old) == len(new) and all(map(same_or_more, old, new))
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=1e-12)  # p-values were sums of rounded numbers once
    return bool(old == new)


@pytest.mark.parametrize("command", ["status", "front", "candidates"])
def test_commands_print_of_an_old_run_what_its_own_version_printed(command: str, kept: Path, directory: Path) -> None:
    assert same_or_more(printed(kept, command), json.loads(evomerge(command, directory, "--json")))


@pytest.mark.parametrize("command", ["status", "front", "candidates"])
def test_people_can_read_an_old_run_too(command: str, directory: Path) -> None:
    assert "g0000-07" in evomerge(command, directory)


def test_an_old_run_is_exported_and_merged_to_the_weights_that_it_scored(
    kept: Path, directory: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "merged"
    evomerge("export", directory, "-o", file)
    evomerge("merge", file, out)
    best = printed(kept, "status")["best"]
    assert recipe.load(out / "evomerge_recipe.yaml").evomerge.fingerprint == best["fingerprint"]
    assert recipe.load(file).evomerge.heldout == best["heldout"]


def test_every_candidate_of_an_old_front_can_be_exported(kept: Path, directory: Path) -> None:
    run = runs.read(directory)
    for row in printed(kept, "front"):
        record = choice.choose(run.results, row["id"], [])
        assert export.shared_recipe(record, run.results, run.prepared.models).evomerge.fingerprint == row["fingerprint"]


def test_resuming_an_old_run_names_the_version_that_goes_on_with_it(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in directory.iterdir()}
    evomerge("resume", directory, status=2)
    said = capsys.readouterr().err
    assert "begun by evomerge 0.1.0 in format 1" in said
    assert "resume it with evomerge 0.1.0" in said
    assert {path: path.read_bytes() for path in before} == before


def rewrite(database: Path, key: str, value: str) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE study_user_attributes SET value_json = ? WHERE key = ?", (value, key))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of this version."""
    folder = tmp_path_factory.mktemp("fresh") / "run"
    smoke = REPOSITORY / "search_spaces" / "smoke.yaml"
    evomerge("run", smoke, "--output", folder, "--workers", 0, "--set", "optimizer.evaluations=4")
    return folder


@pytest.mark.parametrize("command", ["status", "front", "candidates", "export", "resume"])
def test_a_run_of_a_later_format_is_not_misread(
    command: str, fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = Path(shutil.copytree(fresh, tmp_path / "later"))
    rewrite(later / "archive.db", "format", str(FORMAT + 1))
    evomerge(command, later, status=2)
    assert f"has format {FORMAT + 1}" in capsys.readouterr().err


def test_resuming_with_other_versions_warns_of_them(fresh: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(fresh, tmp_path / "moved"))
    rewrite(moved / "archive.db", "versions", json.dumps({**versions(), "torch": "1.0"}))
    said = " ".join(evomerge("resume", moved).split())
    assert f"(torch 1.0 to {versions()['torch']})" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("evaluations", "best", "fingerprint", "heldout"),
    [
        (40, "g0019-00", "28f0852df9b56e9d", (0.87, 0.5925, 0.8525, 0.5925)),
        pytest.param(300, "g0117-00", "196ee2c4f94c2024", (0.9275, 0.8775, 0.91, 0.7375), marks=pytest.mark.exhaustive),
    ],
)
def test_the_first_demo_still_finds_the_same_weights_with_the_same_heldout_scores(
    tmp_path: Path, evaluations: int, best: str, fingerprint: str, heldout: tuple[float, ...]
) -> None:
    """Without its further controls, which the search takes no notice of. What 300 evaluations find was recorded with
    the first version, and what 40 find with a later one that finds the same with 300."""
    off = [f"--set=controls.{name}=false" for name in ("one_knob", "per_model", "random_search")]
    own = [f"--set=optimizer.evaluations={evaluations}"]
    evomerge("run", DATA / "demo" / "search.yaml", "--output", tmp_path / "run", "--workers", 0, *off, *own)
    run = runs.read(tmp_path / "run")
    found = commands.status(run.archive, run.config)["best"]
    assert (found["id"], found["fingerprint"]) == (best, fingerprint)
    tasks = ("base_qa", "math_a", "lang_b", "cross_math_b")
    assert found["heldout"] == pytest.approx(dict(zip(tasks, heldout, strict=True)), abs=1e-12)
