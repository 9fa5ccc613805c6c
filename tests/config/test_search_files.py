"""What is no search file, and what no search file may say, is told in one sentence with its place."""

from pathlib import Path
from typing import Any

import pytest

from tests.bad_input import Refuses
from tests.searches import REMOVED

NO_SEARCHES: dict[str, tuple[bytes, str]] = {
    "an empty file": (b"", "got nothing (it is empty)"),
    "nothing but comments": (b"# base: zoo:base\n", "got nothing (it is empty)"),
    "a list": (b"- base\n- models\n", "expected keys and values at the top of the file, got a list"),
    "plain text": (b"hello", "expected keys and values"),
    "an unclosed bracket": (b"base: [\nfoo", "not valid YAML at line 2, column 4"),
    "a tab": (b"base:\n\t- x\n", "not valid YAML at line 2, column 1"),
    "two documents": (b"base: a\n---\nbase: b\n", "another document"),
    "a key given twice": (b"seed: 1\nbase: a\nseed: 2\n", "line 3, column 1 ('seed' is given twice)"),
    "a binary file": (bytes(range(256)), "not text in UTF-8 (at byte 128)"),
    "a zero byte": (b"base: \0", "special characters are not allowed"),
    "another encoding": ("base: zoö".encode("latin-1"), "not text in UTF-8 (at byte 8)"),
    "a tag that would run code": (b"base: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    "a date that is none": (b"base: 2001-13-45\n", "not valid YAML (month must be in 1..12)"),
    "a value that holds itself": (b"base: &a [*a]\n", "base is [[...]]; use a valid string"),
    "ten thousand brackets": (b"base: " + b"[" * 10_000, "not valid YAML"),
}


@pytest.mark.parametrize("claim", NO_SEARCHES)
def test_a_file_that_holds_no_search_is_refused(claim: str, tmp_path: Path, refuses: Refuses) -> None:
    content, fragment = NO_SEARCHES[claim]
    (tmp_path / "search.yaml").write_bytes(content)
    refuses("run", "search.yaml", says=("evomerge: search.yaml: ", fragment))


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_path_without_a_file_is_refused(command: str, tmp_path: Path, refuses: Refuses) -> None:
    refuses(command, "nowhere.yaml", says=("nowhere.yaml: no such file; check the path",))
    refuses(command, tmp_path, says=(f"{tmp_path}: cannot be read (Is a directory)",))
    refuses(command, "x" * 300, says=("cannot be read (File name too long)",))


WRONG_VALUES: dict[str, tuple[Any, ...]] = {
    "what stands for a missing key is named, and not that it is missing": (
        {"objectives": REMOVED, "objective": [{"task": "base_qa"}]},
        "objective is not a known key; did you mean 'objectives'?",
    ),
    "mergekit's name of the base": (
        {"base": REMOVED, "base_model": "zoo:base"},
        "base_model is not a known key; did you mean 'base'?",
    ),
    "mergekit's list of models": (
        {"models": [{"model": "zoo:math", "parameters": {"weight": 1}}]},
        "models: they are listed as in a merge recipe; write NAME: MODEL for each",
    ),
    "mergekit-evolve's list of tasks": (
        {"objectives": REMOVED, "tasks": [{"name": "base_qa", "weight": 1}]},
        "tasks: it is a list, but holds where tasks are found (paths); list the tasks in objectives",
    ),
    "lm-eval's name of a metric": (
        {"objectives.0.metric": "acc,none"},
        "objectives[0].metric: 'acc,none' is a metric with its filter, as lm-eval prints them; write metric: acc.",
    ),
    "lm-eval's name of a filtered metric": (
        {"objectives.0.metric": "exact_match,strict-match"},
        "write metric: exact_match and filter: strict-match",
    ),
    "an unknown key gets the closest one": (
        {"optimiser": {}},
        "optimiser is not a known key; did you mean 'optimizer'?",
    ),
    "so does an unknown key below": (
        {"optimizer.populations": 8},
        "optimizer.populations",
        "did you mean 'population'?",
    ),
    "so does one in a list": ({"objectives.0.metrics": "acc"}, "objectives[0].metrics", "did you mean 'metric'?"),
    "a key that is no text": ({"1": 2}, "[1] is"),
    "no base": ({"base": REMOVED}, "base is required but missing"),
    "an empty block": ({"space": None}, "space is null; write keys and values below it"),
    "a word for weights of rows": (
        {"space.rows": "maybe"},
        'space.rows is "maybe"; use true or false, or write keys and values below it.',
    ),
    "a word for a step behind the merge": (
        {"space.post": {"aim": "maybe"}},
        'space.post.aim is "maybe"; use true or false, or write keys and values below it.',
    ),
    "no models": ({"models": REMOVED}, "models is required but missing"),
    "an objective of nothing": ({"objectives.0": {}}, "objectives[0].task is required but missing"),
    "an empty list of models": ({"models": {}}, "models is {}; give at least one"),
    "one model in place of several": ({"models": "zoo:math"}, 'models is "zoo:math"; write keys and values'),
    "two models of one name": ({"models": ["zoo:math", "./math"]}, "two of them would be called math"),
    "a model with a blank in its name": ({"models": {"a b": "zoo:math"}}, 'models.a b is "a b"; use letters'),
    "a model named like a control": ({"models": {"base": "zoo:math"}}, "models.base", "choose another"),
    "no objectives": ({"objectives": []}, "objectives is []; give at least one"),
    "an objective without its key": (
        {"objectives": ["base_qa"]},
        'objectives[0]: "base_qa" is only a name; write {task: base_qa}',
    ),
    "one path in place of several": ({"tasks.paths": "../evals"}, 'tasks.paths is "../evals"; write a list'),
    "a negative seed": ({"seed": -1}, "seed is -1; use a value greater than or equal to 0"),
}


@pytest.mark.parametrize("claim", WRONG_VALUES)
def test_a_wrong_value_in_a_search_file_is_refused(claim: str, refuses_search: Refuses) -> None:
    refuses_search(*WRONG_VALUES[claim])


def test_a_folder_is_no_file_of_texts(tmp_path: Path, refuses_search: Any) -> None:
    (tmp_path / "texts").mkdir()
    for texts in ("texts", {"first": "texts"}):
        refuses_search({"space.method": "fisher", "statistics.texts": texts}, f"there is no file {tmp_path / 'texts'}")


def test_a_value_that_may_have_several_forms_is_refused_with_all_of_them(refuses_search: Any) -> None:
    refuses_search({"space.tensor_weights": "maybe"}, 'is "maybe"; use true or false, or valid names: auto.')
