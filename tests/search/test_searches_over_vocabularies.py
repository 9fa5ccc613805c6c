"""Searches over models with other vocabularies: what they score, interrupted, resumed, exported and merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from evomerge import zoo
from evomerge.config.files import load
from evomerge.diagnosis.diagnose import diagnose
from evomerge.errors import InputError
from evomerge.events import Evaluated, Event
from evomerge.runs import directory as runs
from evomerge.search.preparation import prepare, prepare_file, summarize
from tests.commands import content, evomerge
from tests.searches import small_search
from tests.stopping import Stop
from tests.vocabularies import renumbered, words_of

SPACES = {
    "weights": {"method": ["dare_ties", "slerp", "linear"], "participate": True},
    "layers": {"kind": "data_flow", "form": "path", "embeddings": "free", "head": "free"},
    "both": {"kind": "hybrid", "parameter": {"method": "task_arithmetic"}, "path": {"sources": ["math"]}},
}


LEARNED = {"optimizer": {"name": "learned", "evaluations": 4, "learning": {"steps": 3}}}


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict[str, str]:
    """The zoo's models with their tokens in other rows, and tokens of their own."""
    root, words = tmp_path_factory.mktemp("others"), words_of(zoo.path("base"))
    return {
        "math": str(renumbered(zoo.path("math"), root / "math", words[::-1])),
        "lang": str(renumbered(zoo.path("lang"), root / "lang", ["<tool>", *words[40:], "<extra>", *words[:40]], 96)),
    }


def quick(models: dict[str, str] | None, space: dict[str, Any] | None, folder: Path, **changes: Any) -> Path:
    usual: dict[str, Any] = {
        "objectives": [{"task": "base_qa"}],
        "items": {"search": 8, "heldout": 8},
        "optimizer": {"name": "random_search", "evaluations": 6},
    }
    document = small_search(space=space, **usual | changes)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(document | ({"models": models} if models else {})))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_the_rows_of_tokens_decide_nothing(space, others, tmp_path):
    """A search over renumbered copies has the weights and scores of the search over the models, and is resumed,
    exported and merged like it."""
    tokens = AutoTokenizer.from_pretrained(zoo.path("base")).get_vocab()
    plain, ours, cut, count = tmp_path / "plain", tmp_path / "ours", tmp_path / "cut", 0

    def stop_midway(event: Event) -> None:
        nonlocal count
        count += isinstance(event, Evaluated)
        if count == 6:
            raise Stop

    evomerge("run", quick(None, space, tmp_path / "a"), "--output", plain)
    path = quick(others, space, tmp_path / "b")
    evomerge("run", path, "--output", ours)
    with pytest.raises(Stop):
        runs.start(path, cut, (), None, stop_midway)
    evomerge("resume", cut)
    rows, expected = content(ours)[0], content(plain)[0]
    assert content(cut)[0] == rows
    keys = ("id", "genome", "scores", "fingerprint", "state")
    assert [[row[key] for key in keys] for row in rows] == [[row[key] for key in keys] for row in expected]
    assert all(row["state"] == "done" for row in rows)
    for row in [row for row in rows if row["genome"]][:2]:
        recipe, out = tmp_path / f"{row['id']}.yaml", tmp_path / row["id"]
        evomerge("export", ours, "--candidate", row["id"], "-o", recipe)
        assert row["fingerprint"] in evomerge("merge", recipe, out)
        assert AutoTokenizer.from_pretrained(out).get_vocab() == tokens
        again = json.loads(evomerge("evaluate", recipe, "--config", path, "--json"))
        assert (again["scores"], again["fingerprint"]) == (row["scores"], row["fingerprint"])


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"workers": {"pool": "local"}, "evaluation": {"sources": "disk"}}, LEARNED])
def test_gradients_and_placements_do_not_see_the_rows_of_tokens(changes, others, tmp_path):
    found = []
    for name, models in {"plain": None, "ours": others}.items():
        evomerge("run", quick(models, None, tmp_path / name, **changes), "--output", tmp_path / name / "run")
        rows = content(tmp_path / name / "run")[0]
        found.append([(row["id"], row["genome"], row["fingerprint"]) for row in rows])
    assert found[0] == found[1]
    assert [row for row in found[0] if row[1]]


def test_the_base_s_tokens_are_kept_where_vocabularies_differ(others, tmp_path):
    prepared = prepare_file(quick(others, None, tmp_path))
    assert prepared.config.space.tokenizer_source == "base"
    told = [line for line in summarize(prepared)["warnings"] if "tokens" in line]
    assert told == ["models.lang has 2 tokens that the base lacks, such as '<extra>'; merges have the base's tokens."]


