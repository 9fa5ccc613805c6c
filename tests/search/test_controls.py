import pytest

from evomerge.config.files import load
from evomerge.search.controls import count_controls, essential_controls, further_controls
from evomerge.search.preparation import reopen
from tests.searches import WriteSearch


@pytest.mark.parametrize("asked", [{}, {"one_knob": True}, {"per_model": True}, {"random_search": True}])
def test_controls_are_counted_as_they_are_made(asked: dict[str, bool], search_file: WriteSearch) -> None:
    prepared = reopen(load(search_file(controls=asked)))
    made = essential_controls(prepared.config) + further_controls(prepared.config, prepared.space)
    assert count_controls(prepared.config) == len(made) == len({control.id for control in made})
