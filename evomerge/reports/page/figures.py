"""Figures of a report as plotly's data and layout. The only module that imports plotly.

Every text from outside goes through `label`. Lines and marks are drawn as SVG, which prints well and needs no WebGL.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from evomerge.evidence.ablation import Part, Stop
from evomerge.evidence.comparison import Comparison, Kept
from evomerge.reports.page.blocks import Drawing, Figure, Select
from evomerge.reports.page.course import Course, Point
from evomerge.reports.page.distances import Distances
from evomerge.reports.page.importance import Feature, Features
from evomerge.reports.page.items import Flips
from evomerge.reports.page.labels import label
from evomerge.reports.views import CandidateView

MOST_POINTS = 2000  # of a figure; of more candidates, evenly spaced ones are drawn
_DIGITS = 4  # that are significant in a drawn number
MEAN = "mean of all"
ROLES: Mapping[str, tuple[str, str, str, int]] = {  # title, color, symbol, size
    "search": ("candidates", "#8a97a8", "circle", 6),
    "front": ("front", "#2f7ed8", "circle", 9),
    "control": ("other controls", "#a5673f", "x", 7),
    "uniform": ("uniform merge", "#9b59b6", "triangle-up", 11),
    "base": ("base", "#6b7280", "square", 10),
    "parent": ("parents", "#2e9e5b", "diamond", 11),
    "winner": ("winner", "#f28e2b", "star", 16),
}
PALETTE = ("#2f7ed8", "#f28e2b", "#2e9e5b", "#9b59b6", "#d64550", "#17a2b8", "#a5673f", "#8a97a8")
_BETTER, _WORSE = "#2f7ed8", "#d64550"


@cache
def plotly_script() -> str:
    """The whole of plotly.js."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def figure_of(data: Sequence[Mapping[str, Any]], **layout: Any) -> Figure:
    """A figure that plotly has checked."""
    import plotly.graph_objects as go

    common = {
        "template": {},
        "margin": {"l": 52, "r": 16, "t": 16, "b": 48},
        "legend": {"orientation": "h", "y": -0.22, "x": 0},
        "hovermode": "closest",
        "dragmode": False,
        "height": 420,
    }
    made: Figure = go.Figure(data=list(data), layout=common | layout).to_plotly_json()
    return {"data": [_plain(trace) for trace in made["data"]], "layout": _plain(made["layout"])}


