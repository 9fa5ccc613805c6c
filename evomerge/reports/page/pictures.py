"""Figures of recipes: heat maps of their numbers, and paths through the layers of models."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from evomerge.reports.page.blocks import Drawing, Figure, Select
from evomerge.reports.page.figures import PALETTE, figure_of, named_axis, number, short
from evomerge.reports.page.labels import label
from evomerge.reports.page.recipes import MERGE, Grid, Path

_WIDTHS = 4  # of lines that tell scales apart


def grids(titles: Sequence[str], pictures: Sequence[Mapping[str, Grid]], choice: str, alike: bool = True) -> Drawing:
    """Heat maps of the parameters of recipes, by model, kind of tensor and layer.

    titles: what each picture is of.
    pictures: for each title the grids by parameter. The first has at least one grid.
    choice: what a title names.
    alike: whether a parameter has the same colors in all pictures.
    """
    parameters = list(dict.fromkeys(name for grids in pictures for name in grids))
    ranges = {name: _range([grids[name] for grids in pictures if name in grids]) for name in parameters}
    variants = {
        f"{which}|{index}": _heat(
            grids.get(name), ranges[name] if alike or name not in grids else _range([grids[name]])
        )
        for which, grids in enumerate(pictures)
        for index, name in enumerate(parameters)
    }
    first = next(key for key in variants if variants[key]["data"][0]["z"])
    which, index = map(int, first.split("|"))
    figure = figure_of(variants[first]["data"], **variants[first]["layout"])
    selects = (
        Select(choice, tuple(titles), start=which),
        Select("parameter", tuple(parameters), start=index),
    )
    return Drawing(figure, selects, variants)


def _range(grids: Sequence[Grid]) -> tuple[float, float]:
    values = [value for grid in grids for row in grid.values for value in row if value is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (-max(-low, high), max(-low, high)) if low < 0 else (0.0, high or 1.0)


def _heat(grid: Grid | None, limits: tuple[float, float]) -> Figure:
    """A heat map, whose first row is at the top. The page makes the texts of its cells, which would take much room."""
    rows = list(reversed(grid.rows)) if grid else []
    values = list(reversed(grid.values)) if grid else []
    columns = grid.columns if grid else ()
    names = [_row_name(*row) for row in rows]
    tall = (34 if len(rows) < 8 else 24) * max(2, len(rows))
    trace = {
        "type": "heatmap",
        "z": [[number(value) for value in row] for row in values],
        "x": list(range(len(columns))),
        "y": list(range(len(rows))),
        "zmin": limits[0],
        "zmax": limits[1],
        "colorscale": "RdBu" if limits[0] < 0 else "Viridis",
        "hoverongaps": False,
        "hoverinfo": "text",
        "meta": {"rows": [label(name, 90) for name in names], "columns": [_column_name(column) for column in columns]},
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"orientation": "h", "thickness": 12, "y": -74 / tall, "yanchor": "top"},
    }
    shown = range(0, len(columns), max(1, len(columns) // 16))
    layout = {
        "height": tall + 132,
        "margin": {"l": 52, "r": 12, "t": 12, "b": 120},
        "xaxis": {
            "tickmode": "array",
            "tickvals": list(shown),
            "ticktext": [label(short(columns[index]), 12) for index in shown],
            "title": {"text": "layer"},
            "showgrid": False,
            "zeroline": False,
        },
        "yaxis": named_axis(names, 26) | {"showgrid": False},
    }
    return {"data": [trace], "layout": layout}


def _row_name(model: str, kind: str) -> str:
    return model if kind == "all tensors" else f"{model} {kind.replace('self_attn.', '').replace('mlp.', '')}"


def _column_name(column: str) -> str:
    return f"layer {column}" if column.isdigit() else column


def paths(titles: Sequence[str], shown: Sequence[Path]) -> Drawing:
    """The paths of candidates through the layers of models: a lane for each model, a line from hop to hop.

    titles: what each path is of.
    shown: the paths.
    """
    lanes = list(dict.fromkeys(stop.lane for path in shown for stop in path.stops))
    lanes.sort(key=lambda lane: lane != MERGE)
    depth = 1 + max(stop.layer for path in shown for stop in path.stops)
    made = [_path(path, lanes, depth) for path in shown]
    bands = [index * (depth + 1) for index in range(len(lanes))]
    ticks = [band + layer for band in bands for layer in range(0, depth, max(1, depth // 4))]
    figure = figure_of(
        made[0],
        height=170 + min(560, 22 * len(lanes) * (depth + 1)),
        xaxis={"title": {"text": "layer of the merged model"}, "zeroline": False},
        yaxis={
            "tickmode": "array",
            "tickvals": ticks,
            "ticktext": [label(f"{lanes[tick // (depth + 1)]} {tick % (depth + 1)}", 20) for tick in ticks],
            "automargin": True,
            "zeroline": False,
            "range": [-1, len(lanes) * (depth + 1)],
        },
        showlegend=False,
        shapes=[
            {
                "type": "rect",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": band - 0.5,
                "y1": band + depth - 0.5,
                "fillcolor": PALETTE[index % len(PALETTE)],
                "opacity": 0.1,
                "line": {"width": 0},
                "layer": "below",
            }
            for index, band in enumerate(bands)
        ],
    )
    variants = {str(index): {"data": traces} for index, traces in enumerate(made)}
    return Drawing(figure, (Select("candidate", tuple(titles)),), variants)


def _path(path: Path, lanes: Sequence[str], depth: int) -> list[dict[str, Any]]:
    """A line of several widths, and a dot for each hop, or a square where hops run side by side. Every path has equally
    many traces."""
    across = list(range(len(path.stops)))
    upward = [lanes.index(stop.lane) * (depth + 1) + stop.layer for stop in path.stops]
    widths = [_width(stop.scale) for stop in path.stops]
    traces: list[dict[str, Any]] = []
    for width in range(1, 2 * _WIDTHS + 1):
        x: list[float | None] = []
        y: list[float | None] = []
        for (before, after), own in zip(pairwise(across), widths[1:], strict=True):
            if own == width:
                x += [before, after, None]
                y += [upward[before], upward[after], None]
        line = {"width": 1.2 * width, "color": "#6b7280"}
        traces.append({"type": "scatter", "mode": "lines", "x": x, "y": y, "line": line, "hoverinfo": "skip"})
    traces.append(
        {
            "type": "scatter",
            "mode": "markers",
            "x": across,
            "y": upward,
            "marker": {
                "size": [6 + 1.2 * width for width in widths],
                "color": [PALETTE[lanes.index(stop.lane) % len(PALETTE)] for stop in path.stops],
                "symbol": ["circle" if path.block_of(index) is None else "square" for index in across],
            },
            "hoverinfo": "text",
            "hovertext": [
                label(f"layer {index}: layer {stop.layer} of {stop.lane}, scale {stop.scale:.3g}{_beside(path, index)}")
                for index, stop in enumerate(path.stops)
            ],
        }
    )
    return traces


def _beside(path: Path, index: int) -> str:
    block = path.block_of(index)
    return "" if block is None else f", in the block of layers {block[0]} to {block[1] - 1}"


def _width(scale: float) -> int:
    """The width of a hop: 4 where its scale is 1."""
    return min(2 * _WIDTHS, max(1, round(_WIDTHS * scale)))