def test_models_of_one_vocabulary_are_merged_as_they_are(tmp_path):
    prepared = prepare_file(quick(None, None, tmp_path))
    assert prepared.config.space.tokenizer_source is None


def test_more_tokens_behind_the_base_s_change_nothing(tiny_models, tmp_path):
    """The rows of the base's tokens are the same, so the rows behind them are merged as they were."""
    words = words_of(tiny_models["first"])
    more = renumbered(tiny_models["first"], tmp_path / "more", [*words, "<tool>"], 128)
    path = quick({"more": str(more)}, None, tmp_path, base=str(tiny_models["base"]))
    assert prepare_file(path).config.space.tokenizer_source is None


def test_a_path_asks_only_models_that_give_rows(others, tmp_path):
    """Layers have no tokens: a model with other ones but as many rows can lend them as it is."""
    models = {"math": others["math"], "lang": "zoo:lang"}
    space = {"kind": "data_flow", "embeddings": "lang", "head": "lang"}
    assert prepare_file(quick(models, space, tmp_path / "a")).config.space.tokenizer_source is None
    space = {"kind": "data_flow", "embeddings": "lang", "head": "free"}
    assert prepare_file(quick(models, space, tmp_path / "b")).config.space.tokenizer_source == "base"


REFUSED = {
    "everyone's tokens": ("union", "candidates have the base's tokens, not everyone's; write the base with everyone's"),
    "a model's tokens": ("zoo:math", "is 'zoo:math'; use base, and name the model whose tokens you want as base"),
}


@pytest.mark.parametrize(("source", "message"), REFUSED.values(), ids=REFUSED)
def test_other_tokens_are_refused(source, message, tmp_path):
    with pytest.raises(InputError, match=f"space.tokenizer_source.*{message}"):
        load(quick(None, {"tokenizer_source": source}, tmp_path))


def test_what_a_refusal_advises_works(others, tmp_path):
    """The base with everyone's tokens has embeddings for them, and a search over it can use them."""
    recipe = {
        "merge_method": "linear",
        "base_model": "zoo:base",
        "models": [
            {"model": model, "parameters": {"weight": weight}}
            for model, weight in {"zoo:base": 1.0, others["math"]: 0.0, others["lang"]: 0.0}.items()
        ],
        "tokenizer_source": "union",
    }
    (tmp_path / "union.yaml").write_text(yaml.safe_dump(recipe))
    evomerge("merge", tmp_path / "union.yaml", tmp_path / "union")
    prepared = prepare(load(quick(others, None, tmp_path, base=str(tmp_path / "union"))))
    assert not [line for line in prepared.warnings if "lacks" in line]
    assert prepared.config.space.tokenizer_source == "base"
    words = AutoTokenizer.from_pretrained(tmp_path / "union").get_vocab()
    assert words["<extra>"] == prepared.models.base.table["lm_head.weight"].shape[0] - 1 >= 80


def test_a_base_with_tokens_that_have_no_row_is_refused(others, tmp_path):
    base = renumbered(zoo.path("base"), tmp_path / "base", words_of(zoo.path("base"))[::-1])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(base)
    with pytest.raises(InputError, match=r"base: .*has the token '<more>', for which its embeddings have no row"):
        prepare_file(quick(others, None, tmp_path, base=str(base)))


def test_rows_cannot_be_matched_without_a_tokenizer(others, tmp_path):
    silent = renumbered(zoo.path("math"), tmp_path / "silent", words_of(zoo.path("base")), 100)
    for file in silent.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match=r"models\.math: .*its tokenizer cannot be loaded"):
        prepare_file(quick({"math": str(silent)}, None, tmp_path))


def test_a_diagnosis_compares_no_rows_of_different_tokens(others, tmp_path):
    """It says of a renumbered copy what it says of the model, but for the rows."""
    ours, plain = (
        diagnose(prepare_file(quick({"math": model}, None, tmp_path / name)), 0).weights
        for name, model in {"a": others["math"], "b": "zoo:math"}.items()
    )
    assert {*plain.places} - {*ours.places} == {"embeddings"}
    layers = [place for place, name in enumerate(ours.places) if name not in ("embeddings", "head")]
    shift = len(plain.places) - len(ours.places)
    for place in layers:
        assert ours.models["math"].distance[place] == plain.models["math"].distance[place + shift]
