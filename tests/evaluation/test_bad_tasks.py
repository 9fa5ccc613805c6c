"""Tasks that cannot be scored are refused in one sentence."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bad_input import VLLM, Refuses
from tests.searches import WriteSearch

TASK = """\
task: mine
dataset_path: json
dataset_kwargs:
  data_files: {search: a.jsonl, heldout: b.jsonl}
validation_split: search
test_split: heldout
output_type: loglikelihood
doc_to_text: "<bos> Q {{question}} ="
doc_to_target: " {{answer}} <eos>"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


ITEMS = '{"question": "copy apples", "answer": "apples"}\n' * 10


WRONG_TASKS: dict[str, tuple[Any, ...]] = {
    "code that nobody allowed": (
        "end",
        "process_docs: !function utils.f\n",
        "runs code (!function utils.f)",
        "tasks.allow_code",
    ),
    "a class of its own": ("end", "class: !function utils.f\n", "tasks.allow_code"),
    "an unclosed bracket": ("end", "  - [\n", "mine.yaml: not valid YAML at line 16"),
    "an include that is not there": ("end", "include: other.yaml\n", "other.yaml", "mine.yaml", "No such file"),
    "an include of itself": ("end", "include: mine.yaml\n", "includes itself"),
    "an unknown key": ("end", "doc_to_txt: x\n", "doc_to_txt is not a known key; did you mean 'doc_to_text'?"),
    "a data file that is not there": ("b.jsonl", "c.jsonl", "data file c.jsonl of task 'mine' is missing"),
    "a split without data": (
        "test_split: heldout",
        "test_split: held",
        "test_split",
        "'held'",
        "did you mean 'heldout'?",
    ),
    "a split for selection without data": (
        "end",
        "metadata: {selection_split: serach}\n",
        "metadata.selection_split of task 'mine' is 'serach', which data_files does not name; did you mean 'search'?",
    ),
    "a field that no item has": ("{{question}}", "{{questoin}}", "'questoin' is undefined"),
    "a broken template": ("{{question}}", "{{question", "mine.yaml: ", "TemplateSyntaxError"),
    "an unknown kind of request": ("output_type: loglikelihood", "output_type: logits", "'logits'", "multiple_choice"),
    "an unknown metric": ("metric: acc", "metric: accz", "metric 'accz'", "did you mean 'acc'?"),
    "an unknown aggregation": ("aggregation: mean", "aggregation: men", "objectives[0].metric is 'acc'", "aggregation"),
    "no data at all": ("dataset_path: json\n", "", "mine.yaml: lm-eval cannot load task 'mine'"),
}


def write_task(folder: Path, text: str, items: str = ITEMS) -> None:
    folder.mkdir()
    (folder / "mine.yaml").write_text(text)
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_text(items)


@pytest.mark.parametrize("claim", WRONG_TASKS)
def test_a_task_that_cannot_be_scored_is_refused(claim: str, tmp_path: Path, refuses_search: Refuses) -> None:
    old, new, *fragments = WRONG_TASKS[claim]
    write_task(tmp_path / "tasks", TASK + new if old == "end" else TASK.replace(old, new))
    refuses_search({"tasks.paths": ["./tasks"], "objectives": [{"task": "mine"}]}, *fragments)


@pytest.mark.parametrize(
    ("items", "fragments"),
    [
        pytest.param("", ("data file a.jsonl of task 'mine' is empty",), id="none"),
        pytest.param(
            ITEMS + "{not json\n",
            ("a.jsonl, line 11: not valid JSON (", "each line holds one object"),
            id="a broken one",
        ),
        pytest.param(ITEMS + "[1]\n", ("a.jsonl, line 11: expected an object",), id="one that is a list"),
        pytest.param(ITEMS[: len(ITEMS) // 2], ("items.search asks for 8 items", "has only 5"), id="too few"),
        pytest.param('{"question": "copy"}\n' * 10, ("mine.yaml: ", "'answer' is undefined"), id="without answers"),
    ],
)
def test_items_that_cannot_be_used_are_refused(
    items: str, fragments: tuple[str, ...], tmp_path: Path, refuses_search: Refuses
) -> None:
    write_task(tmp_path / "tasks", TASK, items)
    refuses_search({"tasks.paths": ["./tasks"], "objectives": [{"task": "mine"}]}, *fragments)


WRITTEN = TASK.replace("output_type: loglikelihood", "output_type: generate_until").replace("acc", "exact_match")


WRONG_FOR_VLLM: dict[str, tuple[Any, ...]] = {
    "texts that are drawn": (
        {"do_sample": True, "temperature": 0.7},
        VLLM,
        "evaluation.backend is vllm, which writes greedily only, but task 'mine' draws its texts",
        "use hf",
    ),
    "an argument of transformers": (
        {"num_beams": 4},
        VLLM,
        "to which num_beams, set by task 'mine', cannot be handed on",
    ),
    "an interpreter that is not there": (
        {},
        VLLM,
        "evaluation.vllm.python is",
        "nowhere/python, which cannot be run (No such file or directory)",
    ),
    "an interpreter without vLLM": (
        {},
        {"backend": "vllm", "vllm": {"python": sys.executable}},
        f"evaluation.vllm.python is {sys.executable}, whose environment has no vLLM; install it there",
    ),
    "another GPU than the first": ({}, VLLM | {"device": "cuda:1"}, "evaluation.device is cuda:1", "use cuda"),
}


@pytest.mark.parametrize("claim", WRONG_FOR_VLLM)
def test_what_vllm_cannot_do_is_refused(claim: str, tmp_path: Path, refuses_search: Refuses) -> None:
    arguments, evaluation, *fragments = WRONG_FOR_VLLM[claim]
    write_task(tmp_path / "tasks", WRITTEN)
    changes = {"evaluation": evaluation | {"generation_kwargs": arguments}}
    refuses_search(
        {"tasks.paths": ["./tasks"], "objectives": [{"task": "mine", "metric": "exact_match"}], **changes}, *fragments
    )


def test_a_base_that_asks_for_what_vllm_has_not_is_refused(
    tiny_models: dict[str, Path], tmp_path: Path, search: WriteSearch, refuses: Refuses
) -> None:
    write_task(tmp_path / "tasks", WRITTEN)
    base = Path(shutil.copytree(tiny_models["base"], tmp_path / "base"))
    (base / "generation_config.json").write_text('{"no_repeat_ngram_size": 3, "temperature": 0.6, "do_sample": true}')
    objectives = [{"task": "mine", "metric": "exact_match"}]
    path = search({"base": "./base", "tasks.paths": ["./tasks"], "objectives": objectives, "evaluation": VLLM})
    refuses("check", path, says=("no_repeat_ngram_size, set by", "base/generation_config.json, cannot be handed on"))
