"""Where a search is, and how fast it goes, in words."""

import pytest

from evomerge.candidate import Candidate
from evomerge.config.running import OptimizerConfig
from evomerge.recipe import single
from evomerge.reports.progress import clock, pace_of, phase


def generations(*sizes: int, learned: int = 0) -> list[Candidate]:
    """Search candidates: some that gradients have led to, then generations of the given sizes."""
    recipe = single("zoo:math")
    found = [Candidate(f"l{step:04d}", "search", 0, step, recipe) for step in range(learned)]
    for number, size in enumerate(sizes, learned):
        found += [Candidate(f"g{number:04d}-{index:02d}", "search", number, index, recipe) for index in range(size)]
    return found


def test_without_stages_the_phase_is_the_optimizer_and_the_generation() -> None:
    optimizer = OptimizerConfig(name="cma_es")
    assert phase([], 0, optimizer) == ""
    assert phase(generations(4, 4, 2), 0, optimizer) == "cma_es, generation 2"


def test_steps_along_gradients_are_a_stage_until_another_candidate_comes() -> None:
    stages = [{"name": "learned", "genes": ["weight"]}, {"genes": ["density"]}]
    optimizer = OptimizerConfig.model_validate({"name": "group_evolution", "stages": stages})
    assert phase([], 7, optimizer) == "stage 1 of 2, learned, step 7"
    assert phase(generations(learned=2), 20, optimizer) == "stage 1 of 2, learned, step 20"
    assert phase(generations(2, 1, learned=2), 20, optimizer) == "stage 2 of 2, group_evolution, generation 3"


@pytest.mark.parametrize(("sizes", "stage"), [((4, 4), 1), ((4, 4, 1), 2), ((4, 4, 4, 4, 1), 3)])
def test_a_stage_ends_with_the_generation_that_completes_its_evaluations(sizes: tuple[int, ...], stage: int) -> None:
    stages = [{"genes": ["weight"], "evaluations": 6}, {"genes": ["density"], "evaluations": 8}, {"genes": ["weight"]}]
    optimizer = OptimizerConfig.model_validate({"name": "cma_es", "stages": stages})
    assert phase(generations(*sizes), 0, optimizer) == f"stage {stage} of 3, cma_es, generation {len(sizes) - 1}"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_times_are_shown_as_on_a_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_a_slow_search_is_counted_by_the_hour() -> None:
    assert pace_of([0.0, 1.0, 2.0], 60).phrase == "60/min, 1:00 left"
    assert pace_of([0.0, 120.0], 40).phrase == "30/h, 1:20:00 left"
