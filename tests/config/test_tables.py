"""The tables of what a search file can name: every row can be made, and the config takes what stands in them."""

from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import ValidationError

from evomerge.config.search import SearchConfig
from evomerge.config.spaces import ParameterSpaceConfig, SpaceSettings
from evomerge.config.tables import (
    COSTS,
    OPTIMIZERS,
    POOLS,
    SPACES,
    CostRow,
    Maker,
    OptimizerRow,
    PoolRow,
    SpaceRow,
    imported,
)
from tests.searches import put, small_search

COST = [{"task": "base_qa"}, {"cost": "layers"}]
STAGES = [{"genes": ["weight"], "evaluations": 4}, {"genes": ["weight"]}]
# where a name of a table stands in a search file, and what else that name may be
PLACES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "space.kind": (SPACES, []),
    "optimizer.name": (OPTIMIZERS, ["auto"]),
    "optimizer.stages.0.name": (OPTIMIZERS, []),
    "objectives.1.cost": (COSTS, []),
    "workers.pool": (POOLS, []),
}
BASES: dict[str, Any] = {"optimizer.stages.0.name": {"optimizer": {"stages": STAGES}}}
EVERY_PLACE = pytest.mark.parametrize("place", PLACES)


class OddSettings(SpaceSettings):
    """Settings of a space that only these tests have."""

    kind: Literal["odd"] = "odd"
    most: int = 3


def of_no_kind(*_: Any) -> None:
    return


ROWS: dict[str, Any] = {
    "space.kind": SpaceRow("an odd one", "nobody's", OddSettings, of_no_kind, of_no_kind),
    "optimizer.name": OptimizerRow(of_no_kind, lambda _: 3),
    "optimizer.stages.0.name": OptimizerRow(of_no_kind, lambda _: 3),
    "objectives.1.cost": CostRow(of_no_kind),
    "workers.pool": PoolRow(of_no_kind),
}


def document(place: str, name: str) -> dict[str, Any]:
    """A search file with a name at its place."""
    document = small_search(**{"objectives": [dict(each) for each in COST], "space": {}} | BASES.get(place, {}))
    if place.startswith("optimizer.stages"):
        document["optimizer"] = {"stages": [dict(stage) for stage in STAGES]}
        if name in OPTIMIZERS and OPTIMIZERS[name].gradients:  # whose stage says how many steps it takes
            del document["optimizer"]["stages"][0]["evaluations"]
    if place.startswith("optimizer"):
        document["optimizer"].pop("learning", None)
    put(document, place, name)
    return document


def makers() -> Iterator[tuple[str, Maker]]:
    """Every maker of every row, with what it is called."""
    for table in (SPACES, OPTIMIZERS, COSTS, POOLS):
        for name, row in table.items():
            for field in ("make", "genes", "measure", "check"):
                maker = getattr(row, field, None)
                if maker is not None:
                    yield f"{name}.{field}", maker


@pytest.mark.parametrize(("maker"), [pytest.param(maker, id=name) for name, maker in makers()])
def test_every_rows_maker_can_be_imported_by_its_name(maker: Maker) -> None:
    assert isinstance(maker, str)  # else reading a search file would have imported it
    made = imported(maker)
    assert callable(made)
    assert f"{made.__module__}:{made.__name__}" == maker


def test_a_maker_that_is_a_function_is_taken_as_it_is() -> None:
    assert imported(of_no_kind) is of_no_kind


@pytest.mark.parametrize("kind", SPACES)
def test_the_settings_of_a_space_say_its_kind(kind: str) -> None:
    assert SPACES[kind].settings.model_fields["kind"].default == kind


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("genes", [1, 2, 30, 1000])
def test_the_usual_generation_is_no_smaller_than_the_least(name: str, genes: int) -> None:
    row = OPTIMIZERS[name]
    assert row.population(genes) >= row.smallest >= 1


def accepted(place: str) -> list[str]:
    """The names that a place takes: all of its table, but for stages of an optimizer that has none."""
    table, besides = PLACES[place]
    stage = place == "optimizer.stages.0.name"
    return [*besides, *(name for name, row in table.items() if not (stage and row.sequential))]


@EVERY_PLACE
def test_every_name_of_a_table_is_accepted_at_its_place(place: str) -> None:
    for name in accepted(place):
        dumped = SearchConfig.model_validate(document(place, name)).model_dump(mode="json", by_alias=True)
        for part in place.split("."):
            dumped = dumped[int(part)] if part.isdigit() else dumped[part]
        assert dumped == name


@EVERY_PLACE
def test_an_unknown_name_is_refused_at_its_place_and_the_known_ones_are_listed_in_order(place: str) -> None:
    with pytest.raises(ValidationError) as refused:
        SearchConfig.model_validate(document(place, "unheard_of"))
    [problem] = refused.value.errors()
    assert ".".join(map(str, problem["loc"])) == place
    assert problem["type"] == "literal_error"
    assert problem["ctx"]["expected"] == ", ".join(f"'{name}'" for name in accepted(place))


def test_an_optimizer_that_builds_on_the_scores_before_is_no_stage() -> None:
    sequential = [name for name, row in OPTIMIZERS.items() if row.sequential]
    assert sequential
    for name in sequential:
        with pytest.raises(ValidationError, match="Input should be 'learned', 'cma_es'"):
            SearchConfig.model_validate(document("optimizer.stages.0.name", name))


@EVERY_PLACE
def test_a_row_that_is_added_at_run_time_is_accepted_and_listed_until_it_goes(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as added:
        added.setitem(PLACES[place][0], "odd", ROWS[place])
        before = SearchConfig.model_validate(document(place, "odd"))
        again = SearchConfig.model_validate(before.model_dump(mode="json", by_alias=True))
        assert again == before
        with pytest.raises(ValidationError, match="'odd'"):
            SearchConfig.model_validate(document(place, "unheard_of"))
    with pytest.raises(ValidationError):
        SearchConfig.model_validate(document(place, "odd"))


def test_the_settings_of_an_added_space_are_read_and_written_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPACES, "odd", ROWS["space.kind"])
    config = SearchConfig.model_validate(small_search(space={"kind": "odd", "most": 5}))
    assert config.space == OddSettings(most=5)
    assert config.model_dump(mode="json")["space"]["most"] == 5


def test_a_space_that_does_not_say_its_kind_is_the_parameter_space() -> None:
    config = SearchConfig.model_validate(small_search(space={"layer_granularity": 2}))
    assert config.space == ParameterSpaceConfig(layer_granularity=2)


@pytest.mark.parametrize("kind", [3, None, ["parameter"], {"kind": "parameter"}])
def test_a_kind_that_is_no_name_is_refused_like_an_unknown_one(kind: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        SearchConfig.model_validate(small_search(space={"kind": kind}))
    assert [(problem["loc"], problem["type"]) for problem in refused.value.errors()] == [
        (("space", "kind"), "literal_error")
    ]


def test_what_follows_gradients_is_no_optimizer_that_is_asked_and_told() -> None:
    followers = [name for name, row in OPTIMIZERS.items() if row.gradients]
    assert followers == ["learned"]
    for name, row in OPTIMIZERS.items():
        made = imported(row.make)
        answers = isinstance(made, type) and not (hasattr(made, "ask") and hasattr(made, "tell"))
        assert answers == (name in followers)
