"""The cost of texts: how many tokens a model writes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evomerge import zoo
from evomerge.candidate import Shard, Subset
from evomerge.config import files
from evomerge.config.search import SearchConfig
from evomerge.errors import InputError
from evomerge.evaluation.costs import tokens
from evomerge.recipe import single
from evomerge.search.preparation import prepare
from evomerge.workers.worker import Worker
from tests.conftest import REPOSITORY
from tests.searches import small_search

TASKS = REPOSITORY / "examples" / "written_answers" / "tasks"
COST = {"cost": "tokens", "max": 8}


def config(folder: Path, **changes: Any) -> SearchConfig:
    written = {
        "tasks": {"paths": [str(TASKS)]},
        "objectives": [{"task": "written_sums", "metric": "exact_match"}, COST],
        "items": {"search": 20, "heldout": 20},
        "evaluation": {"device": "cpu", "dtype": "float32", "batch_size": 7},
    }
    (folder / "search.yaml").write_text(yaml.safe_dump(small_search(**written | changes)))
    return files.load(folder / "search.yaml")


def written_alone(prompts: list[str]) -> list[int]:
    """How many tokens `zoo:math` writes to each prompt, one at a time, up to where the task stops it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(zoo.path("math"))
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("base"))
    counts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.no_grad():
            text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0]
        new = text[ids.shape[1] :].tolist()
        end = new.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in new else len(new)
        counts.append(end)
    return counts


def test_the_cost_is_the_mean_of_what_is_written_to_each_item(tmp_path: Path) -> None:
    worker = Worker(config(tmp_path))
    evaluation = worker.evaluate(single("zoo:math"), "search")
    documents = worker._harness._splits["search"]._tasks[0].documents
    counts = written_alone([instances[0].args[0] for instances in documents])
    assert evaluation.outcomes["tokens"].values.tolist() == counts
    assert evaluation.scores is not None
    assert evaluation.scores["tokens"] == pytest.approx(sum(counts) / len(counts))


def test_shards_and_batches_change_no_cost_and_a_subset_costs_what_its_items_do(tmp_path: Path) -> None:
    worker, recipe = Worker(config(tmp_path)), single("zoo:lang")
    whole = worker.evaluate(recipe, "search")
    parts = [worker.evaluate_shard(recipe, "search", None, Shard(number, 3)) for number in range(3)]
    assert worker.join("search", None, parts).scores == whole.scores  # type: ignore[arg-type]
    alone = Worker(config(tmp_path, evaluation={"device": "cpu", "dtype": "float32", "batch_size": 1}))
    assert alone.evaluate(recipe, "search").outcomes["tokens"] == whole.outcomes["tokens"]
    some = worker.evaluate(recipe, "search", Subset(3, 0.4)).outcomes["tokens"]
    assert some.values.tolist() == whole.outcomes["tokens"].values[some.places].tolist()
    assert some.count == 8


def test_all_texts_of_an_item_count() -> None:
    assert tokens(["a b", "a b c d"], str.split) == 3


def test_a_search_in_which_nothing_is_written_has_no_such_cost(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"objectives\[1\].cost is tokens, but no task .* has texts written"):
        prepare(config(tmp_path, tasks={"paths": [str(REPOSITORY / "evals")]}, objectives=[{"task": "base_qa"}, COST]))