def _plain(value: Any) -> Any:
    """A value as JSON holds it; tuples and arrays become lists."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def number(value: float | None) -> float | None:
    """A number with as many digits as a drawing needs; None for what is no finite number."""
    drawn = math.nan if value is None else float(f"{value:.{_DIGITS}g}")  # which may round up to infinity
    return drawn if math.isfinite(drawn) else None


def thinned(count: int, most: int = MOST_POINTS) -> list[int]:
    """The indices of evenly spaced elements, the first and the last among them; all where there are few."""
    if count <= most:
        return list(range(count))
    return sorted({round(index * (count - 1) / (most - 1)) for index in range(most)})


# The verdict


def verdict(compared: Sequence[Comparison]) -> Drawing:
    """The lead of the winner over each rival, by task and in the mean, with 95 % intervals."""
    rows = [(name, f"{one.role}: {one.rival}") for one in compared for name in (*one.objectives, one.of)]
    tasks = list(dict.fromkeys(name for name, _ in rows))
    tasks.sort(key=lambda name: name in {one.of for one in compared})  # the mean last, so at the top
    traces = []
    for index, one in enumerate(compared):
        found = {name: (task.difference, task.interval) for name, task in one.objectives.items()}
        found[one.of] = (one.difference, one.interval)
        names = [name for name in tasks if name in found]
        differences = [found[name][0] for name in names]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label(f"{one.role}: {one.rival}"),
                "x": [number(difference) for difference in differences],
                "y": [tasks.index(name) + 0.14 * (index - (len(compared) - 1) / 2) for name in names],
                "marker": {"color": PALETTE[index], "size": 10},
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [number(found[name][1][1] - found[name][0]) for name in names],
                    "arrayminus": [number(found[name][0] - found[name][1][0]) for name in names],
                    "color": PALETTE[index],
                },
                "hoverinfo": "text",
                "hovertext": [
                    label(f"{name}: {found[name][0]:+.3f} ({found[name][1][0]:+.3f} to {found[name][1][1]:+.3f})")
                    for name in names
                ],
            }
        )
    figure = figure_of(
        traces,
        height=150 + 56 * len(tasks),
        xaxis={"title": {"text": "lead of the winner on held-out items"}, "zeroline": True, "zerolinewidth": 2},
        yaxis=named_axis(tasks),
        legend={"orientation": "h", "y": -0.5 if len(tasks) < 4 else -0.25, "x": 0},
    )
    return Drawing(figure)


def short(column: str) -> str:
    return {"embeddings": "emb"}.get(column, column)


def named_axis(names: Sequence[str], longest: int = 22) -> dict[str, Any]:
    return {
        "tickmode": "array",
        "tickvals": list(range(len(names))),
        "ticktext": [label(name, longest) for name in names],
        "automargin": True,
        "zeroline": False,
        "range": [-0.6, len(names) - 0.4],
    }


# The front


def front(rows: Sequence[CandidateView], on_front: Sequence[str], winner: str | None, names: Sequence[str]) -> Drawing:
    """The candidates by any two scores on search items.

    rows: the candidates that were scored on all search items.
    on_front: the ids of those on the front.
    winner: the winner's id.
    names: the objectives.
    """
    options = [*names, MEAN]
    by_role = _by_role(rows, on_front, winner)
    traces = []
    for role, members in by_role.items():
        columns = [[number(_score(row, name)) for row in members] for name in options]
        traces.append(
            _points(role, [f"{row.id}: " + _scores_text(row.scores) for row in members])
            | {"x": columns[0], "y": columns[1], "meta": columns}
            | _names(role, members)
        )
    figure = figure_of(
        traces,
        height=480,
        xaxis={"title": {"text": label(options[0])}},
        yaxis={"title": {"text": label(options[1])}, "automargin": True},
    )
    shown = tuple(options)
    return Drawing(figure, (Select("across", shown, "x", 0), Select("up", shown, "y", 1)))


def _points(role: str, texts: Sequence[str]) -> dict[str, Any]:
    title, color, symbol, size = ROLES[role]
    many = role in ("search", "control")  # hundreds, which must not hide the others
    return {
        "type": "scatter",
        "mode": "markers",
        "name": title,
        "marker": {
            "color": color,
            "symbol": symbol,
            "size": size,
            "opacity": 0.55 if many else 1,
            "line": {"width": 0 if many else 1, "color": "#ffffff"},
        },
        "hoverinfo": "text",
        "hovertext": [label(text, 110) for text in texts],
    }


def _names(role: str, members: Sequence[CandidateView]) -> dict[str, Any]:
    """The names of parents, beside their marks."""
    if role != "parent":
        return {}
    names = [label(row.id.removeprefix("parent-"), 16) for row in members]
    return {"mode": "markers+text", "text": names, "textposition": "top center", "cliponaxis": False}


def _scores_text(scores: Mapping[str, float] | None) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in (scores or {}).items())


def _score(row: CandidateView, name: str) -> float | None:
    return row.mean if name == MEAN else (row.scores or {}).get(name)


def role_of(row: CandidateView, on_front: Sequence[str], winner: str | None) -> str:
    """What a candidate is in a figure: a key of `ROLES`."""
    if row.id == winner:
        return "winner"
    if row.kind == "control":
        family = row.id.split("-")[0]
        return family if family in ("base", "uniform", "parent") else "control"
    return "front" if row.id in on_front else "search"


def _by_role(
    rows: Sequence[CandidateView], on_front: Sequence[str], winner: str | None
) -> dict[str, list[CandidateView]]:
    """The candidates by role, in the order in which they are drawn; the plain ones are thinned out."""
    by_role: dict[str, list[CandidateView]] = {role: [] for role in ROLES}
    for row in rows:
        by_role[role_of(row, on_front, winner)].append(row)
    for role, members in by_role.items():
        by_role[role] = [members[index] for index in thinned(len(members))]
    return {role: members for role, members in by_role.items() if members}


def shrinkage(
    rows: Sequence[CandidateView], on_front: Sequence[str], winner: str | None, names: Sequence[str]
) -> Drawing:
    """Held-out scores against search scores, with the diagonal on which both are the same.

    rows: the candidates that have both.
    """
    options = [MEAN, *names]
    traces: list[dict[str, Any]] = []
    ends: list[list[float | None]] = []
    for name in options:
        values = [value for row in rows for value in (_score(row, name), _heldout(row, name)) if value is not None]
        ends.append([number(min(values, default=0.0)), number(max(values, default=1.0))])
    traces.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "the same on both",
            "x": ends[0],
            "y": ends[0],
            "meta": [ends, ends],
            "line": {"color": "#8a97a8", "dash": "dot", "width": 1},
            "hoverinfo": "skip",
        }
    )
    for role, members in _by_role(rows, on_front, winner).items():
        across = [[number(_score(row, name)) for row in members] for name in options]
        upward = [[number(_heldout(row, name)) for row in members] for name in options]
        texts = [
            f"{row.id}: mean {row.mean or 0:.3f} on search items, {row.heldout_mean or 0:.3f} held-out"
            for row in members
        ]
        drawn = _points(role, texts) | _names(role, members)
        traces.append(drawn | {"x": across[0], "y": upward[0], "meta": [across, upward]})
    figure = figure_of(
        traces,
        height=440,
        xaxis={"title": {"text": "on search items"}},
        yaxis={"title": {"text": "on held-out items"}, "automargin": True},
    )
    variants = {
        str(index): {
            "data": [{"x": trace["meta"][0][index], "y": trace["meta"][1][index]} for trace in traces],
        }
        for index in range(len(options))
    }
    for trace in figure["data"]:
        del trace["meta"]
    return Drawing(figure, (Select("score", tuple(options)),), variants)


def _heldout(row: CandidateView, name: str) -> float | None:
    return row.heldout_mean if name == MEAN else (row.heldout or {}).get(name)


# The course


_UNITS = ("evaluations", "forward passes over all search items", "items", "hours of workers")


def _units(point: Point) -> tuple[float, ...]:
    spent = point.spent
    return (spent.evaluations, spent.passes, spent.items, spent.hours)


def course(shown: Course, controls: Sequence[tuple[str, float]]) -> Drawing:
    """The best mean so far and the mean of every candidate, with controls as lines.

    shown: the course of the search.
    controls: the title and the mean of each control.
    """
    points = [shown.points[index] for index in thinned(len(shown.points))]
    whole = [point for point in points if point.share == 1 and point.mean is not None]
    parts = [point for point in points if point.share < 1 and point.mean is not None]
    climbing = [point for point in points if point.best is not None]
    traces = []
    for name, members, marker in (
        ("scored on some of the items", parts, {"color": "#8a97a8", "size": 4, "symbol": "circle-open"}),
        ("scored on all search items", whole, {"color": "#8a97a8", "size": 5}),
    ):
        if members:
            traces.append(_timed(members, [point.mean for point in members]) | {"name": name, "marker": marker})
            traces[-1] |= {"mode": "markers", "hoverinfo": "text"}
            traces[-1]["hovertext"] = [label(f"{point.id}: {point.mean:.3f}") for point in members]
    if climbing:
        line = {"color": ROLES["winner"][1], "width": 3, "shape": "hv"}
        traces.append(_timed(climbing, [point.best for point in climbing]) | {"name": "best so far", "line": line})
        traces[-1] |= {"mode": "lines"}
    ends = [list(pair) for pair in zip(_units(points[0]), _units(points[-1]), strict=True)]
    for index, (title, mean) in enumerate(controls):
        color = PALETTE[(index + 2) % len(PALETTE)]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": label(title, 30),
                "x": ends[0],
                "y": [number(mean)] * 2,
                "meta": ends,
                "line": {"color": color, "width": 1.5, "dash": ("dash", "dot", "dashdot")[index % 3]},
                "hoverinfo": "name",
            }
        )
    traces += _marks(shown, traces)
    figure = figure_of(
        traces,
        height=500,
        xaxis={"title": {"text": _UNITS[0]}, "rangemode": "tozero"},
        yaxis={"title": {"text": label(f"{shown.mean} on search items")}, "automargin": True},
        legend={"orientation": "h", "y": -0.2, "x": 0},
    )
    return Drawing(figure, (Select("by", _UNITS, "x", 0),))


def _timed(points: Sequence[Point], values: Sequence[float | None]) -> dict[str, Any]:
    columns = [[number(value) for value in column] for column in zip(*map(_units, points), strict=True)]
    return {"type": "scatter", "x": columns[0], "y": [number(value) for value in values], "meta": columns}


def _marks(shown: Course, traces: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Vertical lines where stages and subset sizes begin."""
    values = [value for trace in traces for value in trace["y"] if value is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    made = []
    for mark in shown.marks[:12]:
        columns = [[number(unit)] * 2 for unit in _units(shown.points[mark.at])]
        made.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": label(mark.text, 40),
                "x": columns[0],
                "y": [low, high],
                "meta": columns,
                "line": {"color": "#6b7280", "width": 1},
                "hoverinfo": "name",
            }
        )
    return made


