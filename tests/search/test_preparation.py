"""Objectives, constraints, items, subsets and controls that do not hold together are refused in one sentence."""

from typing import Any

import pytest

from tests.bad_input import Refuses, flow

WRONG_VALUES: dict[str, tuple[Any, ...]] = {
    "grids of merges beside paths": (
        flow() | {"controls.one_knob": True},
        "controls.one_knob is true, but a data-flow search merges no weights",
    ),
    "an unknown cost": ({"objectives.0": {"cost": "layer"}}, 'objectives[0].cost is "layer"', "'layers'?"),
    "a cost of a task": (
        {"objectives.0": {"cost": "layers", "task": "base_qa"}},
        "objectives[0].cost is layers, which belongs to no task",
    ),
    "a limit on a task": ({"objectives.0.max": 0.5}, "objectives[0].max is 0.5, but only a cost has a limit"),
    "nothing but costs": ({"objectives": [{"cost": "layers"}]}, "objectives are all costs; add a task"),
    "a model named twice": (
        {"base": "zoo:base", "models": {"one": "zoo:math", "two": "zoo:math"}},
        "models.two is zoo:math, which is models.one too; name each model once",
    ),
    "an objective twice": (
        {"objectives.1.task": "base_qa"},
        "objectives[1] is base_qa again; name each objective once",
    ),
    "a goal misspelled": ({"objectives.0.goal": "maximise"}, "objectives[0].goal", "did you mean 'maximize'?"),
    "an objective without weight": ({"objectives.0.weight": 0}, "objectives[0].weight is 0", "greater than 0"),
    "subsets without generations": (
        {"subsets": True, "optimizer": {"name": "cma_es", "schedule": "async"}},
        "subsets is true, but optimizer.schedule is async, which has no generations; set it to false or auto",
    ),
    "subsets of what only all items can tell": (
        {"subsets": True, "objectives": [{"task": "base_qa"}, {"cost": "seconds"}]},
        "subsets is true, but the cost 'seconds' depends on how many items there are",
    ),
    "more items than there are": ({"items.search": 10**6}, "items.search asks for 1000000 items", "only 200 left"),
    "more selection items than there are": ({"items.selection": 10**6}, "items.selection asks for 1000000 items"),
    "a constraint that asks for more than there is": (
        {"constraints": [{"task": "math_a", "retain": 1.5}]},
        "constraints[0].retain is 1.5",
        "less than or equal to 1",
    ),
    "a constraint without its share": ({"constraints": [{"task": "math_a"}]}, "constraints[0].retain is required"),
    "a constraint on the share of no parent": (
        {"constraints": [{"task": "math_a", "retain": 0.9, "of": "frist"}]},
        "constraints[0].of is frist, which is no parent",
        "did you mean 'first'?",
    ),
    "a constraint on an unknown metric": (
        {"constraints": [{"task": "math_a", "metric": "accc", "retain": 0.9}]},
        "constraints[0].metric is 'accc'",
        "did you mean 'acc'?",
    ),
    "a constraint that turns an objective around": (
        {"constraints": [{"task": "base_qa", "goal": "minimize", "retain": 0.9}]},
        "constraints[0].goal is minimize, but elsewhere base_qa has goal maximize",
    ),
    "a constraint with another filter than the objective": (
        {"constraints": [{"task": "base_qa", "filter": "none", "retain": 0.9}]},
        'constraints[0].filter is "none", and that of objectives[0] is another way to say it',
    ),
    "a report of what is an objective": (
        {"report": [{"task": "base_qa"}]},
        "report[0] is base_qa, which is reported anyway; remove it",
    ),
    "a report given twice": (
        {"report": [{"task": "math_a"}, {"task": "math_a"}]},
        "report[1] is math_a, which is reported anyway; remove it",
    ),
    "a report of a metric that its task lacks": (
        {"report": [{"task": "math_a", "metric": "accc"}]},
        "report[0].metric is 'accc', which task 'math_a' does not report; did you mean 'acc'?",
    ),
    "a report of a task that is not there": ({"report": [{"task": "math_aa"}]}, "math_aa", "did you mean"),
    "a report with a weight": ({"report": [{"task": "math_a", "weight": 2}]}, "report[0].weight"),
    "more held-out items than there are": ({"items.heldout": 10**6}, "items.heldout asks for 1000000 items"),
    "no items": ({"items.search": 0}, "items.search is 0; use a value greater than or equal to 1"),
    "a grid over too many models": (
        {"controls.per_model": True, "models": {f"m{i}": "zoo:math" for i in range(8)}, "base": "zoo:base"},
        "controls.per_model",
        "8 models; set it to false",
    ),
}


@pytest.mark.parametrize("claim", WRONG_VALUES)
def test_a_wrong_value_in_a_search_file_is_refused(claim: str, refuses_search: Refuses) -> None:
    refuses_search(*WRONG_VALUES[claim])
