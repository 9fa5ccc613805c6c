"""A space that cannot be searched is refused in one sentence."""

from typing import Any

import pytest

from tests.bad_input import Refuses, flow

WRONG_VALUES: dict[str, tuple[Any, ...]] = {
    "an unknown space": ({"space": {"kind": "dataflow"}}, 'space.kind is "dataflow"', "did you mean 'data_flow'?"),
    "an unknown key of a path": (flow(granularty=2), "space.granularty is not a known key", "'granularity'?"),
    "an unknown form": (flow(form="slot"), 'space.form is "slot"', "did you mean 'slots'?"),
    "a path of an unknown model": (flow(sources=["frist"]), "space.sources[0] is 'frist'", "did you mean 'first'?"),
    "fewer layers than are pinned": (
        flow(max_layers=2, pinned={"model": "first"}),
        "space.max_layers is 2, but space.pinned alone keeps 2; allow at least 3",
    ),
    "more pinned layers than there are": (
        flow(pinned={"model": "first", "first": 3, "last": 3}),
        "space.pinned keeps 3 + 3 layers, but the models have 4",
    ),
    "a scale of 0": (flow(scale={"low": 0.0}), "space.scale.low is 0; use a value above 0"),
    "scales in a family": (flow(form="skip", scale={"low": 0.5}), "space.scale cannot be searched in form skip"),
    "a hybrid of one model's layers by a method that has no weights": (
        {"space": {"kind": "hybrid", "parameter": {"method": "karcher"}, "path": {"sources": ["first"]}}},
        "space.path.sources names first, but karcher cannot give one model's layers unmerged",
    ),
    "a density of 0": ({"space.density.low": 0}, "space.density.low is 0; use a value in (0, 1]"),
    "a density above 1": ({"space.density.high": 1.4}, "space.density.high is 1.4; use a value in (0, 1]"),
    "a fixed density of 0": ({"space.density.fixed": 0}, "space.density.fixed is 0; use a value in (0, 1]"),
    "bounds in the wrong order": ({"space.weight": {"low": 1, "high": 0.5}}, "space.weight.low is 1", "which is 0.5"),
    "a start outside of the bounds": ({"space.weight.start": 9}, "space.weight.start is 9", "0 to 1.5"),
    "a step of 0": ({"space.weight.step": 0}, "space.weight.step is 0; use a value greater than 0"),
    "a negative step": ({"space.lambda.step": -1}, "space.lambda.step is -1"),
    "a bound that is not a number": (
        {"space.weight.high": float("nan")},
        "space.weight.high is NaN; use a finite number",
    ),
    "an infinite bound": ({"space.weight.high": float("inf")}, "space.weight.high is Infinity; use a finite number"),
    "text for a number": ({"space.weight.fixed": "much"}, 'space.weight.fixed is "much"; use a valid number'),
    "bounds as a list": ({"space.weight": [0, 1]}, "space.weight is [0, 1]; write keys and values"),
    "an unknown method": ({"space.method": "dare_tie"}, "space.method is 'dare_tie'", "did you mean 'dare_ties'?"),
    "an unknown method among several": ({"space.method": ["ties", "slrp"]}, "space.method is 'slrp'", "'slerp'?"),
    "no method": ({"space.method": []}, "space.method: the list is empty; name a method, or several"),
    "a method twice": ({"space.method": ["ties", "ties"]}, "space.method: ties is named twice; name each once"),
    "a number for a method": ({"space.method": 3}, "space.method is 3; "),
    "a parameter of a method that is not used": (
        {"space.parameters": {"slerp": {"t": None}}},
        "space.parameters.slerp is for no method in space.method",
    ),
    "an unknown parameter of a method": (
        {"space.method": "sce", "space.parameters": {"sce": {"topk": None}}},
        "space.parameters.sce.topk cannot be searched; did you mean 'select_topk'?",
    ),
    "a parameter's bounds in the wrong order": (
        {"space.method": "slerp", "space.parameters": {"slerp": {"t": {"low": 2}}}},
        "space.parameters.slerp.t: low is 2; use a value below high, which is 1",
    ),
    "an unknown key of a parameter": (
        {"space.method": "slerp", "space.parameters": {"slerp": {"t": {"lo": 0}}}},
        "space.parameters.slerp.t.lo is not a known key; did you mean 'low'?",
    ),
    "groups that leave layers out": (
        {"space.layer_groups": ["0-1"]},
        "space.layer_groups end at layer 1",
        "layer is 3",
    ),
    "groups that overlap": (
        {"space.layer_groups": ["0-2", "2-3"]},
        "space.layer_groups[1] is '2-3'",
        "starts at layer 3",
    ),
    "groups beyond the last layer": ({"space.layer_groups": ["0-4"]}, "space.layer_groups[0] is '0-4'", "4 layers"),
    "a group that is no range": ({"space.layer_groups": ["a-b"]}, "space.layer_groups[0] is 'a-b'", "('0-3')"),
    "no groups": ({"space.layer_groups": []}, "space.layer_groups is []; give at least one"),
    "a granularity that does not divide": ({"space.layer_granularity": 3}, "space.layer_granularity is 3", "4 layers"),
    "both ways to group": ({"space": {"layer_groups": ["0-3"], "layer_granularity": 2}}, "space: give either"),
    "a filter that matches nothing": (
        {"space.filters": ["mpl"]},
        "space.filters[0] is 'mpl'",
        "names look like model.",
    ),
    "nothing left to search": (
        {"space": {"weight": {"fixed": 1}, "density": {"fixed": 1}}},
        "space: every kind",
        "free one",
    ),
}


@pytest.mark.parametrize("claim", WRONG_VALUES)
def test_a_wrong_value_in_a_search_file_is_refused(claim: str, refuses_search: Refuses) -> None:
    refuses_search(*WRONG_VALUES[claim])