def losses(by_metric: Mapping[str, Sequence[tuple[int, float]]], unit: str) -> Drawing:
    """The loss of each metric by the step along gradients.

    by_metric: the number and the loss of each step.
    unit: the title of the axis of losses.
    """
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": label(name, 30),
            "x": [step for step, _ in steps],
            "y": [number(loss) for _, loss in steps],
            "line": {"color": PALETTE[index % len(PALETTE)], "width": 2},
            "marker": {"size": 4},
        }
        for index, (name, steps) in enumerate(by_metric.items())
    ]
    axes = {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": unit}, "automargin": True}}
    return Drawing(figure_of(traces, height=360, **axes))


# Genes


def importances(shares: Mapping[str, float], most: int = 20) -> Drawing:
    """The share of the variance of the mean that genes explain, largest first.

    shares: by gene or group of genes.
    most: how many are drawn.
    """
    names = list(reversed(list(shares)[:most]))
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": [number(shares[name]) for name in names],
        "y": list(range(len(names))),
        "marker": {"color": _BETTER},
        "hoverinfo": "text",
        "hovertext": [label(f"{name}: {shares[name]:.1%}", 90) for name in names],
    }
    figure = figure_of(
        [trace],
        height=110 + 24 * len(names),
        xaxis={"title": {"text": "share of the variance"}, "tickformat": ".0%"},
        yaxis=named_axis(names, 30),
    )
    return Drawing(figure)


