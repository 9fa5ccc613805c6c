"""Directories that hold no run, another run, or a run that was changed are left as they are."""

import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.runs.lock import run_lock
from tests.bad_input import Refuses, Spoil
from tests.searches import REMOVED, WriteSearch, put


@pytest.mark.parametrize(
    ("output", "fragment"),
    [
        pytest.param("search.yaml", "expected a folder for the run, found a file", id="a file"),
        pytest.param("search.yaml/run", "choose another --output", id="below a file"),
        pytest.param("full", "is not empty (it holds notes.txt); choose another --output", id="holds something else"),
        pytest.param("x" * 300, "(File name too long); choose another --output", id="has too long a name"),
        pytest.param(
            "/proc/evomerge/run",
            "cannot write there",
            id="cannot be written",
            marks=pytest.mark.skipif(not Path("/proc").is_dir(), reason="there is no /proc here"),
        ),
    ],
)
def test_an_output_directory_is_refused_that(
    output: str, fragment: str, tmp_path: Path, search: WriteSearch, refuses: Refuses
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    refuses("run", search(), "--output", output, says=(f"evomerge: {output}: ", fragment))


def test_a_run_directory_takes_no_second_search(run_directory: Path, search: WriteSearch, refuses: Refuses) -> None:
    again = (f"{run_directory}: already holds this search; go on with `evomerge resume {run_directory}`",)
    refuses("run", search(), "--output", run_directory, says=again)
    other = (f"{run_directory}: already holds another search (",)
    refuses("run", search({"seed": 5}), "--output", run_directory, says=other)


EDITED: dict[str, tuple[str, Any, str]] = {
    "seed": ("seed", 9, "seed is 9, but the archive was made with 0"),
    "population": ("optimizer.population", 8, "optimizer.population is 8, but the archive was made with 4"),
    "lag": ("optimizer.lag", 0, "optimizer.lag is 0, but the archive was made with 1"),
    "items": ("items.search", 9, "items.search is 9, but the archive was made with 8"),
    "metric": ("objectives.0.metric", "likelihood", 'objectives[0].metric is "likelihood", but'),
    "goal": ("objectives.1.goal", "minimize", 'objectives[1].goal is "minimize", but'),
    "objectives": ("objectives", [{"task": "base_qa"}], "objectives is [{"),
    "method": ("space.method", "ties", 'space.method is "ties", but the archive was made with "dare_ties"'),
    "bounds": ("space.density.start", 0.5, "space.density.start is 0.5, but the archive was made with 1.0"),
    "dtype": (
        "evaluation.dtype",
        "bfloat16",
        'evaluation.dtype is "bfloat16", but the archive was made with "float32"',
    ),
    "one model less": ("models.second", REMOVED, "models.second is null, but the archive was made with"),
    "a moved base": ("base", "/nowhere/base", "base: /nowhere/base: no such model folder"),
    "an unknown key": ("optimizer.evals", 3, "optimizer.evals is not a known key; did you mean 'evaluations'?"),
    "budget": ("optimizer.evaluations", -3, "optimizer.evaluations is -3; use a value greater than or equal to 1"),
}


@pytest.mark.parametrize("claim", EDITED)
def test_an_edited_search_is_not_resumed(claim: str, run_directory: Path, refuses: Refuses) -> None:
    key, value, fragment = EDITED[claim]
    path = run_directory / "search.yaml"
    content = yaml.safe_load(path.read_text())
    put(content, key, value)
    path.write_text(yaml.safe_dump(content))
    refuses("resume", run_directory, says=(f"evomerge: {path}: ", fragment))


def test_a_setting_that_changes_the_search_is_not_resumed(run_directory: Path, refuses: Refuses) -> None:
    refuses("resume", run_directory, "--set", "seed=3", says=("seed is 3, but the archive was made with 0",))


def overwrite_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def forget_kinds(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("DELETE FROM trial_user_attributes WHERE key = 'kind'")
    database.close()


DAMAGED: dict[str, tuple[Spoil, str]] = {
    "noise": (lambda path: path.write_bytes(b"\xff" * 5000), "file is not a database"),
    "half a copy": (lambda path: os.truncate(path, path.stat().st_size // 2), "cannot be read"),
    "zeros": (overwrite_half, "cannot be read"),
    "an empty file": (lambda path: path.write_bytes(b""), "is empty, though log.jsonl tells of evaluations"),
    "gone": (lambda path: path.unlink(), "is missing, though log.jsonl tells of evaluations"),
    "somebody else's": (forget_kinds, "cannot be read (KeyError: 'kind')"),
}


@pytest.mark.parametrize("command", ["resume", "candidates"])
@pytest.mark.parametrize("claim", DAMAGED)
def test_a_damaged_archive_is_left_alone(claim: str, command: str, run_directory: Path, refuses: Refuses) -> None:
    damage, fragment = DAMAGED[claim]
    damage(run_directory / "archive.db")
    says = (f"evomerge: {run_directory / 'archive.db'}: ", fragment, "restore it from a copy")
    refuses(command, run_directory, says=says)


@pytest.mark.parametrize("command", ["resume", "status", "front", "candidates", "export"])
def test_what_is_no_run_is_refused(command: str, tmp_path: Path, refuses: Refuses) -> None:
    (tmp_path / "empty").mkdir()
    refuses(command, "nowhere", says=("nowhere: no such run directory; give the folder that `evomerge run` made",))
    refuses(command, "empty", says=("empty: holds no search.yaml, so it is no run directory",))


def test_a_run_in_use_is_not_resumed(run_directory: Path, refuses: Refuses) -> None:
    with run_lock(run_directory):
        says = (f"{run_directory}: already in use by process {os.getpid()}", "choose another directory")
        refuses("resume", run_directory, says=says)


def test_a_run_that_cannot_be_written_is_not_resumed(run_directory: Path, refuses: Refuses) -> None:
    (run_directory / ".lock").unlink()
    (run_directory / ".lock").mkdir()
    refuses("resume", run_directory, says=(f"{run_directory / '.lock'}: cannot be written (Is a directory)",))


def test_a_run_whose_models_have_changed_is_not_resumed_or_exported(
    run_directory: Path, tiny_models: dict[str, Path], refuses: Refuses
) -> None:
    weights = tiny_models["second"] / "model.safetensors"
    kept = weights.read_bytes()
    says = (f"{run_directory}/search.yaml: models.second: the model's files have changed since this search began",)
    try:
        weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        refuses("resume", run_directory, says=says)
        refuses("export", run_directory, says=says)
    finally:
        weights.write_bytes(kept)
