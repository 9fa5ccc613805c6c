"""Fixtures: small tasks written on the spot, models of four architectures, and searches over the tasks."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from evomerge import zoo
from evomerge.config.search import SearchConfig
from evomerge.merging.building import load_model
from evomerge.zoo.language import VOCABULARY
from tests.evaluation.material import MEAN, choices, questions
from tests.searches import EVALS, small_search

Rows = list[dict[str, Any]]
SIZES = {"vocab_size": len(VOCABULARY), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture(autouse=True, scope="session")
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Data sets of tests are not left behind in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders: the zoo's base (a Llama), and with its vocabulary a random Qwen2, GPT-2, and Gemma 3, whose layers but
    the last see eight tokens."""
    root = tmp_path_factory.mktemp("architectures")
    torch.manual_seed(0)
    qwen = Qwen2Config(
        **SIZES,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.3,
    )
    gpt = GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    gemma = Gemma3TextConfig(
        **SIZES,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=96,
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        initializer_range=0.3,
    )
    folders = {"llama": zoo.path("base"), **{name: root / name for name in ("qwen2", "gpt2", "gemma3")}}
    Gemma3ForCausalLM(gemma).save_pretrained(folders["gemma3"])
    Qwen2ForCausalLM(qwen).save_pretrained(folders["qwen2"])
    GPT2LMHeadModel(gpt).save_pretrained(folders["gpt2"])
    return folders


@pytest.fixture
def load(models: dict[str, Path]) -> Callable[[str], tuple[Any, Any]]:
    """Loads a model, by its architecture or its name in the zoo, and the zoo's tokenizer."""

    def load(name: str) -> tuple[Any, Any]:
        folder = models.get(name) or zoo.path(name)
        return load_model(folder, torch.float32), AutoTokenizer.from_pretrained(zoo.path("base"))

    return load


@pytest.fixture
def write_task(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Writes a task's YAML and its data below tmp_path; returns its settings with the data files absolute."""

    def write(name: str, splits: dict[str, Rows], **settings: Any) -> dict[str, Any]:
        for split, rows in splits.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{name}_{split}.jsonl").write_text(lines)
        task = {"task": name, "dataset_path": "json", "target_delimiter": ""} | settings
        relative = {split: f"{name}_{split}.jsonl" for split in splits}
        document = task | {"dataset_kwargs": {"data_files": relative}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
        return task | {"dataset_kwargs": {"data_files": {s: str(tmp_path / file) for s, file in relative.items()}}}

    return write


@pytest.fixture
def search_config(tmp_path: Path) -> Callable[..., SearchConfig]:
    """A search over the tasks in tmp_path; objectives are written `task`, `task:metric` or `task:metric:filter`."""

    def make(*objectives: str, **changes: Any) -> SearchConfig:
        parts = [dict(zip(("task", "metric", "filter"), text.split(":"), strict=False)) for text in objectives]
        usual = {"tasks": {"paths": [str(tmp_path)]}, "items": None, "evaluation": {"batch_size": 16}}
        return SearchConfig.model_validate(small_search(**{"objectives": parts, **usual, **changes}))

    return make


@pytest.fixture
def qa_task(write_task):
    """A log-likelihood task with a search, a held-out and a training split."""

    def write(name="qa", count=12, **settings):
        splits = {
            "train": questions(9, seed=1),
            "search": questions(count, seed=2),
            "heldout": questions(count + 4, seed=3),
        }
        defaults = {
            "validation_split": "search",
            "test_split": "heldout",
            "output_type": "loglikelihood",
            "doc_to_text": "<bos> Q {{question}} =",
            "doc_to_target": " {{answer}}",
            "metric_list": [
                {"metric": "acc", **MEAN},
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        }
        return write_task(name, splits, **(defaults | settings))

    return write


@pytest.fixture
def text_task(write_task):
    """A task of texts without prompts."""

    def write(rows, name="text"):
        return write_task(
            name,
            {"search": rows, "heldout": questions(8, seed=2)},
            validation_split="search",
            test_split="heldout",
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{question}}",
            metric_list=[
                {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
            ],
        )

    return write


@pytest.fixture
def choice_task(write_task):
    """A multiple-choice task with templates for options and answer."""

    def write(name="choice", count=25, metrics=("acc", "acc_norm"), **settings):
        defaults = {
            "validation_split": "search",
            "test_split": "heldout",
            "output_type": "multiple_choice",
            "doc_to_text": "<bos> Q {{question}} =",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "{{gold}}",
            "target_delimiter": " ",
            "metric_list": [{"metric": metric, **MEAN} for metric in metrics],
        }
        splits = {"search": choices(count, seed=4), "heldout": choices(count, seed=5)}
        return write_task(name, splits, **(defaults | settings))

    return write


@pytest.fixture
def generation_task(write_task):
    """Two-step sums to be answered by writing; `word` takes the first word written, `digit` the first digit."""

    def write(name="writing", **settings):
        def filters(name, pattern):
            steps = [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]
            return {"name": name, "filter": steps}

        lines = (EVALS / "math_a_words" / "search.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines[:40]]
        defaults = {
            "validation_split": "search",
            "test_split": "heldout",
            "output_type": "generate_until",
            "doc_to_text": "<bos> Q {{question}} =",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 6, "do_sample": False},
            "filter_list": [filters("word", r"(\w+)"), filters("digit", r"(\d)")],
            "metric_list": [{"metric": "exact_match", **MEAN}],
        }
        return write_task(name, {"search": rows[:24], "heldout": rows[24:]}, **(defaults | settings))

    return write
