"""The page shows what was found by putting parts of the winner back, and says how to ask for it."""

from pathlib import Path
from typing import Any

import pytest

from evomerge.archive.archive import Record
from evomerge.candidate import Study
from evomerge.events import unheard
from evomerge.reports.page import sections
from evomerge.reports.page.blocks import Block
from evomerge.runs import directory as runs
from tests.bad_input import Refuses
from tests.reports.page.conftest import Remake, Run, story


def blocks(directory: Path) -> dict[str, Block]:
    return {block.id: block for section in sections.sections(story(directory)) for block in section.blocks}


def test_the_figures_show_every_part_and_every_step(run_directory: Path) -> None:
    runs.ablate(run_directory, (), None, unheard)
    found = blocks(run_directory)
    shown = found["ablation"]
    names = [row[0] for row in shown.tables[0].rows]
    assert names[-2:] == ["first", "second"]
    assert shown.drawing is not None
    assert sum(len(trace["x"]) for trace in shown.drawing.figure["data"]) == len(names)
    assert any("useless" in note or "worse beyond chance" in note for note in shown.notes)
    way = found["way"].drawing
    assert way is not None
    assert {len(trace["x"]) for trace in way.figure["data"]} == {len(names) - 2 + 1}
    cost = dict(found["cost"].tables[0].rows)
    assert cost["parts of the winner scored besides"].split()[0] in " ".join(shown.notes)


def test_a_page_without_it_says_how_to_ask(finished: Path) -> None:
    found = blocks(finished)
    assert "--ablate" in found["ablation"].says
    assert found["way"].drawing is None
    assert "parts of the winner scored besides" not in dict(found["cost"].tables[0].rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"space": {"kind": "data_flow"}, "optimizer": {"name": "random_search", "evaluations": 8}},
        {"space": {"kind": "hybrid", "parameter": {"layer_granularity": 2}, "path": {"max_layers": 6}}},
        {"space": {"method": ["ties", "slerp"], "participate": True}},
        {"space": {"layer_granularity": "tensor"}},
    ],
    ids=["data-flow", "hybrid", "methods", "tensors"],
)
def test_every_kind_of_search_can_be_ablated(tiny_run: Run, changes: dict[str, Any]) -> None:
    directory = tiny_run(**changes)
    runs.ablate(directory, (), None, unheard)
    found = blocks(directory)
    assert found["ablation"].drawing is not None
    assert found["way"].drawing is not None
    data_flow = changes["space"].get("kind") == "data_flow"
    assert ("a model unchanged" in found["ablation"].says) == data_flow


def test_a_winner_without_genes_is_refused(remake: Remake, refuses: Refuses) -> None:
    def keep(_: Study, record: Record) -> Record | None:
        return record if record.candidate.kind == "control" else None

    directory = remake(keep)
    run = runs.read(directory)
    run.archive.record_end(run.config.limit)
    refuses("report", directory, "--ablate", says=("no genes",))