_BANDS = ("#b8c0cc", "#8fa3bf", "#5f8fc4", "#e0a458", "#d64550")  # a fifth of the candidates each, the worst first


def parallel(shown: Features, names: Sequence[str], mean: str) -> Drawing:
    """A line for each candidate across its genes, the better ones on top and in a warmer color.

    shown: the features of the search.
    names: of the features that are drawn, in this order.
    mean: what the mean is called.
    """
    picked = [next(i for i, feature in enumerate(shown.features) if feature.name == name) for name in names]
    order = sorted(range(len(shown.candidates)), key=lambda row: shown.means[row])
    order = [order[index] for index in thinned(len(order), 600)]
    cuts = [len(order) * band // len(_BANDS) for band in range(len(_BANDS) + 1)]
    heights = {row: _heights(shown, picked, row, order) for row in order}
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": label(f"{mean} {shown.means[order[start]]:.3f} to {shown.means[order[end - 1]]:.3f}"),
            "x": [x for _ in order[start:end] for x in (*range(len(picked) + 1), None)],
            "y": [y for row in order[start:end] for y in (*heights[row], None)],
            "line": {"color": color, "width": 1.5 if band == len(_BANDS) - 1 else 1},
            "opacity": 0.35 + 0.15 * band,
            "hoverinfo": "name",
        }
        for band, (color, start, end) in enumerate(zip(_BANDS, cuts, cuts[1:], strict=False))
        if start < end
    ]
    figure = figure_of(
        traces,
        height=480,
        xaxis={
            "tickmode": "array",
            "tickvals": list(range(len(picked) + 1)),
            "ticktext": [*(label(name, 24) for name in names), label(mean)],
            "tickangle": -90,
            "automargin": True,
            "zeroline": False,
            "range": [-0.4, len(picked) + 0.4],
        },
        yaxis={
            "tickmode": "array",
            "tickvals": [0, 0.5, 1],
            "ticktext": ["least", "middle", "largest"],
            "automargin": True,
            "range": [-0.03, 1.03],
        },
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin={"l": 52, "r": 16, "t": 60, "b": 48},
    )
    return Drawing(figure)


