"""Tasks drawn by chance: whatever splits, repeats, filters and texts they have, nothing that a search sees is held out,
and every score is lm-eval's own.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from evomerge import zoo
from evomerge.config.search import SearchConfig
from evomerge.errors import InputError
from evomerge.evaluation.harness import Harness
from evomerge.merging.building import load_model
from tests.evaluation.reference import lm_eval_says
from tests.searches import small_search

WORDS = ("tom", "ann", "seven", "copy", "keys")
words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
strange = st.sampled_from(["", " ", "ü", "日本", "\u202etom", "a\tb", "tom  ann", "{{question}}", "%s"])
questions = words | strange
rows = st.fixed_dictionaries(
    {"question": questions, "answer": words, "other": words},
    optional={"id": st.integers(0, 3), "note": st.text(max_size=3)},
)
FILTERS = [
    {"name": "first", "filter": [{"function": "regex", "regex_pattern": "([a-z]+)"}, {"function": "take_first"}]},
    {"name": "whole", "filter": [{"function": "take_first"}]},
]
KINDS: dict[str, dict[str, Any]] = {
    "loglikelihood": {"doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}]},
    "multiple_choice": {
        "doc_to_choice": "{{[answer, other]}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "generate_until": {
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["<eos>"], "max_gen_toks": 4},
    },
}


@st.composite
def tasks(draw: st.DrawFn) -> dict[str, Any]:
    """A task's settings with its rows by split, under `rows`."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    pool = draw(st.lists(rows, min_size=6, max_size=14))
    splits = {name: draw(st.lists(st.sampled_from(pool), min_size=3, max_size=14)) for name in ("one", "two")}
    sides = draw(
        st.sampled_from(
            [
                {"test_split": "one"},
                {"validation_split": "one"},
                {"validation_split": "one", "test_split": "two"},
                {"validation_split": "one", "test_split": "one"},
            ]
        )
    )
    task = {"output_type": kind, "doc_to_text": "Q {{question}} =", "target_delimiter": " ", **KINDS[kind], **sides}
    if kind == "generate_until" and draw(st.booleans()):
        task["filter_list"] = FILTERS
    if draw(st.booleans()):
        task |= {"num_fewshot": 1, "fewshot_split": draw(st.sampled_from(["one", "two"]))}
    return task | {"rows": splits}


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    return load_model(zoo.path("base"), torch.float32), AutoTokenizer.from_pretrained(zoo.path("base"))


def write(drawn: list[dict[str, Any]], folder: Path) -> tuple[SearchConfig, list[dict[str, Any]]]:
    """Tasks as files, a search over all of their metrics, and the tasks with their data files absolute."""
    objectives, written = [], []
    for number, task in enumerate(drawn):
        name, files = f"t{number}", {}
        settings = {key: value for key, value in task.items() if key != "rows"}
        for split, content in task["rows"].items():
            files[split] = str(folder / f"{name}_{split}.jsonl")
            keys = {"question": None, "answer": None, "other": None, "id": 0, "note": ""}  # a column needs one type
            lines = [json.dumps({key: row.get(key, default) for key, default in keys.items()}) for row in content]
            Path(files[split]).write_text("\n".join(lines) + "\n")
        document = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, **settings}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(document))
        written.append(document)
        for metric in settings["metric_list"]:
            names = [each["name"] for each in settings.get("filter_list", [])] or [None]
            objectives += [{"task": name, "metric": metric["metric"], "filter": each} for each in names]
    usual = {"items": {"search_fraction": 0.5}, "evaluation": {"batch_size": 16}}
    search = small_search(objectives=objectives, tasks={"paths": [str(folder)]}, **usual)
    return SearchConfig.model_validate(search), written


def shown(harness: Harness, split: str) -> tuple[set[str], set[str]]:
    """The questions that a split asks, and those of its examples."""
    asked, examples = set(), set()
    for task in harness._splits[split]._tasks:
        for instances in task.documents:
            *before, own = instances[0].args[0].split("Q ")[1:]
            asked.add(" ".join(own.split(" =")[0].split()))
            examples |= {" ".join(each.split(" =")[0].split()) for each in before}
    return asked, examples


def check(drawn: list[dict[str, Any]], folder: Path, model: tuple[Any, Any]) -> bool:
    """Whether the tasks could be searched on; asserts what must hold where they could."""
    config, written = write(drawn, folder)
    harness = Harness(config, *model)
    try:
        seen, held = harness.evaluate("search"), harness.evaluate("heldout")
    except InputError:
        return False
    assert seen.scores.keys() == held.scores.keys() == {objective.name for objective in config.objectives}
    asked, examples = shown(harness, "search")
    heldout, _ = shown(harness, "heldout")
    if len({task["output_type"] for task in drawn}) == 1:  # else two tasks may ask for one answer in two ways
        assert all(_told_apart(drawn, question) for question in heldout & (asked | examples))
    for task, prepared in zip(written, harness._splits["heldout"]._tasks, strict=True):
        if task.get("num_fewshot"):
            continue  # the examples may give way to what is held out, where lm-eval has all
        numbers = [instances[0].doc_id for instances in prepared.documents]
        expected, _ = lm_eval_says(task, *model, samples=numbers)
        for objective in config.objectives:
            if objective.task == task["task"]:
                name = f"{objective.metric},{objective.filter or 'none'}"
                assert held.scores[objective.name] == pytest.approx(expected[name], rel=1e-4), name
    return True


def _told_apart(drawn: list[dict[str, Any]], question: str) -> bool:
    """Whether one question stands there with several answers or options, which makes several items of it."""
    answers = {
        (row["answer"], row["other"])
        for task in drawn
        for content in task["rows"].values()
        for row in content
        if " ".join(row["question"].split()) == question
    }
    return len(answers) > 1


relaxed = settings(
    deadline=None,
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@relaxed
@given(st.lists(tasks(), min_size=1, max_size=2))
def test_drawn_tasks_hold_out_nothing_that_was_seen_and_score_as_lm_eval_does(model, tmp_path_factory, drawn):
    check(drawn, tmp_path_factory.mktemp("drawn"), model)


@pytest.mark.exhaustive
@settings(relaxed, max_examples=400)
@given(st.lists(tasks(), min_size=1, max_size=2))
def test_many_drawn_tasks_do_so_too(model, tmp_path_factory, drawn):
    check(drawn, tmp_path_factory.mktemp("drawn"), model)


@pytest.mark.slow
def test_enough_drawn_tasks_can_be_searched_on(model, tmp_path_factory):
    """Or else the claims above would be about few."""
    found = []

    @settings(relaxed, max_examples=60)
    @given(st.lists(tasks(), min_size=1, max_size=1))
    def draw(drawn):
        found.append(check(drawn, tmp_path_factory.mktemp("drawn"), model))

    draw()
    assert sum(found) >= 10
