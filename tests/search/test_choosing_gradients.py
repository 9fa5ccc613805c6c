"""What `optimizer.name: auto` stands for: gradients first where tasks and method allow it, else evolution alone."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.config.files import load
from evomerge.config.tables import LEARNED
from evomerge.errors import InputError
from evomerge.search.preparation import Prepared, prepare
from tests.searches import EVALS, WriteSearch

NO_REFERENCE = {  # an answer that its own filter reads as nothing
    "task": "read_as_nothing",
    "dataset_path": "json",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "test_split": "test",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "filter_list": [
        {
            "name": "strict",
            "filter": [{"function": "regex", "regex_pattern": "The answer is (\\d+)"}, {"function": "take_first"}],
        }
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def auto(write: WriteSearch, optimizer: dict[str, Any] | None = None, **changes: Any) -> Prepared:
    settings = {"evaluations": 100, "learning": {"steps": 60}} | (optimizer or {})
    return prepare(load(write(**{"space": {"layer_granularity": 3}, "optimizer": settings, **changes})))


def test_on_tasks_with_reference_answers_it_follows_gradients_by_tensor_and_then_evolves_factors(
    search_file: WriteSearch,
) -> None:
    prepared = auto(search_file)
    optimizer, space = prepared.config.optimizer, prepared.config.space
    assert [stage.name for stage in optimizer.stages] == [LEARNED, "group_evolution"]
    assert [stage.scaled for stage in optimizer.stages] == [False, True]
    assert optimizer.stages[0].genes == ("weight",)
    assert set(optimizer.stages[1].genes) == {"weight", "density"}
    assert space.tensor_weights is True
    weights = [gene for gene in prepared.space.genes if gene.kind == "weight"]
    assert len(weights) == 2 * len(prepared.models.table)
    assert not prepared.warnings


@pytest.mark.parametrize(("evaluations", "steps"), [(100, 60), (40, 28), (20, 14), (14, None)])
def test_gradients_take_at_most_six_tenths_of_the_budget_and_are_left_out_where_that_is_too_little(
    search_file: WriteSearch, evaluations: int, steps: int | None
) -> None:
    config = auto(search_file, {"evaluations": evaluations}).config
    assert config.optimizer.follows_gradients == (steps is not None)
    if steps is None:
        assert not config.space.merging.by_tensor
        assert not config.optimizer.stages
    else:
        assert config.optimizer.learning.steps == steps


def test_with_0_steps_or_an_asynchronous_schedule_or_stages_of_its_own_it_follows_none(
    search_file: WriteSearch,
) -> None:
    own = {"stages": [{"genes": ["weight"]}]}
    for optimizer in ({"learning": {"steps": 0}}, {"schedule": "async"}, own):
        prepared = auto(search_file, optimizer)
        assert not prepared.config.optimizer.follows_gradients
        assert prepared.config.optimizer.name == "group_evolution"
        assert prepared.config.items.selection is None
        assert not prepared.warnings


def test_weights_by_tensor_are_left_out_where_the_config_says_so(search_file: WriteSearch) -> None:
    prepared = auto(search_file, space={"layer_granularity": 3, "tensor_weights": False})
    assert prepared.config.optimizer.follows_gradients
    assert prepared.config.space.tensor_weights is False
    assert {gene.group for gene in prepared.space.genes} >= {"layers_0-2", "layers_3-5"}


def test_where_no_answer_satisfies_its_own_metric_it_evolves_alone_and_says_why(
    search_file: WriteSearch, tmp_path: Path
) -> None:
    lines = [f'{{"question": "{number} + 1?", "answer": "{number + 1}"}}' for number in range(80)]
    (tmp_path / "items.jsonl").write_text("\n".join(lines) + "\n")
    task = NO_REFERENCE | {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}}}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    objectives = [{"task": "base_qa"}, {"task": "read_as_nothing", "metric": "exact_match"}]
    prepared = auto(search_file, objectives=objectives, tasks={"paths": [str(EVALS), str(tmp_path)]})
    assert not prepared.config.optimizer.follows_gradients
    assert not prepared.config.space.merging.by_tensor
    assert prepared.config.items.selection is None
    [warning] = [text for text in prepared.warnings if "gradients" in text]
    assert warning == (
        "gradients cannot be followed, since read_as_nothing:exact_match has no answer that its own metric would score "
        "best; evolution works alone."
    )
    kept = [{"task": "base_qa", "retain": 0.9, "of": "base"}]
    paths = {"paths": [str(EVALS), str(tmp_path)]}
    for loss in ("entropy", "activations"):
        without = auto(search_file, {"learning": {"loss": loss}}, objectives=objectives, tasks=paths, constraints=kept)
        assert without.config.optimizer.follows_gradients
        assert [text for text in without.warnings if "gradients" in text] == [
            f"constraints do not steer steps along gradients, since optimizer.learning.loss is {loss}."
        ]


def test_a_method_without_derivatives_or_a_path_is_evolved_without_a_word(search_file: WriteSearch) -> None:
    for space in ({"method": "karcher"}, {"kind": "data_flow", "max_layers": 8}):
        prepared = auto(search_file, space=space)
        assert not prepared.config.optimizer.follows_gradients
        assert not [text for text in prepared.warnings if "gradients" in text]


def test_selection_items_are_chosen_where_there_are_enough_and_a_search_then_ends_early(
    search_file: WriteSearch,
) -> None:
    prepared = auto(search_file, items={"search": 60, "heldout": 24})
    selection = prepared.config.items.selection
    assert isinstance(selection, int)
    assert selection >= 20
    assert prepared.config.optimizer.stop_after == 80
    assert prepared.config.splits == ("search", "selection", "heldout")
    kept = auto(search_file, {"stop_after": 30}, items={"search": 60, "heldout": 24, "selection": 25})
    assert (kept.config.items.selection, kept.config.optimizer.stop_after) == (25, 30)


def test_selection_items_are_not_chosen_where_the_config_says_false(search_file: WriteSearch) -> None:
    prepared = auto(search_file, items={"search": 60, "heldout": 24, "selection": False})
    assert prepared.config.optimizer.follows_gradients
    assert prepared.config.items.selection is False
    assert prepared.config.optimizer.stop_after is None
    assert prepared.config.splits == ("search", "heldout")
    again = prepare(load(search_file("again.yaml", items={"search": 24, "heldout": 24, "selection": False})))
    assert again.config.splits == ("search", "heldout")


def test_the_resolved_config_can_be_read_again_and_stays_as_it_is(search_file: WriteSearch, tmp_path: Path) -> None:
    resolved = auto(search_file).config
    again = tmp_path / "resolved.yaml"
    again.write_text(resolved.to_yaml())
    assert load(again) == resolved
    assert prepare(load(again)).config.optimizer == resolved.optimizer


def test_weights_by_tensor_that_a_search_file_asks_for_stay_where_gradients_cannot_be_followed(
    search_file: WriteSearch,
) -> None:
    wanted = {"layer_granularity": 3, "tensor_weights": True}
    prepared = auto(search_file, {"learning": {"steps": 0}}, space=wanted)
    assert prepared.config.space.merging.by_tensor
    without = auto(search_file, space=wanted | {"method": ["model_stock", "ties"], "weight": {"fixed": 0.5}})
    assert not without.config.optimizer.follows_gradients
    assert without.config.space.merging.by_tensor


@pytest.mark.parametrize(("kind", "own"), [("data_flow", {"scale": {"low": 0.5}}), ("hybrid", {})])
def test_layers_are_not_compared_where_a_merge_has_others_than_its_sources(
    search_file: WriteSearch, kind: str, own: dict[str, Any]
) -> None:
    optimizer = {"name": "learned", "learning": {"loss": "activations"}}
    with pytest.raises(InputError) as refused:
        auto(search_file, optimizer, space={"kind": kind, **own})
    assert str(refused.value) == (
        f"optimizer asks for learned, but optimizer.learning.loss is activations, and with space.kind {kind} a merge "
        "has other layers than its sources; use another optimizer, or auto."
    )


def test_layers_are_not_compared_where_only_costs_are_objectives(search_file: WriteSearch) -> None:
    optimizer = {"name": "learned", "learning": {"loss": "activations"}}
    with pytest.raises(InputError, match="no objective has items that could be read; use another optimizer, or auto"):
        auto(search_file, optimizer, objectives=[{"cost": "parameters", "weight": 1}])


@pytest.mark.parametrize(("evaluations", "steps"), [(100, 60), (40, 24), (16, None)])
def test_reading_the_models_takes_its_part_of_the_budget(
    search_file: WriteSearch, evaluations: int, steps: int | None
) -> None:
    optimizer = {"evaluations": evaluations, "learning": {"loss": "activations"}}
    config = auto(search_file, optimizer).config
    assert config.optimizer.follows_gradients == (steps is not None)
    assert steps is None or config.optimizer.learning.steps == steps
