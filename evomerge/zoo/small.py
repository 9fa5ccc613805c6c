"""A small search over the embedded models, with a task of its own, for where no search file is at hand."""

from pathlib import Path

import yaml

from evomerge.zoo import evals

_NAME = "base_qa"


def write_search(folder: Path) -> Path:
    """Writes the search with its task to a folder, and returns the search file."""
    tasks = folder / "tasks"
    tasks.mkdir(parents=True)
    for part in ("search", "heldout"):
        (tasks / f"{part}.jsonl").write_text(evals.lines(_NAME, part), encoding="utf-8")
    (tasks / f"{_NAME}.yaml").write_text(yaml.safe_dump(_TASK), encoding="utf-8")
    search = folder / "search.yaml"
    search.write_text(yaml.safe_dump(_SEARCH | {"tasks": {"paths": [str(tasks)]}}), encoding="utf-8")
    return search


_TASK = {
    "task": _NAME,
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"search": "search.jsonl", "heldout": "heldout.jsonl"}},
    "validation_split": "search",
    "test_split": "heldout",
    "output_type": "loglikelihood",
    "doc_to_text": "<bos> Q {{question}} =",
    "doc_to_target": " {{answer}} <eos>",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
_SEARCH = {
    "base": "zoo:base",
    "models": {"math": "zoo:math", "lang": "zoo:lang"},
    "objectives": [{"task": _NAME}],
    "items": {"search": 40, "heldout": 40},
    "space": {"method": "dare_ties"},
    "optimizer": {"name": "random_search", "evaluations": 8, "population": 4},
    "workers": {"pool": "local"},
}
