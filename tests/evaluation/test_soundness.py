"""Tasks whose items cannot be scored in a way that means something are told before any model runs."""

from typing import Any

import pytest
import yaml

from evomerge.errors import InputError
from evomerge.evaluation.items import Division
from evomerge.evaluation.loading import distinct_tasks, load_targets
from evomerge.evaluation.soundness import check

ROWS = [
    {"question": f"copy tom {word}", "answer": word, "gold": n % 2, "options": [word, "ann"]}
    for n, word in enumerate(["one", "two", "three", "four", "five", "six", "seven", "eight"])
]
ONE = {"output_type": "loglikelihood", "doc_to_text": "Q {{question}}", "doc_to_target": " {{answer}}"}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Q {{question}}",
    "doc_to_choice": "options",
    "doc_to_target": "gold",
}
WRITTEN = {"output_type": "generate_until", "doc_to_text": "Q {{question}}", "doc_to_target": "{{answer}}"}


@pytest.fixture
def warnings(write_task, search_config):
    """The warnings about a task, given its rows and settings."""

    def find(rows: list[dict[str, Any]], **settings: Any) -> list[str]:
        metric = "exact_match" if settings["output_type"] == "generate_until" else "acc"
        write_task("t", {"test": rows}, test_split="test", metric_list=[{"metric": metric}], **settings)
        config = search_config("t" if metric == "acc" else f"t:{metric}")
        tasks = distinct_tasks(load_targets(config.objectives, config.tasks, config.evaluation))
        return list(check(tasks, Division(tasks, config.items), config.splits))

    return find


@pytest.mark.parametrize("settings", [ONE, CHOICE, WRITTEN])
def test_a_sound_task_is_not_warned_of(settings, warnings) -> None:
    assert warnings(ROWS, **settings) == []


@pytest.mark.parametrize(
    "settings",
    [
        ONE | {"doc_to_text": ""},  # everything is in the answer
        CHOICE | {"doc_to_text": ""},  # everything is in the options
        CHOICE | {"doc_to_text": "gold", "doc_to_target": "question"},  # the options are the questions
        CHOICE | {"doc_to_target": 0},
        CHOICE | {"doc_to_choice": ["one", "two"], "doc_to_target": "one"},
    ],
)
def test_tasks_that_ask_in_other_ways_are_sound_too(settings, warnings) -> None:
    assert warnings(ROWS, **settings) == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (WRITTEN | {"doc_to_target": "answr"}, "doc_to_target is 'answr', which no document has as a field.*'answer'"),
        (WRITTEN | {"doc_to_text": "questio"}, "doc_to_text is 'questio', which no document has as a field"),
        (CHOICE | {"doc_to_target": 5}, "first document that cannot be asked .*: its answer is none of its options"),
        (CHOICE | {"doc_to_target": -100}, "first document that cannot be asked .*: its answer is none of its options"),
        (CHOICE | {"doc_to_target": "{{question}}"}, r"all 4 search items .*none of the options .item \d: options"),
        (WRITTEN | {"doc_to_target": "{{''}}"}, "all 4 search items have an empty answer"),
        (WRITTEN | {"doc_to_text": "{{''}}"}, "all 4 search items have an empty question"),
    ],
)
def test_a_task_that_can_never_be_scored_is_refused(settings, says, warnings) -> None:
    with pytest.raises(InputError, match=says):
        warnings(ROWS, **settings)


def test_a_template_that_names_no_field_is_refused_with_its_file(warnings) -> None:
    with pytest.raises(InputError, match=r"lm-eval cannot load task 't'.*qestion"):
        warnings(ROWS, **ONE | {"doc_to_text": "{{qestion}}"})


@pytest.mark.parametrize(
    ("settings", "change", "says"),
    [
        (WRITTEN, {"answer": " "}, "items have an empty answer (item 1: the question is 'Q copy tom two')"),
        (
            CHOICE,
            {"gold": 7},
            "items have an answer that is none of the options (item 1: options ['two', 'ann'], answer 7)",
        ),
        (CHOICE, {"options": ["ann", "ann"]}, "items have the same option twice"),
        (CHOICE, {"options": ["ann", ""]}, "items have an empty option"),
        (WRITTEN, {"question": "copy tom three", "answer": "three"}, "stand there more than once"),
    ],
)
def test_some_items_that_mean_nothing_are_warned_of_with_an_example(settings, change, says, warnings) -> None:
    found = warnings([ROWS[0], ROWS[1] | change, *ROWS[2:]], **settings)
    assert any(says in warning for warning in found), found


def test_a_task_without_documents_is_refused_with_its_file(search_config, tmp_path) -> None:
    (tmp_path / "t.csv").write_text("question,answer\n")
    files = {"test": "t.csv"}
    task = {"task": "t", "dataset_path": "csv", "dataset_kwargs": {"data_files": files}, "test_split": "test", **ONE}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(task | {"metric_list": [{"metric": "acc"}]}))
    config = search_config("t")
    with pytest.raises(InputError, match=rf"{tmp_path / 't.yaml'}: task 't' has no documents in a split"):
        load_targets(config.objectives, config.tasks, config.evaluation)
