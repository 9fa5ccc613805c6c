"""What the documents say must be true: commands exist, examples load, files are where the map says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from evomerge.cli import app
from evomerge.config.files import load
from evomerge.config.search import SearchConfig
from evomerge.evaluation.tasks import _read, find_tasks
from evomerge.search.preparation import prepare
from tests.conftest import REPOSITORY
from tests.searches import EVALS

README = (REPOSITORY / "README.md").read_text()
PAGES = README + (REPOSITORY / "scripts" / "cluster" / "README.md").read_text()
CODE = "\n".join(PAGES.split("```")[1::2])
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_every_command_in_the_readme_exists() -> None:
    used = set(re.findall(r"^evomerge (\w+)", CODE, re.MULTILINE))
    assert used
    assert used <= set(COMMANDS)


def test_every_option_in_the_readme_exists() -> None:
    for command, rest in re.findall(r"^evomerge (\w+)(.*?)(?:#.*)?$", CODE, re.MULTILINE):
        known = {option for parameter in COMMANDS[command].params for option in parameter.opts}
        assert set(re.findall(r"(?<=\s)--?[a-z]+", rest)) <= known, command


def test_every_path_in_the_file_map_exists() -> None:
    block = (REPOSITORY / "docs" / "internals.md").read_text().split("## Map of files")[1].split("```")[1]
    folders = [REPOSITORY]
    for line in block.strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        path = folders[depth] / line.split()[0]
        assert path.exists(), path
        folders[depth + 1 :] = [path]


def with_the_zoo(config: SearchConfig) -> list[str]:
    """Settings that put the zoo's models and tasks in the place of those that must be downloaded, and no more."""
    tasks = iter(("base_qa", "math_a", "lang_b"))
    objectives = [
        each.model_dump(exclude_unset=True) if each.cost else {"task": next(tasks)} for each in config.objectives
    ]
    changes = {
        "base": "zoo:base",
        "models": {name: f"zoo:{stand_in}" for name, stand_in in zip(config.models, ("math", "lang"), strict=False)},
        "tasks.paths": [str(EVALS)],
        "objectives": objectives,
        "items": {"search": 8, "heldout": 8},
    }
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "search_spaces").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_search_can_start(path: Path) -> None:
    """Where models and tasks must be downloaded, the zoo's stand in for them."""
    config = load(path)
    prepared = prepare(load(path, [] if config.base.startswith("zoo:") else with_the_zoo(config)))
    assert prepared.space.genes
    assert list(prepared.config.models) == list(config.models)
    assert prepared.space.decode([gene.start for gene in prepared.space.genes])


@pytest.mark.parametrize("path", sorted((REPOSITORY / "search_spaces").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_task_of_a_shipped_search_has_its_metric_and_filter(path: Path) -> None:
    config = load(path)
    for objective in config.objectives:
        if objective.cost is None:
            task, _ = _read(find_tasks([objective.task], config.tasks)[objective.task].path)
            assert objective.metric in {each["metric"] for each in task["metric_list"]}
            assert objective.filter in {None, *(each["name"] for each in task.get("filter_list", ()))}


def test_every_file_that_security_points_at_exists() -> None:
    rows = [line.split("|") for line in (REPOSITORY / "SECURITY.md").read_text().splitlines() if line.startswith("| ")]
    guards = [name for row in rows[1:] for name in re.findall(r"`([^`]+)`", row[3])]
    proofs = [name for row in rows[1:] for name in re.findall(r"`([^`]+)`", row[4])]
    assert len(rows) > 5
    assert len(guards) >= len(rows) - 1
    assert len(proofs) >= len(rows) - 1
    for path in [*(REPOSITORY / "evomerge" / name for name in guards), *(REPOSITORY / name for name in proofs)]:
        assert path.exists(), path
