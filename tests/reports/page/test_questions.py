"""Each of a newcomer's ten questions is answered by one figure or one line of the page, which its head names."""

import json
import re
from pathlib import Path

import pytest

from evomerge.events import unheard
from evomerge.reports.page import sections
from evomerge.reports.page.blocks import Block, Section
from evomerge.reports.page.html import page
from evomerge.runs import directory as runs
from tests.reports.page.conftest import Run, story

# the block that answers a question, where in it the answer stands, and what it looks like
ANSWERS = {
    "Which layers matter?": ("importances", "figure", r"weight:(math|lang):layers_\d-\d"),
    "What did the winner lose?": ("retention", "line", r"What the winner has lost: .* instead of|has lost nothing of"),
    "Is it luck?": ("verdict", "line", r"Against parent-.*95 % interval [-+]\d.* to [-+]\d.*p (< )?\d\.\d+"),
    "What would more budget bring?": (
        "course",
        "line",
        r"raised it by \d\.\d+, so more .* (promises|may bring)",
    ),
    "Which model is useless?": (
        "recipe",
        "line",
        r"Mean size of the weights of \S+: (\w+ \d\.\d+[,.] ?){2}$",
    ),
    "What did it cost?": ("cost", "table", r"forward passes over all search items \d"),
    "Can I ship it?": ("shipping", "line", r"licen[sc]e|control|stands against it|distinguishable"),
    "How do I rebuild it?": (
        "rebuild",
        "text",
        r"evomerge export .* -o recipe\.yaml\nevomerge merge recipe\.yaml",
    ),
    "How far is it from its parents?": ("distance", "line", r"the merge is \d.*% from base, \d.*% from math"),
    "Which items flipped?": ("items", "folded", r"parent-math, base_qa: item numbers (gained|lost) (\d+|none)"),
}
WITH_PARTS = {
    "Which layers matter?": (
        "ablation",
        "line",
        r"^Parts of the genome (without|that may be useless).*layers?_\d",
    ),
    "Which model is useless?": ("ablation", "line", r"^Models (without|that may be useless).*(first|second)"),
}
OF_A_PATH = {
    "Which model is useless?": ("path", "line", r"Its layers by where they come from: .* \d+\. A model that gives no"),
}


def told(block: Block, where: str) -> list[str]:
    """What a block says in one place, as lines."""
    if where == "line":
        return list(block.notes)
    if where == "text":
        return [text.content for text in block.texts]
    if where == "table":
        return [" ".join(row) for table in block.tables for row in table.rows]
    if where == "folded":
        return [f"{title} {' '.join(row)}" for title, table in block.folded.items() for row in table.rows]
    assert block.drawing is not None
    return [json.dumps(block.drawing.figure)]


def check(made: list[Section], expected: dict[str, tuple[str, str, str]]) -> None:
    """Checks that the page names the block for each question, and that the answer stands in it."""
    blocks = {block.id: block for section in made for block in section.blocks}
    named = dict(sections.answers(made))
    assert list(named) == list(ANSWERS)
    for question, (name, where, answer) in expected.items():
        assert named[question] == name, question
        lines = told(blocks[name], where)
        assert any(re.search(answer, line) for line in lines), (question, lines)


def test_every_question_has_its_answer(zoo_sections: list[Section]) -> None:
    assert len(ANSWERS) == 10
    check(zoo_sections, ANSWERS)


def test_the_head_of_the_page_leads_to_each_answer(zoo_page: Path) -> None:
    text = zoo_page.read_text()
    for question, (name, _, _) in ANSWERS.items():
        assert f'<li>{question} <a href="#{name}">' in text
        assert f'<article id="{name}">' in text


def test_where_parts_were_put_back_they_answer_better(run_directory: Path) -> None:
    runs.ablate(run_directory, (), None, unheard)
    shown = story(run_directory)
    check(sections.sections(shown), WITH_PARTS)
    assert '<li>Which layers matter? <a href="#ablation">' in page(shown)


@pytest.mark.slow
def test_a_path_says_which_models_it_needs(tiny_run: Run) -> None:
    check(sections.sections(story(tiny_run(space={"kind": "data_flow"}))), OF_A_PATH)


def test_a_question_without_an_answer_leads_to_why(finished: Path) -> None:
    made = sections.sections(story(finished))
    named = dict(sections.answers(made))
    assert named["Which layers matter?"] == "importances"  # which says that there are too few candidates
    blocks = {block.id: block for section in made for block in section.blocks}
    assert blocks["importances"].drawing is None
    assert "are needed" in blocks["importances"].says
