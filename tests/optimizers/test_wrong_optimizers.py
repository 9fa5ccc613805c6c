"""An optimizer that does not suit its search is refused in one sentence."""

from typing import Any

import pytest

from tests.bad_input import Refuses

WRONG_VALUES: dict[str, tuple[Any, ...]] = {
    "an evolution of paths without any": (
        {"optimizer.name": "path_evolution"},
        "optimizer.name is path_evolution, but the space has no hops",
    ),
    "a greedy soup of weights": (
        {"optimizer.name": "greedy_soup"},
        "optimizer.name is greedy_soup",
        "density, weight fixed",
    ),
    "a greedy soup in stages": (
        {"optimizer": {"name": "greedy_soup", "stages": [{"genes": ["take"]}]}},
        "optimizer.stages are given, but greedy_soup has none",
    ),
    "a greedy soup that does not wait": (
        {"optimizer": {"name": "greedy_soup", "schedule": "async"}},
        "optimizer.schedule is async, but greedy_soup builds each candidate on the one before; use pipelined",
    ),
    "a population too small": (
        {"optimizer.name": "cma_es", "optimizer.population": 3},
        "optimizer.population is 3; cma_es needs at least 4",
    ),
    "no evaluations": (
        {"optimizer.evaluations": 0},
        "optimizer.evaluations is 0; use a value greater than or equal to 1",
    ),
    "half an evaluation": ({"optimizer.evaluations": 1.5}, "optimizer.evaluations is 1.5; use a valid integer"),
    "an unknown optimizer": ({"optimizer.name": "cmaes"}, "optimizer.name is \"cmaes\"; did you mean 'cma_es'?"),
    "an unknown gene in a stage": (
        {"optimizer.stages": [{"genes": ["densty"]}]},
        "stages[0].genes names densty",
        "'density'?",
    ),
    "a fixed gene in a stage": (
        {"space.density.fixed": 1, "optimizer.stages": [{"genes": ["density"]}]},
        "optimizer.stages[0].genes names density",
        "valid names: weight",
    ),
    "a stage without end": (
        {"optimizer.stages": [{"genes": ["weight"]}, {"genes": ["density"]}]},
        "optimizer.stages[0].evaluations is missing",
    ),
    "gradients after evolution": (
        {"optimizer.stages": [{"genes": ["weight"], "evaluations": 4}, {"genes": ["weight"], "name": "learned"}]},
        "optimizer.stages[1].name is learned, which can only come first; move it",
    ),
    "a learned stage with a number of candidates": (
        {"optimizer.stages": [{"genes": ["weight"], "evaluations": 4, "name": "learned"}, {"genes": ["weight"]}]},
        "optimizer.stages[0].evaluations belongs to no learned stage; set learning.steps",
    ),
    "stages of gradients alone": (
        {"optimizer.name": "learned", "optimizer.stages": [{"genes": ["weight"]}]},
        "optimizer.stages are given, but learned has none; make learned the first of the stages",
    ),
    "gradients that do not wait": (
        {"optimizer": {"name": "learned", "schedule": "async"}},
        "optimizer.schedule is async, but gradients are followed step by step; use pipelined",
    ),
    "a learned stage that does not wait": (
        {"optimizer": {"schedule": "async", "stages": [{"genes": ["weight"], "name": "learned"}]}},
        "optimizer.schedule is async, but gradients are followed step by step; use pipelined",
    ),
    "no steps along gradients": (
        {"optimizer": {"name": "learned", "learning": {"steps": 0}}},
        "optimizer.learning.steps is 0, but learned takes at least 1; set it, or use another optimizer",
    ),
    "a negative number of steps": ({"optimizer.learning.steps": -1}, "optimizer.learning.steps is -1; use a value"),
    "a mini-batch of nothing": ({"optimizer.learning.share": 0}, "optimizer.learning.share is 0; use a value greater"),
    "more than all items": ({"optimizer.learning.share": 1.5}, "optimizer.learning.share is 1.5; use a value less"),
    "a step without shards": ({"optimizer.learning.shards": 0}, "optimizer.learning.shards is 0; use a value greater"),
    "a setting of learning misspelled": ({"optimizer.learning.step": 3}, "optimizer.learning.step is not", "'steps'?"),
    "a budget of nothing": ({"optimizer.equivalents": 0}, "optimizer.equivalents is 0; use a value greater than 0"),
    "an end after nothing": ({"optimizer.stop_after": 0}, "optimizer.stop_after is 0; use a value greater"),
    "gradients by what has no derivative": (
        {"optimizer": {"name": "learned"}, "space": {"method": "karcher"}},
        "optimizer asks for learned, but none of its genes has a derivative by the first method; use another",
    ),
    "gradients by choices": (
        {"optimizer": {"name": "learned"}, "space": {"kind": "data_flow", "max_layers": 4}},
        "optimizer asks for learned, but none of its genes has a derivative by the first method; use another",
    ),
    "tensors apart and not apart": (
        {"space": {"layer_granularity": "tensor", "tensor_weights": False}},
        "space: layer_granularity is tensor, but tensor_weights is false; set it to true, or leave it out",
    ),
    "an unknown granularity": ({"space": {"layer_granularity": "tensors"}}, 'space.layer_granularity is "tensors"'),
    "no selection items": (
        {"items.selection": 0},
        "items.selection: it is 0; use a whole number of at least 1, or false",
    ),
    "as many selection items as that": ({"items.selection": True}, "items.selection: it is true; use a whole number"),
    "fewer selection items than none": ({"items.selection": -2}, "items.selection: it is -2; use a whole number"),
}


@pytest.mark.parametrize("claim", WRONG_VALUES)
def test_a_wrong_value_in_a_search_file_is_refused(claim: str, refuses_search: Refuses) -> None:
    refuses_search(*WRONG_VALUES[claim])
