"""What the documents say must be true: commands exist, examples load, files are where the map says."""

import re
from pathlib import Path

import pytest
import typer

from evomerge.cli import app
from evomerge.config import load
from evomerge.preparation import prepare

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()
COMMANDS = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_every_command_in_the_readme_exists() -> None:
    used = set(re.findall(r"^\s*(?:\.venv/bin/)?evomerge (\w+)", README, re.MULTILINE))
    assert used
    assert used <= COMMANDS


def test_every_option_in_the_readme_exists() -> None:
    for command, rest in re.findall(r"^\s*(?:\.venv/bin/)?evomerge (\w+)(.*)$", README, re.MULTILINE):
        known = {name for parameter in typer.main.get_command(app).commands[command].params for name in parameter.opts}  # type: ignore[attr-defined]
        assert set(re.findall(r"(?<=\s)--?[a-z]+", rest)) <= known, command


def test_every_path_in_the_file_map_exists() -> None:
    block = README.split("## Map of files")[1].split("```")[1]
    folders = [REPOSITORY]
    for line in block.strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        path = folders[depth] / line.split()[0]
        assert path.exists(), path
        folders[depth + 1 :] = [path]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "search_spaces").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_search_can_start(path: Path) -> None:
    assert prepare(load(path)).space.genes


def test_the_files_speak_of_the_product_alone() -> None:
    for path in REPOSITORY.rglob("*"):
        if path.suffix in {".py", ".md", ".yaml", ".toml"} and ".venv" not in path.parts and path != Path(__file__):
            assert not re.search(r"/work/|closing note|issue #?\d", path.read_text(errors="ignore")), path
