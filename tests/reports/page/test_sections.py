"""Every run has a page: what cannot be shown says so in a sentence, and what a newcomer asks has an answer."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evomerge.archive.archive import Record
from evomerge.candidate import Study, failure
from evomerge.reports.page import sections
from evomerge.reports.page.blocks import Block, Section
from evomerge.reports.page.sections import QUESTIONS
from evomerge.reports.page.story import Story, facts, headline
from evomerge.runs import directory as runs
from tests.conftest import REPOSITORY
from tests.reports.page.conftest import Remake, Run, renamed, story
from tests.searches import REMOVED

IDS = (
    "verdict", "scores", "cost", "front", "shrinkage", "course", "losses", "recipe", "spread", "path", "importances",
    "parallel", "ablation", "way", "retention", "constraints", "distance", "items", "shipping", "rebuild", "origin",
)  # fmt: skip


def blocks(shown: Story) -> dict[str, Block]:
    """The blocks of a page by id; each is there and says something."""
    found = by_id(sections.sections(shown))
    assert tuple(found) == IDS
    assert all(re.fullmatch(r"[A-Z].*\.", block.says, re.DOTALL) for block in found.values())
    assert headline(shown).endswith(".")
    assert facts(shown)
    return found


def by_id(made: list[Section]) -> dict[str, Block]:
    return {block.id: block for section in made for block in section.blocks}


def drawn(found: dict[str, Block]) -> set[str]:
    return {name for name, block in found.items() if block.drawing is not None}


def test_a_finished_run_has_every_figure_that_it_can_have(zoo_story: Story) -> None:
    found = blocks(zoo_story)
    tables = {"scores", "cost", "constraints", "shipping", "rebuild", "origin"}
    assert drawn(found) == set(IDS) - tables - {"path", "spread", "ablation", "way"}
    assert "--ablate" in found["ablation"].says
    assert "leaves every layer in its place" in found["path"].says
    assert "fewer than two recipes" in found["spread"].says
    assert not any(block.folded for name, block in found.items() if name != "items")
    commands, recipe = found["rebuild"].texts
    assert "evomerge export" in commands.content
    assert "merge_method: " in recipe.content
    (limit,) = found["constraints"].tables[0].rows
    assert limit[2].startswith("+")


def test_the_text_of_items_is_there_only_where_it_is_asked_for(zoo_run: Path, zoo_sections: list[Section]) -> None:
    without, shown = by_id(zoo_sections)["items"], blocks(story(zoo_run, with_items=True))["items"]
    assert not any("questions" in title for title in without.folded)
    titles = [title for title in shown.folded if "questions" in title]
    assert titles
    assert all(row[2] and row[3] for title in titles for row in shown.folded[title].rows)


def test_a_run_without_held_out_scores_says_so(remake: Remake) -> None:
    found = blocks(story(remake(lambda study, record: None if study == "heldout" else record)))
    assert "no held-out scores" in found["verdict"].says
    assert {"verdict", "shrinkage", "items"}.isdisjoint(drawn(found))
    assert {"front", "course", "recipe", "retention"} <= drawn(found)


def test_a_run_whose_candidates_all_failed_says_why(remake: Remake) -> None:
    def fail(study: Study, record: Record) -> Record | None:
        if record.candidate.kind == "control":
            return record
        return replace(record, evaluation=failure("out of memory")) if study == "search" else None

    shown = story(remake(fail))
    found = blocks(shown)
    assert "course" not in drawn(found)
    assert shown.best is not None
    assert shown.best.candidate.kind == "control"

    def fail_all(study: Study, record: Record) -> Record | None:
        return replace(record, evaluation=failure("out of memory")) if study == "search" else None

    (shown.run.directory / "archive.db").unlink()
    shutil.rmtree(shown.run.directory)
    shown = story(remake(fail_all))
    assert not drawn(blocks(shown))
    assert "out of memory" in headline(shown)


def test_a_run_of_which_nothing_is_evaluated_says_so(remake: Remake) -> None:
    shown = story(remake(lambda study, record: None))
    assert not drawn(blocks(shown))
    assert headline(shown) == "There is no winner yet."


def test_a_run_of_an_old_format_has_a_page(tmp_path: Path) -> None:
    kept = REPOSITORY / "tests" / "data" / "format_1" / "run"
    found = blocks(story(Path(shutil.copytree(kept, tmp_path / "run"))))
    assert {"verdict", "front", "course", "recipe", "retention", "items"} <= drawn(found)
    assert ("format of the run", "1") in found["origin"].tables[0].rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "wanted", "missing"),
    [
        ({"space": {"kind": "data_flow"}}, {"path"}, {"recipe", "spread"}),
        (
            {"space": {"kind": "hybrid", "parameter": {"layer_granularity": 2}, "path": {"max_layers": 6}}},
            {"path", "recipe"},
            set(),
        ),
        ({"objectives": [{"task": "base_qa"}]}, {"front", "recipe"}, {"path"}),
        (
            {
                "objectives": [
                    *({"task": task} for task in ("base_qa", "math_a", "lang_b", "cross_math_b")),
                    {"cost": "layers"},
                    {"cost": "parameters"},
                ]
            },
            {"front"},
            {"path"},
        ),
        ({"constraints": [{"task": "math_a", "retain": 1.0}]}, {"front"}, set()),
        ({"space": {"method": "karcher"}}, {"front"}, {"path"}),
        ({"space": {"method": ["ties", "slerp"], "participate": True}}, {"recipe", "parallel"}, {"path"}),
        ({"subsets": True, "optimizer": {"evaluations": 12, "population": 4}}, {"course"}, set()),
        (
            {"optimizer": {"name": "cma_es", "evaluations": 8, "population": 4, "schedule": "async"}},
            {"course", "parallel"},
            {"losses"},
        ),
    ],
    ids=["data-flow", "hybrid", "one-objective", "six", "constraints", "karcher", "methods", "subsets", "async"],
)
def test_every_kind_of_search_has_a_page(
    tiny_run: Run, changes: dict[str, Any], wanted: set[str], missing: set[str]
) -> None:
    found = blocks(story(tiny_run(**changes)))
    assert wanted <= drawn(found)
    assert not missing & drawn(found)


def test_a_search_with_one_model_has_a_page(tiny_run: Run) -> None:
    found = blocks(story(tiny_run(models__second=REMOVED)))
    assert {"front", "recipe", "distance"} <= drawn(found)


def test_the_docs_name_every_figure_and_what_it_answers(zoo_sections: list[Section]) -> None:
    found = by_id(zoo_sections)
    page = (REPOSITORY / "docs" / "report.md").read_text()
    for question, names in QUESTIONS:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {question} |")]
        for name in names:
            assert f"[{found[name].title}](#" in row
    for block in found.values():
        assert re.search(rf"^### {re.escape(block.title)}$", page, re.MULTILINE), block.title


def test_names_from_outside_reach_the_page_as_they_are(remake: Remake) -> None:
    """The page escapes them once, when it is written."""
    hostile = '<img src=x onerror="alert(1)">'

    def rename(config: Any) -> Any:
        first, *others = config.objectives
        return config.model_copy(update={"objectives": (first.model_copy(update={"task": hostile}), *others)})

    directory = remake(lambda study, record: renamed(record, "base_qa", hostile), rename)
    assert runs.read(directory).config.objectives[0].name == hostile
    found = blocks(story(directory))
    assert any(hostile in row for row in found["verdict"].tables[0].rows)
