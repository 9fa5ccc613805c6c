"""Data-flow and hybrid searches: kills, workers and resumption must not show; what is found must ship."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evomerge.archive.archive import Archive
from evomerge.candidate import Candidate
from evomerge.config.files import load
from evomerge.events import Evaluated, Event, unheard
from evomerge.layers import layer_count
from evomerge.merging.sources.weights import tensor_table
from evomerge.runs import directory as runs
from evomerge.search.best import front_of
from evomerge.search.criteria import criteria_of
from evomerge.search.loop import Search
from evomerge.search.preparation import Prepared, prepare
from evomerge.search.results import Results
from tests import commands
from tests.commands import content, evomerge
from tests.fakes import FakePool, Killed
from tests.searches import WriteSearch
from tests.stopping import Stop

SPACES: dict[str, dict[str, Any]] = {
    "paths": {
        "space": {"kind": "data_flow", "max_layers": 8, "scale": {"low": 0.5, "high": 1.5}, "head": "free"},
        "optimizer": {"evaluations": 32},
    },
    "slots": {
        "space": {"kind": "data_flow", "form": "slots", "granularity": 2, "scale": {"low": 0.5, "high": 1.5}},
        "optimizer": {"evaluations": 24, "name": "cat_cma", "population": 8},
    },
    "looped": {
        "space": {"kind": "data_flow", "form": "looped", "sources": ["lang", "math"]},
        "optimizer": {"evaluations": 24},
    },
    "hybrid": {
        "space": {"kind": "hybrid", "parameter": {"density": {"fixed": 1.0}}, "path": {"sources": ["lang"]}},
        "optimizer": {
            "name": "group_evolution",
            "evaluations": 28,
            "stages": [
                {"genes": ["weight"], "evaluations": 12},
                {"genes": ["hop"], "evaluations": 8, "name": "path_evolution"},
                {"genes": ["weight", "hop"], "name": "path_evolution"},
            ],
        },
    },
}
OBJECTIVES = [{"task": "base_qa"}, {"task": "cross_math_b"}, {"cost": "layers", "max": 7}]


@pytest.fixture(params=list(SPACES))
def prepared(request, search_file: WriteSearch) -> Prepared:
    return prepare(load(search_file(objectives=OBJECTIVES, **SPACES[request.param])))


def depth(candidate: Candidate) -> int:
    parts = candidate.recipe.slices
    return sum(part.length for part in parts) if parts else 6


def quality(candidate: Candidate) -> tuple[float, float, float]:
    """Short models are better at the first task and long ones at the second."""
    genome = np.array(candidate.genome or [0.0])
    return (
        float(np.exp(-depth(candidate) / 9)),
        float(np.tanh(depth(candidate) + np.cos(genome).mean())),
        (float(depth(candidate))),
    )


def run(prepared: Prepared, directory: Path, **pool: Any) -> tuple[Archive, FakePool]:
    directory.mkdir(exist_ok=True)
    archive = Archive(directory, prepared.config, prepared.space.genes)
    fake = FakePool([objective.name for objective in prepared.config.objectives], quality, **pool)
    Search(prepared.config, prepared.space, archive, fake, unheard).run()
    return archive, fake


def test_kills_and_workers_do_not_show_in_the_archive(prepared, tmp_path):
    alone, undisturbed = run(prepared, tmp_path / "alone")
    expected = commands.candidates(alone, prepared.config), commands.front(alone, prepared.config)
    for attempt in range(len(undisturbed.evaluated)):
        try:
            killed, _ = run(prepared, tmp_path / "killed", size=3, seed=attempt, dies_after=19)
        except Killed:
            continue
        break
    assert (commands.candidates(killed, prepared.config), commands.front(killed, prepared.config)) == expected


def test_what_costs_more_than_allowed_is_scored_but_never_wins(prepared, tmp_path):
    archive, _ = run(prepared, tmp_path / "run")
    records, criteria = archive.records(), criteria_of(archive, prepared.config)
    assert any(depth(record.candidate) > 7 for record in records)
    assert all(record.evaluation.scores is not None for record in records)
    assert all(depth(record.candidate) <= 7 for record in front_of(records, criteria))
    best = Results(archive, prepared.config).best()
    assert best is not None
    assert depth(best.candidate) <= 7


REAL = {
    "data_flow": {
        "space": {
            "kind": "data_flow",
            "sources": ["lang", "math", "base"],
            "scale": {"low": 0.5, "high": 1.5},
            "embeddings": "free",
            "head": "free",
        },
        "optimizer": {"evaluations": 12},
    },
    "hybrid": {
        "space": {
            "kind": "hybrid",
            "parameter": {"layer_groups": ["0-1", "2-3", "4-5"]},
            "path": {"sources": ["lang", "base"]},
        },
        "optimizer": {"name": "path_evolution", "evaluations": 12},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(REAL))
def test_a_search_on_the_zoo_is_interrupted_resumed_exported_and_merged(name, search_file, tmp_path):
    path = search_file(
        objectives=[{"task": "base_qa"}, {"cost": "layers"}, {"cost": "parameters"}],
        items={"search": 12, "heldout": 12},
        **REAL[name],
    )
    whole, cut, count = tmp_path / "whole", tmp_path / "cut", 0

    def stop_at_the_ninth(event: Event) -> None:
        nonlocal count
        count += isinstance(event, Evaluated)
        if count == 9:
            raise Stop

    evomerge("run", path, "--output", whole)
    with pytest.raises(Stop):
        runs.start(path, cut, (), None, stop_at_the_ninth)
    evomerge("resume", cut)
    assert content(cut) == content(whole)
    rows = content(whole)[0]
    assert all(row["state"] == "done" for row in rows)
    other = next(row for row in rows if row["genome"] and row["scores"]["layers"] != 6)
    recipe, merged = tmp_path / "recipe.yaml", tmp_path / "merged"
    evomerge("export", whole, "--candidate", other["id"], "-o", recipe)
    assert other["fingerprint"] in evomerge("merge", recipe, merged)
    assert layer_count(tensor_table(merged)) == other["scores"]["layers"]
    for target in (recipe, merged):
        row = json.loads(evomerge("evaluate", target, "--config", path, "--json"))
        assert (row["scores"], row["fingerprint"]) == (other["scores"], other["fingerprint"])


@pytest.mark.slow
def test_layers_side_by_side_are_searched_resumed_exported_and_evaluated_but_not_written(search_file, tmp_path, capsys):
    path = search_file(
        objectives=[{"task": "base_qa"}],
        items={"search": 12, "heldout": 12},
        space={"kind": "data_flow", "form": "looped", "sources": ["lang", "math"]},
        optimizer={"evaluations": 8},
    )
    whole, cut, count = tmp_path / "whole", tmp_path / "cut", 0

    def stop_at_the_sixth(event: Event) -> None:
        nonlocal count
        count += isinstance(event, Evaluated)
        if count == 6:
            raise Stop

    evomerge("run", path, "--output", whole)
    with pytest.raises(Stop):
        runs.start(path, cut, (), None, stop_at_the_sixth)
    evomerge("resume", cut)
    assert content(cut) == content(whole)
    rows = content(whole)[0]
    assert all(row["state"] == "done" for row in rows)
    other = next(row for row in rows if row["genome"])
    recipe = tmp_path / "recipe.yaml"
    evomerge("export", whole, "--candidate", other["id"], "-o", recipe, status=2)
    assert "side by side, which no architecture of transformers does" in " ".join(capsys.readouterr().err.split())
    assert not recipe.exists()
    told = evomerge("export", whole, "--candidate", other["id"], "-o", recipe, "--evomerge-only")
    assert f"evomerge evaluate {recipe}" in " ".join(told.split())
    row = json.loads(evomerge("evaluate", recipe, "--config", path, "--json"))
    assert (row["scores"], row["fingerprint"]) == (other["scores"], other["fingerprint"])
    again = json.loads(evomerge("evaluate", recipe, "--config", whole / "search.yaml", "--json"))
    assert again["scores"] == row["scores"]
    assert yaml.safe_load(recipe.read_text())["evomerge"]["parallel"]
    for options in ((), ("--lora-rank", "4")):
        evomerge("merge", recipe, tmp_path / "merged", *options, status=2)
        refusal = " ".join(capsys.readouterr().err.split())
        assert "side by side, which no architecture of transformers does" in refusal
    assert not (tmp_path / "merged").exists()
    evomerge("report", whole, "-o", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    best = runs.read(whole).results.best()
    assert best is not None
    assert ("Side by side run" in page) == bool(best.candidate.recipe.evomerge.parallel)
    assert ("--evomerge-only\nevomerge evaluate recipe.yaml" in page) == bool(best.candidate.recipe.evomerge.parallel)


def test_a_model_whose_tokens_lie_in_other_rows_gives_its_ends_token_by_token(tiny_models, search_file, tmp_path):
    shutil.copytree(tiny_models["first"], tmp_path / "first")
    tokenizer = json.loads((tmp_path / "first" / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    one, other = list(words)[-2:]
    words[one], words[other] = words[other], words[one]
    (tmp_path / "first" / "tokenizer.json").write_text(json.dumps(tokenizer))
    models = {"first": str(tmp_path / "first"), "second": str(tiny_models["second"])}

    def attempt(name: str, **space: Any) -> Prepared:
        space = {"kind": "data_flow", "sources": ["second", "first"]} | space
        return prepare(load(search_file(name, base=str(tiny_models["base"]), models=models, space=space)))

    assert attempt("theirs.yaml").config.space.tokenizer_source is None
    assert attempt("free.yaml", head="free").config.space.tokenizer_source == "base"


def test_a_search_needs_no_models_besides_the_base(search_file):
    space = {"kind": "data_flow", "form": "upscale", "sources": ["base"]}
    found = prepare(load(search_file(models={}, space=space, optimizer={"evaluations": 5})))
    assert {gene.kind for gene in found.space.genes} == {"layers"}
    assert found.config.optimizer.name == "group_evolution"


def test_the_resolved_config_can_be_read_again(search_file, tmp_path):
    for index, (name, settings) in enumerate(REAL.items()):
        resolved = prepare(load(search_file(f"{name}.yaml", **settings))).config
        again = tmp_path / f"{index}.yaml"
        again.write_text(resolved.to_yaml())
        assert load(again) == resolved
        assert yaml.safe_load(again.read_text())["space"]["kind"] == name
