"""What the documents say must be true: commands exist, examples load, files are where the map says."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from evomerge.cli import app
from evomerge.config.files import load
from evomerge.search.preparation import prepare

REPOSITORY = Path(__file__).parent.parent
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


@pytest.mark.parametrize("path", sorted((REPOSITORY / "search_spaces").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_search_can_start(path: Path) -> None:
    """Those of models that must be downloaded are read only."""
    config = load(path)
    if config.base.startswith("zoo:"):
        assert prepare(config).space.genes
    else:
        assert config.space.kind == "data_flow"


def test_every_file_that_security_points_at_exists() -> None:
    rows = [line.split("|") for line in (REPOSITORY / "SECURITY.md").read_text().splitlines() if line.startswith("| ")]
    guards = [name for row in rows[1:] for name in re.findall(r"`([^`]+)`", row[3])]
    proofs = [name for row in rows[1:] for name in re.findall(r"`([^`]+)`", row[4])]
    assert len(rows) > 5
    assert len(guards) >= len(rows) - 1
    assert len(proofs) >= len(rows) - 1
    for path in [*(REPOSITORY / "evomerge" / name for name in guards), *(REPOSITORY / name for name in proofs)]:
        assert path.exists(), path
