"""Figures as data: what they draw is what the views hold."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.reports.page import figures, pictures, sections
from evomerge.reports.page.blocks import Drawing, Section
from evomerge.reports.page.course import Course, Point, Spent
from evomerge.reports.page.figures import MEAN, thinned
from evomerge.reports.page.recipes import Grid, Stop
from evomerge.reports.page.recipes import Path as LayerPath
from evomerge.reports.page.story import Story


@pytest.fixture(scope="module")
def drawings(zoo_sections: list[Section]) -> dict[str, Drawing]:
    return sections.drawings(zoo_sections)


def test_every_variant_of_a_figure_exists_and_changes_what_there_is(drawings: dict[str, Drawing]) -> None:
    for drawing in drawings.values():
        plain = [select for select in drawing.selects if not select.axis]
        count = 1
        for select in plain:
            assert select.options
            count *= len(select.options)
        assert len(drawing.variants) == (count if plain else 0)
        for variant in drawing.variants.values():
            assert len(variant["data"]) == len(drawing.figure["data"])
        for select in drawing.selects:
            if select.axis:
                for trace in drawing.figure["data"]:
                    assert len(trace["meta"]) == len(select.options)
                    assert {len(column) for column in trace["meta"]} == {len(trace[select.axis])}


def test_the_front_has_every_candidate_once_with_its_scores(zoo_story: Story, drawings: dict[str, Drawing]) -> None:
    shown = zoo_story
    drawing = drawings["front"]
    across, up = drawing.selects
    assert across.options == up.options == (*shown.objectives, MEAN)
    points = [
        tuple(column[index] for column in trace["meta"])
        for trace in drawing.figure["data"]
        for index in range(len(trace["x"]))
    ]
    scores = [(*((row.scores or {})[name] for name in shown.objectives), row.mean) for row in shown.whole]
    np.testing.assert_allclose(sorted(points), sorted(scores), atol=1e-3)
    names = [trace["name"] for trace in drawing.figure["data"]]
    assert {"winner", "parents", "base", "uniform merge"} <= set(names)


def test_the_verdict_has_the_leads_and_intervals_of_the_evidence(
    zoo_story: Story, drawings: dict[str, Drawing]
) -> None:
    shown = zoo_story
    for one, trace in zip(shown.evidence.against, drawings["verdict"].figure["data"], strict=True):
        expected = [*(task.difference for task in one.objectives.values()), one.difference]
        assert sorted(trace["x"]) == pytest.approx(sorted(expected), abs=1e-3)
        low = [x - minus for x, minus in zip(trace["x"], trace["error_x"]["arrayminus"], strict=True)]
        assert min(low) == pytest.approx(
            min([one.interval[0], *(task.interval[0] for task in one.objectives.values())]), abs=1e-3
        )


def test_a_heat_map_has_the_cells_of_its_grid_with_the_first_row_at_the_top() -> None:
    grid = Grid((("math", "q"), ("lang", "all tensors")), ("embeddings", "0", "head"), ((1, 2, 3), (-4, None, 6)))
    drawing = pictures.grids(["only"], [{"weight": grid}], "candidate")
    (trace,) = drawing.figure["data"]
    assert trace["z"] == [[-4, None, 6], [1, 2, 3]]
    assert (trace["zmin"], trace["zmax"]) == (-6, 6)
    assert drawing.figure["layout"]["yaxis"]["ticktext"] == ["lang", "math q"]


def test_the_width_of_a_path_follows_its_scales() -> None:
    stops = (Stop("math", 0), Stop("lang", 1, 1.5), Stop("math", 1, 0.5))
    drawing = pictures.paths(["only"], [LayerPath(stops, "math", "math")])
    *lines, dots = drawing.figure["data"]
    used = {line["line"]["width"]: [x for x in line["x"] if x is not None] for line in lines if line["x"]}
    assert used[max(used)] == [0, 1]
    assert used[min(used)] == [1, 2]
    assert dots["y"] == [0, 4, 1]  # lanes of two layers each, and a gap


def test_layers_that_run_side_by_side_are_squares_that_name_their_block() -> None:
    stops = tuple(Stop("math", layer) for layer in range(4))
    *_, dots = pictures.paths(["only"], [LayerPath(stops, "math", "math", ((1, 3),))]).figure["data"]
    assert dots["marker"]["symbol"] == ["circle", "square", "square", "circle"]
    named = ["in the block of layers 1 to 2" in text for text in dots["hovertext"]]
    assert named == [False, True, True, False]


@given(st.integers(0, 5000), st.integers(2, 100))
def test_thinning_keeps_the_ends_and_the_order(count: int, most: int) -> None:
    kept = thinned(count, most)
    assert len(kept) <= most or count <= most
    assert kept == sorted(set(kept))
    assert kept[:1] == [0] * bool(count)
    assert kept[-1:] == [count - 1] * bool(count)


@given(st.floats() | st.none())
def test_a_drawn_number_is_finite_and_nearly_the_same(value: float | None) -> None:
    drawn = figures.number(value)
    if value is None or not np.isfinite(value):
        assert drawn is None
    elif abs(value) < 1e308:
        assert drawn == pytest.approx(value, rel=1e-3)
    assert drawn is None or np.isfinite(drawn)


def test_a_long_search_with_many_objectives_leaves_room_on_the_page(zoo_story: Story) -> None:
    """The page may have 6 MB, of which plotly takes the most."""
    (row, *_) = zoo_story.whole
    names = [f"task_{number}" for number in range(6)]
    random = np.random.default_rng(0)
    rows = [
        replace(row, id=f"g{number:05d}", kind="search", mean=0.5, scores=dict(zip(names, values, strict=True)))
        for number, values in enumerate(random.uniform(size=(20_000, 6)).tolist())
    ]
    points = tuple(
        Point(row.id, Spent(number, 0, number, 1000.0 * number, number / 7), random.uniform(), 0.9, 1.0)
        for number, row in enumerate(rows)
    )
    drawn = [
        figures.front(rows, [], None, names),
        figures.course(Course(points, (), {}, "mean"), [("base", 0.3)]),
    ]
    assert len(json.dumps([drawing.figure for drawing in drawn])) < 900_000
    assert len(drawn[0].figure["data"][0]["x"]) == figures.MOST_POINTS


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from texts(inner) if key not in ("colorscale", "type") else ()
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)


def test_no_text_of_a_figure_has_a_tag_and_every_figure_is_json(drawings: dict[str, Drawing]) -> None:
    for drawing in drawings.values():
        every = [drawing.figure, *drawing.variants.values()]
        json.dumps(every, allow_nan=False)
        assert not [text for text in texts(every) if set("<>") & set(text)]