def _heights(shown: Features, picked: Sequence[int], row: int, order: Sequence[int]) -> list[float | None]:
    """How high a candidate's line stands at each picked feature, and last at its mean."""
    low, high = shown.means[order[0]], shown.means[order[-1]]
    at_features = [_height(shown.features[column], shown.values[row][column]) for column in picked]
    return [*at_features, number((shown.means[row] - low) / ((high - low) or 1.0))]


def _height(feature: Feature, value: float | int | str | None) -> float | None:
    """Where a value lies between the least and the largest; choices are evenly spaced."""
    if value is None:
        return None
    place = float(feature.choices.index(str(value))) if feature.choices else float(value)
    low, high = (0.0, float(len(feature.choices) - 1)) if feature.choices else (feature.low, feature.high)
    return number((place - low) / ((high - low) or 1.0))


# Parts of the winner


def parts(shown: Sequence[Part], mean: str) -> Drawing:
    """How much the winner leads what is left of it without each part, with 95 % intervals.

    shown: the parts whose lead is known.
    mean: what the mean is called.
    """
    rows = list(reversed(shown))
    traces = []
    titles = {"group": "genes put back", "model": "weights set to 0"}
    for color, (kind, title) in zip((_BETTER, ROLES["winner"][1]), titles.items(), strict=True):
        members = [(index, part, part.lead) for index, part in enumerate(rows) if part.kind == kind and part.lead]
        if not members:
            continue
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": title,
                "x": [number(lead.difference) for _, _, lead in members],
                "y": [index for index, _, _ in members],
                "marker": {"color": color, "size": 10},
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [number(lead.interval[1] - lead.difference) for _, _, lead in members],
                    "arrayminus": [number(lead.difference - lead.interval[0]) for _, _, lead in members],
                    "color": color,
                },
                "hoverinfo": "text",
                "hovertext": [
                    label(
                        f"{part.name}: {lead.difference:+.3f} ({lead.interval[0]:+.3f} to {lead.interval[1]:+.3f})", 90
                    )
                    for _, part, lead in members
                ],
            }
        )
    figure = figure_of(
        traces,
        height=160 + 30 * len(rows),
        xaxis={"title": {"text": label(f"what it brings: {mean}, held-out")}, "zeroline": True, "zerolinewidth": 2},
        yaxis=named_axis([part.name for part in rows], 30),
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        margin={"l": 52, "r": 16, "t": 40, "b": 48},
    )
    return Drawing(figure)


def way(stops: Sequence[Stop], chosen: str, mean: str, start: str) -> Drawing:
    """The mean while one group of genes after the other becomes the winner's.

    stops: from the start to the winner.
    chosen: the items that decided the order.
    mean: what the mean is called.
    start: what the first stop is called.
    """
    names = [start, *(f"+ {stop.name}" for stop in stops[1:])]
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": f"{split} items",
            "x": list(range(len(stops))),
            "y": [number(value) for value in values],
            "line": {"color": color, "width": 2.5, "dash": dash},
            "marker": {"size": 7},
            "hoverinfo": "text",
            "hovertext": [
                label(f"{name}: {'failed' if value is None else f'{value:.3f}'} on {split} items", 90)
                for name, value in zip(names, values, strict=True)
            ],
        }
        for split, values, color, dash in (
            (chosen, [stop.chosen for stop in stops], "#8a97a8", "dot"),
            ("held-out", [stop.heldout for stop in stops], ROLES["winner"][1], "solid"),
        )
    ]
    axis = {
        "tickmode": "array",
        "tickvals": list(range(len(names))),
        "ticktext": [label(name, 22) for name in names],
        "tickangle": -60,
        "automargin": True,
        "zeroline": False,
    }
    figure = figure_of(
        traces,
        height=440,
        xaxis=axis,
        yaxis={"title": {"text": label(mean)}, "automargin": True},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        margin={"l": 52, "r": 16, "t": 40, "b": 48},
    )
    return Drawing(figure)


