"""What the documents say must be true: commands exist, examples load, links and files are where the pages say."""

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from evomerge import recipe as recipes
from evomerge.cli import app
from evomerge.config.documents import validate
from evomerge.config.files import load
from evomerge.config.search import SearchConfig
from evomerge.evaluation.tasks import _read, find_tasks
from evomerge.recipe import Recipe
from evomerge.search.preparation import prepare
from tests.conftest import REPOSITORY
from tests.searches import EVALS, small_search

DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "scripts/cluster/README.md")),
    *sorted((REPOSITORY / "examples").rglob("README.md")),
    *DOCS,
]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = {name for command in COMMANDS.values() for each in command.params for name in each.opts + each.secondary_opts}
ALONE = {"--help", "--version"}  # what evomerge takes without a command
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SMALL_RECIPE = {"merge_method": "linear", "models": [{"model": "zoo:math", "parameters": {"weight": 1}}]}
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block of a page."""
    return [(language, text) for _, language, text in FENCE.findall(page.read_text())]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def command_lines(page: Path) -> Iterator[list[str]]:
    """The words of every line that is given to a shell in a page's fenced blocks, with or without a prompt."""
    for language, text in blocks(page):
        if language in ("", "bash", "sh", "shell", "console"):
            for line in text.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|\|\||[|;]", re.sub(r"(^|\s)#.*", "", line)):
                    yield words(part.strip().removeprefix("$ "))


def words(call: str) -> list[str]:
    """A call's words, without the variables that are set for it. None of a line that no shell would take."""
    try:
        found = shlex.split(call)
    except ValueError:
        return []
    while found and re.fullmatch(r"[A-Z_]+=.*", found[0]):
        del found[0]
    return found


@every_page
def test_every_command_can_be_given_as_it_is_shown(page: Path) -> None:
    for call in command_lines(page):
        if call[:1] == ["evomerge"] and not ALONE & set(call[1:2]) and len(call) > 1:
            assert call[1] in COMMANDS, call
            if "[OPTIONS]" not in call:
                COMMANDS[call[1]].make_context(call[1], call[2:])


@every_page
def test_every_script_that_is_called_exists(page: Path) -> None:
    for call in command_lines(page):
        for word in call[:2]:
            if word.startswith(("scripts/", "./scripts/")):
                assert (REPOSITORY / word).exists(), word


@every_page
def test_every_command_and_option_in_a_sentence_exists(page: Path) -> None:
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        call = words(span)
        if call[:1] == ["evomerge"] and not ALONE & set(call[1:2]) and len(call) > 1:
            assert call[1] in COMMANDS, span
            known = {name for each in COMMANDS[call[1]].params for name in each.opts + each.secondary_opts}
            assert {word.partition("=")[0] for word in call[2:] if word.startswith("-")} <= known | ALONE, span
        elif call[:1] and call[0].startswith("--"):
            assert call[0].partition("=")[0] in OPTIONS | ALONE, span


@every_page
def test_every_file_of_the_repository_in_a_sentence_exists(page: Path) -> None:
    for path in re.findall(r"`((?:evomerge|tests|scripts|docs|search_spaces|evals|examples)/[\w./-]+)`", prose(page)):
        assert "NAME" in path or (REPOSITORY / path).exists(), path


def test_commands_are_shown() -> None:
    """So that a change of how blocks are written cannot leave the tests above with nothing to look at."""
    used = {call[1] for page in PAGES for call in command_lines(page) if call[:1] == ["evomerge"] and call[1:]}
    assert used >= {name for name, command in COMMANDS.items() if not command.hidden}


@every_page
def test_every_example_in_yaml_is_read(page: Path, tmp_path: Path) -> None:
    """Whole search files load, whole recipes validate; a part of one does when it is put into a small one."""
    path = tmp_path / "example.yaml"
    searched = {info.alias or name for name, info in SearchConfig.model_fields.items()}
    merged = {info.alias or name for name, info in Recipe.model_fields.items()}
    for language, text in blocks(page):
        if language not in ("yaml", "yml"):
            continue
        path.write_text(text)
        content = yaml.safe_load(text)
        assert isinstance(content, dict), text
        if "merge_method" in content:
            recipes.load(path, pytest.fail)
        elif {"base", "models", "objectives"} <= set(content):
            load(path)
        elif set(content) <= searched:
            validate(SearchConfig, small_search(**content), page)
        elif set(content) <= merged:
            path.write_text(yaml.safe_dump(SMALL_RECIPE | content))
            recipes.load(path, pytest.fail)
        else:
            assert "task" in content, f"neither a search, a recipe, a task, nor a part of one:\n{text}"


def slug(heading: str) -> str:
    """The anchor of a heading, as mkdocs makes it; as GitHub does too, where no two spaces or hyphens meet."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


def anchors(page: Path) -> list[str]:
    return [slug(heading) for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)]


@every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchors(target).count(anchor) == 1, link


def test_every_page_is_in_the_navigation_once() -> None:
    settings = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
    assert sorted(path for entry in settings["nav"] for path in entry.values()) == [page.name for page in DOCS]


def test_the_reference_is_what_the_code_says_now() -> None:
    page = runpy.run_path(str(REPOSITORY / "scripts" / "reference"))["page"]
    assert (REPOSITORY / "docs" / "reference.md").read_text() == page() + "\n", "run scripts/docs"


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


def test_the_readme_is_short() -> None:
    """It says what evomerge is; the pages say the rest."""
    assert len((REPOSITORY / "README.md").read_text().split()) <= 1000
