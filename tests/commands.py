"""Commands of evomerge as tests give them: in this process, or in the background; and what they leave."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from evomerge.archive.archive import Archive
from evomerge.cli import main
from evomerge.config.search import SearchConfig
from evomerge.reports import views
from evomerge.runs import directory as runs
from evomerge.search.results import Results


def evomerge(*arguments: object, status: int = 0) -> str:
    """Runs a command in this process, checks its exit status, and returns its standard output."""
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["evomerge", *map(str, arguments)]),
        contextlib.redirect_stdout(printed),
        pytest.raises(SystemExit) as stop,
    ):
        main()
    assert (stop.value.code or 0) == status
    return printed.getvalue()


def content(directory: Path) -> tuple[Any, Any]:
    """What `candidates --json` and `front --json` print, without a process for each."""
    run = runs.read(directory)
    return candidates(run.archive, run.config), front(run.archive, run.config)


def candidates(archive: Archive, config: SearchConfig) -> list[dict[str, Any]]:
    """What `candidates --json` prints of an archive."""
    rows: list[dict[str, Any]] = json.loads(json.dumps(views.as_json(views.candidates(Results(archive, config)))))
    return rows


def front(archive: Archive, config: SearchConfig) -> list[dict[str, Any]]:
    """What `front --json` prints of an archive."""
    rows: list[dict[str, Any]] = json.loads(json.dumps(views.as_json(views.front(Results(archive, config)))))
    return rows


def status(archive: Archive, config: SearchConfig) -> dict[str, Any]:
    """What `status --json` prints of an archive to which nobody writes."""
    row: dict[str, Any] = json.loads(json.dumps(views.as_json(views.status(Results(archive, config), running=False))))
    return row


def evaluated(directory: Path) -> list[tuple[str, str]]:
    """(candidate, split) of every finished evaluation in the order of the log."""
    try:
        lines = (directory / "log.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    events = [json.loads(line) for line in lines]
    return [(event["id"], event["split"]) for event in events if event["event"] == "evaluated"]


def start(errors: Path, *arguments: object, output: Path = Path(os.devnull)) -> "subprocess.Popen[str]":
    """A command in the background, its standard error in a file, and its output if that is wanted."""
    command = [sys.executable, "-c", "from evomerge.cli import main; main()", *map(str, arguments)]
    with errors.open("w") as stream, output.open("w") as printed:
        return subprocess.Popen(command, stdout=printed, stderr=stream, text=True)