# Parents


def retention(kept: Sequence[Kept]) -> Drawing:
    """The scores of the winner beside those of each parent on the parent's best metric."""
    names = [f"{one.parent}: {one.metric}" for one in kept]
    traces = [
        {
            "type": "bar",
            "name": title,
            "x": list(range(len(kept))),
            "y": [number(value) for value in values],
            "marker": {"color": color},
            "hoverinfo": "text",
            "hovertext": [label(f"{title}: {value:.3f}") for value in values],
        }
        for title, values, color in (
            ("the parent", [one.parent_score for one in kept], ROLES["parent"][1]),
            ("the winner", [one.score for one in kept], ROLES["winner"][1]),
        )
    ]
    axis = named_axis(names, 24)
    figure = figure_of(traces, height=360, xaxis=axis, yaxis={"title": {"text": "score"}, "automargin": True})
    return Drawing(figure)


def distances(measured: Distances) -> Drawing:
    """The distances of the merge and of its parents by layer."""
    ticks = range(0, len(measured.places), max(1, len(measured.places) // 16))
    lines = [("merge to base", measured.merged["base"], ROLES["winner"][1], "solid", 3)]
    for index, (name, values) in enumerate(measured.parents.items()):
        color = ("#2e9e5b", "#2f7ed8", "#9b59b6", "#d64550", "#17a2b8", "#a5673f")[index % 6]
        lines.append((f"{name} to base", values, color, "dash", 2))
        lines.append((f"merge to {name}", measured.merged[name], color, "solid", 2))
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": label(title),
            "x": list(range(len(values))),
            "y": [number(value) for value in values],
            "line": {"color": color, "dash": dash, "width": width},
            "marker": {"size": 5},
        }
        for title, values, color, dash, width in lines
    ]
    axis = {
        "tickmode": "array",
        "tickvals": list(ticks),
        "ticktext": [label(short(measured.places[index])) for index in ticks],
        "title": {"text": "layer"},
        "zeroline": False,
    }
    height = {"title": {"text": "distance / norm of the base"}, "automargin": True, "rangemode": "tozero"}
    return Drawing(figure_of(traces, height=440, xaxis=axis, yaxis=height))


# Items


def flips(found: Sequence[Flips]) -> Drawing:
    """A line for each rival and metric, with a tick for each item that the winner gained or lost."""
    names = [f"{one.rival}: {one.metric}" for one in reversed(found)]
    traces = []
    for title, color, lift, side in (("gained", _BETTER, 0.16, "gained"), ("lost", _WORSE, -0.16, "lost")):
        marks = [(index, item) for index, one in enumerate(reversed(found)) for item in getattr(one, side)]
        drawn = [marks[index] for index in thinned(len(marks))]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": title,
                "x": [item for _, item in drawn],
                "y": [index + lift for index, _ in drawn],
                "marker": {"symbol": "line-ns-open", "size": 9, "color": color, "line": {"width": 2, "color": color}},
                "hoverinfo": "text",
                "hovertext": [label(f"{names[index]}, item {item}: {title}", 90) for index, item in drawn],
            }
        )
    figure = figure_of(
        traces,
        height=140 + 34 * len(names),
        xaxis={"title": {"text": "number of the held-out item"}, "zeroline": False, "rangemode": "tozero"},
        yaxis=named_axis(names, 26),
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        margin={"l": 52, "r": 16, "t": 40, "b": 48},
    )
    return Drawing(figure)
