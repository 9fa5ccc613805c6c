"""Objectives as tasks know them: metrics, goals and filters."""

import pytest

from evomerge.config.search import SearchConfig
from evomerge.errors import InputError
from evomerge.evaluation.harness import Harness
from evomerge.evaluation.loading import check_metrics, load_targets

ROWS = [
    {"question": f"copy tom {word}", "answer": word} for word in ["one", "two", "three", "four", "five", "six", "seven"]
]
FILTERS = [
    {"name": "strict", "filter": [{"function": "regex", "regex_pattern": "^([a-z]+)"}, {"function": "take_first"}]},
    {
        "name": "last",
        "filter": [{"function": "regex", "regex_pattern": "([a-z]+)", "group_select": -1}, {"function": "take_first"}],
    },
]


@pytest.fixture
def written(write_task):
    """A task of written answers with two filters."""
    return write_task(
        "t",
        {"one": ROWS},
        test_split="one",
        output_type="generate_until",
        doc_to_text="<bos> Q {{question}} =",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["<eos>"], "max_gen_toks": 8},
        filter_list=FILTERS,
        metric_list=[{"metric": "exact_match"}],
    )


def checked(config: SearchConfig) -> SearchConfig:
    return check_metrics(config, load_targets(config.measured, config.tasks, config.evaluation))


def test_two_filters_of_one_metric_are_two_objectives_each_with_its_own_score(written, search_config, load) -> None:
    both = search_config("t:exact_match:strict", "t:exact_match:last")
    scores = Harness(both, *load("base")).evaluate("search").scores
    alone = {
        name: Harness(search_config(f"t:exact_match:{name}"), *load("base")).evaluate("search").scores["t:exact_match"]
        for name in ("strict", "last")
    }
    assert scores == {f"t:exact_match:{name}": score for name, score in alone.items()}
    assert len(set(scores.values())) == 2


def test_a_filter_is_named_only_where_a_search_measures_by_several(search_config) -> None:
    one, two = search_config("t:exact_match:strict"), search_config("t:exact_match:strict", "t:exact_match")
    assert [objective.name for objective in one.objectives] == ["t:exact_match"]
    assert [objective.name for objective in two.objectives] == ["t:exact_match:strict", "t:exact_match"]


def test_names_with_filters_outlive_a_frozen_file_and_a_pickle(written, search_config) -> None:
    import pickle

    constraint = {"task": "t", "metric": "exact_match", "filter": "last", "retain": 0.5}
    config = checked(search_config("t:exact_match:strict", constraints=[constraint]))
    names = ["t:exact_match:strict", "t:exact_match:last"]
    assert [metric.name for metric in config.measured] == names
    again = SearchConfig.model_validate(config.model_dump(mode="json", by_alias=True))
    for copy in (again, pickle.loads(pickle.dumps(config)), config.model_copy(update={"seed": 3})):
        assert [metric.name for metric in copy.measured] == names


def test_an_objective_without_a_filter_and_one_with_the_first_are_the_same(written, search_config) -> None:
    with pytest.raises(InputError, match=r"objectives\[1\].filter is .strict., and that of objectives\[0\] is"):
        checked(search_config("t:exact_match", "t:exact_match:strict"))
