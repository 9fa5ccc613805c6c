"""Objectives as tasks know them: metrics, goals and filters."""

import pytest
from torch.nn import functional

from evomerge.config.search import SearchConfig
from evomerge.errors import InputError
from evomerge.evaluation.harness import Harness
from evomerge.evaluation.loading import check_metrics, exam_warnings, load_targets
from tests.evaluation.material import MEAN, check

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


def test_goals_come_from_the_task_unless_the_objective_says_otherwise(qa_task, search_config):
    qa_task()
    objectives = [{"task": "qa"}, {"task": "qa", "metric": "perplexity"}]
    assert [objective.goal for objective in check(search_config(objectives=objectives))] == ["maximize", "minimize"]
    objectives[1]["goal"] = "maximize"
    assert [objective.goal for objective in check(search_config(objectives=objectives))] == ["maximize", "maximize"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objectives": [{"task": "qa"}, {"task": "qa", "metric": "perplexty"}]},
            r"objectives\[1\].metric.*'perplexity'",
        ),
        ({"objectives": [{"task": "qa", "filter": "nine"}]}, r"objectives\[0\].filter.*did you mean 'none'"),
        ({"items": {"search": 13}}, r"items.search asks for 13 items.*only 12"),
        ({"items": {"heldout": 17}}, r"items.heldout asks for 17 items.*only 16"),
    ],
)
def test_what_a_task_does_not_have_is_an_input_error_before_any_model_runs(changes, message, qa_task, search_config):
    qa_task()
    with pytest.raises(InputError, match=message):
        check(search_config("qa", **changes))


def test_a_task_that_lm_eval_cannot_load_is_an_input_error_with_its_file(qa_task, search_config, tmp_path):
    qa_task(doc_to_text="{{no_such_field}}")
    with pytest.raises(InputError, match=rf"{tmp_path / 'qa.yaml'}: lm-eval cannot load task 'qa'"):
        check(search_config("qa"))


def test_a_template_cannot_run_code(qa_task, search_config, tmp_path):
    trap = tmp_path / "trap"
    qa_task(doc_to_text="{{ cycler.__init__.__globals__.os.system('touch TRAP') }}".replace("TRAP", str(trap)))
    with pytest.raises(InputError, match="unsafe"):
        check(search_config("qa"))
    assert not trap.exists()


@pytest.mark.parametrize("extra", [{}, {"process_results": "no function"}])
@pytest.mark.parametrize("how", [{"metric": "accuracy_of_mine"}, {"metric": "exact_match", "hf_evaluate": True}])
def test_a_metric_that_would_be_fetched_and_run_is_refused_unless_allowed(
    how, extra, qa_task, search_config, monkeypatch
):
    import evaluate as library

    fetched = []
    monkeypatch.setattr(library, "load", lambda name: fetched.append(name) or functional)
    qa_task(metric_list=[{**how, **MEAN}], **extra)
    with pytest.raises(InputError, match=rf"metric '{how['metric']}'.*tasks.allow_code"):
        check(search_config(f"qa:{how['metric']}"))
    assert not fetched


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"validation_split": None}, "heldout"),
        ({"test_split": None}, "search"),
        ({}, None),
    ],
)
def test_searching_on_the_items_of_published_scores_is_warned_of(changes, warned, qa_task, search_config):
    qa_task(**changes)
    config = search_config("qa")
    targets = load_targets(config.objectives, config.tasks, config.evaluation)
    assert exam_warnings(targets) == ()  # the files are the user's own
    (task,) = targets["qa"].tasks
    task.config.dataset_path, task.config.dataset_kwargs = "owner/benchmark", None
    found = exam_warnings(targets)
    assert len(found) == (warned is not None)
    if warned is not None:
        assert found[0].startswith(f"objective qa: the search would choose by items of the {warned} split of owner/")


def test_where_no_metric_is_written_the_only_one_of_the_task_is_taken(written, search_config) -> None:
    given = [{"task": "t", "filter": "last"}]
    config = checked(search_config(objectives=given, constraints=[{"task": "t", "retain": 0.5, "filter": "last"}]))
    assert [metric.name for metric in (*config.objectives, *config.constraints)] == ["t:exact_match"] * 2
    named = [{**given[0], "metric": "exact_match"}]
    assert checked(search_config(objectives=named)).objectives == config.objectives


def test_where_no_metric_is_written_and_there_are_several_they_are_listed(qa_task, search_config) -> None:
    qa_task(metric_list=[{"metric": "perplexity"}, {"metric": "likelihood"}])
    with pytest.raises(InputError, match=r"objectives\[0\].metric is missing, .*: perplexity, likelihood\.$"):
        check(search_config(objectives=[{"task": "qa"}]))
