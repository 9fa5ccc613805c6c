"""Scores of the user's own, as tests write them beside a search."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.searches import small_search

FLUENCY = '''
import torch


def fluency(model, tokenizer, split, scale=1.0):
    """One number per item: the mean log-likelihood of its tokens."""
    scores = []
    for item in split.items:
        ids = torch.tensor([tokenizer.encode(item["text"])], device=model.device)
        scores.append(-scale * float(model(input_ids=ids, labels=ids).loss))
    return scores


def size(model, tokenizer, split):
    """One number."""
    return float(model.get_input_embeddings().weight.norm())
'''
WORDS = ("two", "three", "four", "five", "six", "seven", "cups", "coins", "plus", "copy")
ITEMS = [
    {"text": f"copy {first} {second} {third}"} for first in WORDS[:4] for second in WORDS[4:8] for third in WORDS[8:]
]
OWN = {"python": "my_scores:fluency", "items": "items.jsonl"}

WriteOwn = Callable[..., Path]


def own_search(**changes: Any) -> dict[str, Any]:
    """A small search for the base's tasks and for fluency."""
    document = small_search(
        objectives=[{"task": "base_qa"}, OWN],
        items={"search": 8, "selection": 6, "heldout": 10},
        optimizer={"name": "cma_es", "evaluations": 4, "population": 4},
    )
    document["tasks"]["allow_code"] = ["fluency", "size"]
    document["evaluation"] = {"device": "cpu", "dtype": "float32"} | changes.pop("evaluation", {})
    return document | changes


def write_files(folder: Path, source: str = FLUENCY) -> None:
    """The source file and the items beside a search."""
    (folder / "my_scores.py").write_text(source)
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
