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
    "a population too small": ({"optimizer.population": 3}, "optimizer.population is 3; cma_es needs at least 4"),
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
}


@pytest.mark.parametrize("claim", WRONG_VALUES)
def test_a_wrong_value_in_a_search_file_is_refused(claim: str, refuses_search: Refuses) -> None:
    refuses_search(*WRONG_VALUES[claim])
