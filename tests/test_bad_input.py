"""Whatever is wrong with the input gets one sentence, exit status 2, and leaves every file as it was.

Each table maps a claim to an input and to what the sentence must say: the key path, what was given, what to do.
"""

import copy
import json
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge import cli
from evomerge.runs import directory as runs
from evomerge.runs.lock import run_lock
from tests.conftest import REPOSITORY

Spoil = Callable[[Path], object]
Refuses = Callable[..., None]
WriteSearch = Callable[..., Path]
REMOVED = ...


def put(document: Any, path: str, value: Any) -> None:
    """Sets (or removes) a dotted key of nested dictionaries and lists."""
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for part in parents:
        document = document.setdefault(part, {}) if isinstance(document, dict) else document[part]
    if value is REMOVED:
        del document[last]
    else:
        document[last] = value


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below one; a lock file's content names its last holder, so only its name counts."""
    found = sorted(folder.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() and path.name != ".lock" else None for path in found}


def check_sentence(status: object, out: str, err: str, says: tuple[str, ...]) -> None:
    assert (status, out) == (2, ""), err
    assert err.startswith("evomerge: "), err
    assert err.endswith("\n"), err
    assert len(err.splitlines()) == 1, err
    for fragment in says:
        assert fragment in err


@pytest.fixture
def refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Refuses]:
    """Calls evomerge in this process and checks what all bad input has in common."""
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def refuse(*arguments: object, says: tuple[str, ...]) -> None:
        monkeypatch.setattr(sys, "argv", ["evomerge", *map(str, arguments)])
        before = contents(tmp_path)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        check_sentence(stopped.value.code, *capfd.readouterr(), says)
        assert contents(tmp_path) == before

    yield refuse
    signal.signal(signal.SIGTERM, handler)


def document(models: dict[str, Path]) -> dict[str, Any]:
    """A search of a few seconds."""
    return {
        "base": str(models["base"]),
        "models": {"first": str(models["first"]), "second": str(models["second"])},
        "tasks": {"paths": [str(REPOSITORY / "evals")]},
        "objectives": [{"task": "base_qa"}, {"task": "cross_math_b"}],
        "items": {"search": 8, "heldout": 8},
        "optimizer": {"evaluations": 6, "population": 4},
        "workers": {"pool": "local"},
    }


@pytest.fixture
def search(tiny_models: dict[str, Path], tmp_path: Path) -> WriteSearch:
    """Writes the small search, with keys changed."""

    def write(changes: dict[str, Any] | None = None) -> Path:
        content = document(tiny_models)
        for key, value in (changes or {}).items():
            put(content, key, copy.deepcopy(value))
        path = tmp_path / "search.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


@pytest.fixture(scope="session")
def finished(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the small search."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "search.yaml").write_text(yaml.safe_dump(document(tiny_models)))
    runs.start(folder / "search.yaml", folder / "run", (), None, lambda event, fields: None)
    return folder / "run"


@pytest.fixture
def run_directory(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoiled."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# Search files


def flow(**keys: Any) -> dict[str, Any]:
    """A change to a data-flow space."""
    return {"space": {"kind": "data_flow", **keys}}


VLLM = {"backend": "vllm", "vllm": {"python": "nowhere/python"}}

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
    "no models": ({"models": REMOVED}, "models is required but missing"),
    "an unknown space": ({"space": {"kind": "dataflow"}}, 'space.kind is "dataflow"', "did you mean 'data_flow'?"),
    "an unknown key of a path": (flow(granularty=2), "space.granularty is not a known key", "'granularity'?"),
    "an unknown form": (flow(form="slot"), 'space.form is "slot"', "did you mean 'slots'?"),
    "a path of an unknown model": (flow(sources=["frist"]), "space.sources[0] is 'frist'", "did you mean 'first'?"),
    "fewer layers than are pinned": (
        flow(max_layers=2, pinned={"model": "first"}),
        "space.max_layers is 2, but space.pinned alone keeps 2; allow at least 3",
    ),
    "more pinned layers than there are": (
        flow(pinned={"model": "first", "first": 3, "last": 3}),
        "space.pinned keeps 3 + 3 layers, but the models have 4",
    ),
    "a scale of 0": (flow(scale={"low": 0.0}), "space.scale.low is 0; use a value above 0"),
    "scales in a family": (flow(form="skip", scale={"low": 0.5}), "space.scale cannot be searched in form skip"),
    "grids of merges beside paths": (
        flow() | {"controls.one_knob": True},
        "controls.one_knob is true, but a data-flow search merges no weights",
    ),
    "an evolution of paths without any": (
        {"optimizer.name": "path_evolution"},
        "optimizer.name is path_evolution, but the space has no hops",
    ),
    "a hybrid of one model's layers by a method that has no weights": (
        {"space": {"kind": "hybrid", "parameter": {"method": "karcher"}, "path": {"sources": ["first"]}}},
        "space.path.sources names first, but karcher cannot give one model's layers unmerged",
    ),
    "an unknown cost": ({"objectives.0": {"cost": "layer"}}, 'objectives[0].cost is "layer"', "'layers'?"),
    "a cost of a task": (
        {"objectives.0": {"cost": "layers", "task": "base_qa"}},
        "objectives[0].cost is layers, which belongs to no task",
    ),
    "a limit on a task": ({"objectives.0.max": 0.5}, "objectives[0].max is 0.5, but only a cost has a limit"),
    "nothing but costs": ({"objectives": [{"cost": "layers"}]}, "objectives are all costs; add a task"),
    "an objective of nothing": ({"objectives.0": {}}, "objectives[0].task is required but missing"),
    "an empty list of models": ({"models": {}}, "models is {}; give at least one"),
    "one model in place of several": ({"models": "zoo:math"}, 'models is "zoo:math"; write keys and values'),
    "two models of one name": ({"models": ["zoo:math", "./math"]}, "two of them would be called math"),
    "a model with a blank in its name": ({"models": {"a b": "zoo:math"}}, 'models.a b is "a b"; use letters'),
    "a model named like a control": ({"models": {"base": "zoo:math"}}, "models.base", "choose another"),
    "a model named twice": (
        {"base": "zoo:base", "models": {"one": "zoo:math", "two": "zoo:math"}},
        "models.two is zoo:math, which is models.one too; name each model once",
    ),
    "a model that the zoo lacks": ({"models.first": "zoo:maths"}, "models.first: zoo:maths", "did you mean 'math'?"),
    "a base that the zoo lacks": ({"base": "zoo:bse"}, "base: zoo:bse", "did you mean 'base'?"),
    "a folder that is not there": ({"models.first": "./nowhere"}, "models.first: ", "nowhere: no such model folder"),
    "a model that the hub lacks": ({"models.first": "nobody/nothing"}, "models.first: nobody/nothing", "hub"),
    "the home of nobody": ({"base": "~nobody-at-all/x"}, "base is", "home directory"),
    "a path too long for a path": ({"base": "./" + "x" * 300}, "base is", "File name too long"),
    "no objectives": ({"objectives": []}, "objectives is []; give at least one"),
    "an objective without its key": ({"objectives": ["base_qa"]}, 'objectives[0] is "base_qa"; write keys and values'),
    "an objective twice": (
        {"objectives.1.task": "base_qa"},
        "objectives[1] is base_qa again; name each objective once",
    ),
    "a goal misspelled": ({"objectives.0.goal": "maximise"}, "objectives[0].goal", "did you mean 'maximize'?"),
    "an objective without weight": ({"objectives.0.weight": 0}, "objectives[0].weight is 0", "greater than 0"),
    "an unknown task": (
        {"objectives.1.task": "base_qaa"},
        "objectives[1].task is 'base_qaa'",
        "did you mean 'base_qa'?",
    ),
    "an unknown metric": ({"objectives.0.metric": "accc"}, "objectives[0].metric is 'accc'", "did you mean 'acc'?"),
    "an unknown filter": ({"objectives.0.filter": "nune"}, "objectives[0].filter is 'nune'", "did you mean 'none'?"),
    "no folder of tasks": ({"tasks.paths": ["./nowhere"]}, "tasks.paths[0] is", "which does not exist"),
    "one path in place of several": ({"tasks.paths": "../evals"}, 'tasks.paths is "../evals"; write a list'),
    "a density of 0": ({"space.density.low": 0}, "space.density.low is 0; use a value in (0, 1]"),
    "a density above 1": ({"space.density.high": 1.4}, "space.density.high is 1.4; use a value in (0, 1]"),
    "a fixed density of 0": ({"space.density.fixed": 0}, "space.density.fixed is 0; use a value in (0, 1]"),
    "bounds in the wrong order": ({"space.weight": {"low": 1, "high": 0.5}}, "space.weight.low is 1", "which is 0.5"),
    "a start outside of the bounds": ({"space.weight.start": 9}, "space.weight.start is 9", "0 to 1.5"),
    "a step of 0": ({"space.weight.step": 0}, "space.weight.step is 0; use a value greater than 0"),
    "a negative step": ({"space.lambda.step": -1}, "space.lambda.step is -1"),
    "a bound that is not a number": (
        {"space.weight.high": float("nan")},
        "space.weight.high is NaN; use a finite number",
    ),
    "an infinite bound": ({"space.weight.high": float("inf")}, "space.weight.high is Infinity; use a finite number"),
    "text for a number": ({"space.weight.fixed": "much"}, 'space.weight.fixed is "much"; use a valid number'),
    "bounds as a list": ({"space.weight": [0, 1]}, "space.weight is [0, 1]; write keys and values"),
    "an unknown method": ({"space.method": "dare_tie"}, "space.method is 'dare_tie'", "did you mean 'dare_ties'?"),
    "an unknown method among several": ({"space.method": ["ties", "slrp"]}, "space.method is 'slrp'", "'slerp'?"),
    "no method": ({"space.method": []}, "space.method: the list is empty; name a method, or several"),
    "a method twice": ({"space.method": ["ties", "ties"]}, "space.method: ties is named twice; name each once"),
    "a number for a method": ({"space.method": 3}, "space.method is 3; "),
    "a parameter of a method that is not used": (
        {"space.parameters": {"slerp": {"t": None}}},
        "space.parameters.slerp is for no method in space.method",
    ),
    "an unknown parameter of a method": (
        {"space.method": "sce", "space.parameters": {"sce": {"topk": None}}},
        "space.parameters.sce.topk cannot be searched; did you mean 'select_topk'?",
    ),
    "a parameter's bounds in the wrong order": (
        {"space.method": "slerp", "space.parameters": {"slerp": {"t": {"low": 2}}}},
        "space.parameters.slerp.t: low is 2; use a value below high, which is 1",
    ),
    "an unknown key of a parameter": (
        {"space.method": "slerp", "space.parameters": {"slerp": {"t": {"lo": 0}}}},
        "space.parameters.slerp.t.lo is not a known key; did you mean 'low'?",
    ),
    "a greedy soup of weights": (
        {"optimizer.name": "greedy_soup"},
        "optimizer.name is greedy_soup",
        "density, weight fixed",
    ),
    "a greedy soup in stages": (
        {"optimizer": {"name": "greedy_soup", "stages": [{"genes": ["take"]}]}},
        "optimizer.stages are given, but greedy_soup has none",
    ),
    "a time limit in this process": (
        {"workers.time_limit": 60},
        "workers.time_limit is 60, but only a worker in a process of its own can be stopped; use pool: ray",
    ),
    "parts of several GPUs": (
        {"workers.num_gpus": 1.5},
        "workers.num_gpus is 1.5; use a part of one GPU (such as 0.5), or whole ones",
    ),
    "several GPUs and the number of one": (
        {"workers.num_gpus": 2, "evaluation.device": "cuda:1"},
        "evaluation.device is cuda:1, but workers.num_gpus is 2; use cuda for several",
    ),
    "subsets without generations": (
        {"subsets": True, "optimizer": {"name": "cma_es", "schedule": "async"}},
        "subsets is true, but optimizer.schedule is async, which has no generations; set it to false or auto",
    ),
    "subsets of what only all items can tell": (
        {"subsets": True, "objectives": [{"task": "base_qa"}, {"cost": "seconds"}]},
        "subsets is true, but the cost 'seconds' depends on how many items there are",
    ),
    "a greedy soup that does not wait": (
        {"optimizer": {"name": "greedy_soup", "schedule": "async"}},
        "optimizer.schedule is async, but greedy_soup builds each candidate on the one before; use pipelined",
    ),
    "groups that leave layers out": (
        {"space.layer_groups": ["0-1"]},
        "space.layer_groups end at layer 1",
        "layer is 3",
    ),
    "groups that overlap": (
        {"space.layer_groups": ["0-2", "2-3"]},
        "space.layer_groups[1] is '2-3'",
        "starts at layer 3",
    ),
    "groups beyond the last layer": ({"space.layer_groups": ["0-4"]}, "space.layer_groups[0] is '0-4'", "4 layers"),
    "a group that is no range": ({"space.layer_groups": ["a-b"]}, "space.layer_groups[0] is 'a-b'", "('0-3')"),
    "no groups": ({"space.layer_groups": []}, "space.layer_groups is []; give at least one"),
    "a granularity that does not divide": ({"space.layer_granularity": 3}, "space.layer_granularity is 3", "4 layers"),
    "both ways to group": ({"space": {"layer_groups": ["0-3"], "layer_granularity": 2}}, "space: give either"),
    "a filter that matches nothing": (
        {"space.filters": ["mpl"]},
        "space.filters[0] is 'mpl'",
        "names look like model.",
    ),
    "nothing left to search": (
        {"space": {"weight": {"fixed": 1}, "density": {"fixed": 1}}},
        "space: every kind",
        "free one",
    ),
    "more items than there are": ({"items.search": 10**6}, "items.search asks for 1000000 items", "only 200 left"),
    "more selection items than there are": ({"items.selection": 10**6}, "items.selection asks for 1000000 items"),
    "a constraint that asks for more than there is": (
        {"constraints": [{"task": "math_a", "retain": 1.5}]},
        "constraints[0].retain is 1.5",
        "less than or equal to 1",
    ),
    "a constraint without its share": ({"constraints": [{"task": "math_a"}]}, "constraints[0].retain is required"),
    "a constraint on the share of no parent": (
        {"constraints": [{"task": "math_a", "retain": 0.9, "of": "frist"}]},
        "constraints[0].of is frist, which is no parent",
        "did you mean 'first'?",
    ),
    "a constraint on an unknown metric": (
        {"constraints": [{"task": "math_a", "metric": "accc", "retain": 0.9}]},
        "constraints[0].metric is 'accc'",
        "did you mean 'acc'?",
    ),
    "a constraint that turns an objective around": (
        {"constraints": [{"task": "base_qa", "goal": "minimize", "retain": 0.9}]},
        "constraints[0].goal is minimize, but elsewhere base_qa has goal maximize",
    ),
    "a constraint with another filter than the objective": (
        {"constraints": [{"task": "base_qa", "filter": "none", "retain": 0.9}]},
        'constraints[0].filter is "none", and that of objectives[0] is another way to say it',
    ),
    "more held-out items than there are": ({"items.heldout": 10**6}, "items.heldout asks for 1000000 items"),
    "no items": ({"items.search": 0}, "items.search is 0; use a value greater than or equal to 1"),
    "a population too small": ({"optimizer.population": 3}, "optimizer.population is 3; cma_es needs at least 4"),
    "no evaluations": (
        {"optimizer.evaluations": 0},
        "optimizer.evaluations is 0; use a value greater than or equal to 1",
    ),
    "half an evaluation": ({"optimizer.evaluations": 1.5}, "optimizer.evaluations is 1.5; use a valid integer"),
    "an unknown optimizer": ({"optimizer.name": "cmaes"}, "optimizer.name is \"cmaes\"; did you mean 'cma_es'?"),
    "an unknown gene in a stage": (
        {"optimizer.stages": [{"genes": ["densty"]}]},
        "stages[0].genes names densty",
        "'density'?",
    ),
    "a fixed gene in a stage": (
        {"space.density.fixed": 1, "optimizer.stages": [{"genes": ["density"]}]},
        "optimizer.stages[0].genes names density",
        "valid names: weight",
    ),
    "a stage without end": (
        {"optimizer.stages": [{"genes": ["weight"]}, {"genes": ["density"]}]},
        "optimizer.stages[0].evaluations is missing",
    ),
    "a grid over too many models": (
        {"controls.per_model": True, "models": {f"m{i}": "zoo:math" for i in range(8)}, "base": "zoo:base"},
        "controls.per_model",
        "8 models; set it to false",
    ),
    "an unknown device": (
        {"evaluation.device": "banana"},
        "evaluation.device is 'banana'; use auto, cpu, cuda or cuda:N",
    ),
    "a device that is not there": (
        {"evaluation.device": "cuda:99"},
        "evaluation.device is 'cuda:99'",
        "CUDA devices here",
    ),
    "a device for no weights": ({"evaluation.device": "meta"}, "evaluation.device is 'meta'; use auto"),
    "an unknown way to share prefixes": (
        {"evaluation.prefix_sharing": "masks"},
        "evaluation.prefix_sharing is \"masks\"; did you mean 'mask'?",
    ),
    "an unknown argument of generation": (
        {"evaluation.generation_kwargs": {"temperatur": 0.5}},
        "evaluation.generation_kwargs.temperatur is no argument of generation; did you mean 'temperature'?",
    ),
    "an unknown backend": ({"evaluation.backend": "vlm"}, "evaluation.backend is \"vlm\"; did you mean 'vllm'?"),
    "an engine without its interpreter": ({"evaluation.backend": "vllm"}, "evaluation.vllm.python is missing"),
    "an engine for layer paths": (
        {"evaluation": VLLM, **flow(form="path")},
        "evaluation.backend is vllm, whose engine has the base's layers only, but space.kind is data_flow",
        "use backend: hf",
    ),
    "an engine with nothing to write": (
        {"evaluation": VLLM},
        "evaluation.backend is vllm, but no task has texts written (generate_until); use hf",
    ),
    "a cache of nothing": ({"evaluation.vllm": {"cache_gib": 0}}, "evaluation.vllm.cache_gib is 0"),
    "an unknown dtype": ({"evaluation.dtype": "fp16"}, "evaluation.dtype is \"fp16\"; did you mean 'float16'?"),
    "chat without a template": ({"evaluation.apply_chat_template": True}, "evaluation.apply_chat_template is true"),
    "a storage that is no address": ({"storage": "nonsense"}, "storage is nonsense, which cannot be opened"),
    "a storage that is not there": ({"storage": "sqlite:////nowhere/at/all.db"}, "storage is sqlite:////nowhere"),
    "a relative storage below nothing": ({"storage": "sqlite:///nowhere/all.db"}, "storage is sqlite:///nowhere"),
    "an unknown pool": ({"workers.pool": "rai"}, "workers.pool is \"rai\"; did you mean 'ray'?"),
    "a negative seed": ({"seed": -1}, "seed is -1; use a value greater than or equal to 0"),
}


@pytest.mark.parametrize("claim", WRONG_VALUES)
def test_a_wrong_value_in_a_search_file_is_refused(claim: str, search: WriteSearch, refuses: Refuses) -> None:
    changes, *fragments = WRONG_VALUES[claim]
    path = search(changes)
    refuses("run", path, "--output", "new/run", says=(f"evomerge: {path}: ", *fragments))


def test_more_examples_in_a_prompt_than_there_are_items_are_refused(search: WriteSearch, refuses: Refuses) -> None:
    says = ("task 'base_qa'", "Sample larger than population", "evaluation.num_fewshot")
    refuses("run", search({"evaluation.num_fewshot": 10**4}), "--output", "new/run", says=says)


def test_a_gpu_is_refused_where_there_is_none(
    search: WriteSearch, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    says = ("evaluation.device is 'cuda', but torch sees 0 CUDA devices here; use auto or cpu",)
    refuses("run", search({"evaluation.device": "cuda"}), "--output", "new/run", says=says)


def test_the_password_of_a_storage_is_not_repeated(search: WriteSearch, refuses: Refuses) -> None:
    path = search({"storage": "nosuchdb://me:secret@127.0.0.1:1/x"})
    refuses("run", path, "--output", "new/run", says=("storage: nosuchdb://me:***@127.0.0.1:1/x holds a password",))


def test_the_password_of_a_storage_from_the_environment_is_not_repeated(
    search: WriteSearch, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_STORAGE", "nosuchdb://me:secret@127.0.0.1:1/x")
    path = search({"storage": "${EVOMERGE_STORAGE}"})
    refuses("run", path, "--output", "new/run", says=("storage is nosuchdb://me:***@127.0.0.1:1/x, which cannot",))
    refuses("status", "${EVOMERGE_STORAGE}", says=("storage is nosuchdb://me:***@127.0.0.1:1/x, which cannot",))
    monkeypatch.delenv("EVOMERGE_STORAGE")
    says = ("storage is ${EVOMERGE_STORAGE}, but the environment variable EVOMERGE_STORAGE is not set here",)
    refuses("run", path, "--output", "new/run", says=says)


# Models


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def as_integers(tensors: dict[str, Any]) -> None:
    import torch

    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


def narrower(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


def as_gpt2(folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    shutil.rmtree(folder)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=128, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)


def as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("weights")


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def write_header(header: Any) -> Spoil:
    text = json.dumps(header).encode()
    return lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def write_index(weight_map: Any) -> Spoil:
    text = json.dumps({"weight_map": weight_map})
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


WRONG_MODELS: dict[str, tuple[Any, ...]] = {
    "a file": (as_file, "expected a model folder, got a file"),
    "a folder without config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "a broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json: not readable as JSON"),
    "a config of nothing": (lambda folder: (folder / "config.json").write_text("{}"), "model_type is missing"),
    "another architecture": (as_gpt2, "is a gpt2 model, but the base", "is a llama model"),
    "another shape": (lambda folder: change_tensors(folder, narrower), "model.norm.weight has shape [31]", "has [32]"),
    "a tensor too few": (
        lambda folder: change_tensors(folder, lambda tensors: tensors.pop("model.norm.weight")),
        "lacks the tensor model.norm.weight",
    ),
    "a tensor too many": (
        lambda folder: change_tensors(folder, lambda tensors: tensors.update(extra=tensors["model.norm.weight"] + 1)),
        "has the tensor extra",
    ),
    "integers": (lambda folder: change_tensors(folder, as_integers), "model.norm.weight is stored as I8", "dequantize"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
    "a pickle": (as_pickle, "weights are pickled (pytorch_model.bin)", "convert them to safetensors"),
    "noise": (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 999), "not a valid safetensors file"),
    "three bytes": (lambda folder: (folder / "model.safetensors").write_bytes(b"abc"), "not a valid safetensors file"),
    "half a copy": (truncate, "not a valid safetensors file (expected 160752 bytes, got 160652)"),
    "a header without dtype": (write_header({"x": {"data_offsets": [0, 0]}}), "not a valid safetensors file"),
    "a header that is a list": (write_header([1]), "not a valid safetensors file"),
    "a missing shard": (write_index({"x": "model-1.safetensors"}), "shard model-1.safetensors", "is missing"),
    "a shard elsewhere": (write_index({"x": "../first/model.safetensors"}), "lies outside the model folder; refused"),
    "an index of nothing": (write_index([]), "not a readable safetensors index"),
}


@pytest.mark.parametrize("claim", WRONG_MODELS)
def test_a_model_that_cannot_be_merged_is_refused(
    claim: str, tiny_models: dict[str, Path], tmp_path: Path, search: WriteSearch, refuses: Refuses
) -> None:
    spoil, *fragments = WRONG_MODELS[claim]
    spoil(Path(shutil.copytree(tiny_models["second"], tmp_path / "spoiled")))
    path = search({"models.second": "./spoiled"})
    refuses("run", path, "--output", "new/run", says=(f"evomerge: {path}: ", "spoiled", *fragments))


def write_adapter(folder: Path, target: str = "model.layers.0.self_attn.q_proj", **config: Any) -> None:
    import torch
    from safetensors.torch import save_file

    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "somebody/else"} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    parts = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(32, 2)}
    tensors = {f"base_model.model.{target}.{part}.weight": tensor for part, tensor in parts.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


WRONG_ADAPTERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "DoRA": ({"use_dora": True}, ("adapter_config.json: use_dora is set", "with PEFT")),
    "another kind": ({"peft_type": "IA3"}, ("adapter_config.json: peft_type is IA3; only LORA",)),
    "a start that changes the base": ({"init_lora_weights": "pissa"}, ("init_lora_weights is pissa",)),
    "a rank that is no number": ({"r": "many"}, ("adapter_config.json: r: ", "valid integer")),
    "a rank of 0": ({"rank_pattern": {"q_proj": 0}}, ("adapter_config.json: rank_pattern.q_proj: ", "greater than 0")),
    "a pattern that is none": (
        {"alpha_pattern": {"q_(proj": 2}},
        ("adapter_config.json: alpha_pattern.q_(proj", "'q_(proj' is no regular expression"),
    ),
    "another rank": ({"r": 3}, ("says rank 3 (r, rank_pattern)",)),
    "a module that the base lacks": (
        {"target": "model.layers.0.attn.q_proj"},
        ("fits no tensor of the base (the adapter was made for somebody/else)", "did you mean 'model.layers.0.self_at"),
    ),
    "another shape": (
        {"target": "model.layers.0.mlp.up_proj"},
        ("changes a weight of shape [32, 32]", "of the base has [48, 32]", "made for somebody/else"),
    ),
}


@pytest.mark.parametrize("claim", WRONG_ADAPTERS)
def test_an_adapter_that_cannot_be_merged_is_refused(
    claim: str, tmp_path: Path, search: WriteSearch, refuses: Refuses
) -> None:
    settings, fragments = WRONG_ADAPTERS[claim]
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", **settings)
    path = search({"models.second": "./adapter"})
    says = (f"evomerge: {path}: models.second: {tmp_path}/adapter", *fragments)
    refuses("run", path, "--output", "new/run", says=says)


def test_an_adapter_for_a_base_is_refused(tmp_path: Path, search: WriteSearch, refuses: Refuses) -> None:
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter")
    path = search({"base": "./adapter"})
    refuses("run", path, "--output", "new/run", says=(f"{path}: base: ", "is an adapter, not a model", "MODEL+"))


def edit_config(**changes: Any) -> Spoil:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


WRONG_BASES: dict[str, tuple[Any, ...]] = {
    "without tokenizer": (without_tokenizer, "tokenizer cannot be loaded"),
    "with a broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        "tokenizer cannot be loaded",
    ),
    "of an unknown kind": (edit_config(model_type="foo"), "model type `foo`"),
    "with more layers than weights": (edit_config(num_hidden_layers=5), "lack model.layers.4."),
    "of another width than its weights": (edit_config(hidden_size=64), "transformers cannot load this model"),
    "with text for a number in its config": (edit_config(hidden_size="wide"), "hidden_size"),
}


@pytest.mark.parametrize("claim", WRONG_BASES)
def test_a_base_that_cannot_be_loaded_is_refused(
    claim: str, tiny_models: dict[str, Path], tmp_path: Path, search: WriteSearch, refuses: Refuses
) -> None:
    spoil, *fragments = WRONG_BASES[claim]
    spoil(Path(shutil.copytree(tiny_models["base"], tmp_path / "spoiled")))
    shutil.copytree(tmp_path / "spoiled", tmp_path / "alike")
    path = search({"base": "./spoiled", "models": {"alike": "./alike"}})
    refuses("run", path, "--output", "new/run", says=("spoiled", *fragments))


# Tasks

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
def test_a_task_that_cannot_be_scored_is_refused(
    claim: str, tmp_path: Path, search: WriteSearch, refuses: Refuses
) -> None:
    old, new, *fragments = WRONG_TASKS[claim]
    write_task(tmp_path / "tasks", TASK + new if old == "end" else TASK.replace(old, new))
    path = search({"tasks.paths": ["./tasks"], "objectives": [{"task": "mine"}]})
    refuses("run", path, "--output", "new/run", says=(f"evomerge: {path}: ", *fragments))


@pytest.mark.parametrize(
    ("items", "fragments"),
    [
        pytest.param("", ("data file a.jsonl of task 'mine' is empty",), id="none"),
        pytest.param("{not json\n", ("mine.yaml: ", "JSON parse error"), id="broken ones"),
        pytest.param(ITEMS[: len(ITEMS) // 2], ("items.search asks for 8 items", "has only 5"), id="too few"),
        pytest.param('{"question": "copy"}\n' * 10, ("mine.yaml: ", "'answer' is undefined"), id="without answers"),
    ],
)
def test_items_that_cannot_be_used_are_refused(
    items: str, fragments: tuple[str, ...], tmp_path: Path, search: WriteSearch, refuses: Refuses
) -> None:
    write_task(tmp_path / "tasks", TASK, items)
    path = search({"tasks.paths": ["./tasks"], "objectives": [{"task": "mine"}]})
    refuses("run", path, "--output", "new/run", says=(f"evomerge: {path}: ", *fragments))


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
def test_what_vllm_cannot_do_is_refused(claim: str, tmp_path: Path, search: WriteSearch, refuses: Refuses) -> None:
    arguments, evaluation, *fragments = WRONG_FOR_VLLM[claim]
    write_task(tmp_path / "tasks", WRITTEN)
    changes = {"evaluation": evaluation | {"generation_kwargs": arguments}}
    path = search({"tasks.paths": ["./tasks"], "objectives": [{"task": "mine", "metric": "exact_match"}], **changes})
    refuses("run", path, "--output", "new/run", says=(f"evomerge: {path}: ", *fragments))


def test_a_base_that_asks_for_what_vllm_has_not_is_refused(
    tiny_models: dict[str, Path], tmp_path: Path, search: WriteSearch, refuses: Refuses
) -> None:
    write_task(tmp_path / "tasks", WRITTEN)
    base = Path(shutil.copytree(tiny_models["base"], tmp_path / "base"))
    (base / "generation_config.json").write_text('{"no_repeat_ngram_size": 3, "temperature": 0.6, "do_sample": true}')
    objectives = [{"task": "mine", "metric": "exact_match"}]
    path = search({"base": "./base", "tasks.paths": ["./tasks"], "objectives": objectives, "evaluation": VLLM})
    refuses("check", path, says=("no_repeat_ngram_size, set by", "base/generation_config.json, cannot be handed on"))


# The command line

WRONG_OPTIONS: dict[str, tuple[Any, ...]] = {
    "a setting without value": (("--set", "optimizer.evaluations"), "expected KEY.PATH=VALUE, for example"),
    "a setting without key": (("--set", "=1"), "--set =1: expected KEY.PATH=VALUE"),
    "a setting of an unknown key": (("--set", "optimizer.evals=3"), "optimizer.evals", "did you mean 'evaluations'?"),
    "a setting beyond the end of a list": (("--set", "objectives[7].task=x"), "'7' is no index into a list of 2"),
    "a setting below a value": (("--set", "base.name=x"), "--set base.name=x: base is", "holds no keys to set"),
    "a setting that is no YAML": (("--set", "base=["), "--set base=[: the value is not valid YAML"),
    "a setting of the wrong type": (("--set", "seed=one"), 'seed is "one"; use a valid integer'),
    "a negative number of workers": (("--workers", "-1"), "--workers is -1; give the number of workers, or 0"),
    "a word for the number of workers": (("--workers", "many"), "--workers", "valid integer", "`evomerge run --help`"),
    "an unknown option": (("--outptu", "x"), "--outptu", "see `evomerge run --help`"),
    "an option without value": (("--set",), "--set", "requires an argument"),
    "one argument too many": (("more",), "more", "see `evomerge run --help`"),
}


@pytest.mark.parametrize("claim", WRONG_OPTIONS)
def test_a_wrong_option_is_refused(claim: str, search: WriteSearch, refuses: Refuses) -> None:
    options, *fragments = WRONG_OPTIONS[claim]
    refuses("run", search(), "--output", "new/run", *options, says=tuple(fragments))


def test_a_wrong_command_is_refused(refuses: Refuses) -> None:
    refuses("rnu", says=("rnu", "Did you mean 'run'?", "see `evomerge --help`"))
    refuses("run", says=("SEARCH.yaml", "see `evomerge run --help`"))
    refuses("evaluate", "zoo:math", says=("Missing option '--config'", "see `evomerge evaluate --help`"))


@pytest.mark.parametrize(
    ("output", "fragment"),
    [
        pytest.param("search.yaml", "expected a folder for the run, found a file", id="a file"),
        pytest.param("search.yaml/run", "choose another --output", id="below a file"),
        pytest.param("full", "is not empty (it holds notes.txt); choose another --output", id="holds something else"),
        pytest.param("x" * 300, "(File name too long); choose another --output", id="has too long a name"),
        pytest.param(
            "/proc/evomerge/run",
            "cannot write there",
            id="cannot be written",
            marks=pytest.mark.skipif(not Path("/proc").is_dir(), reason="there is no /proc here"),
        ),
    ],
)
def test_an_output_directory_is_refused_that(
    output: str, fragment: str, tmp_path: Path, search: WriteSearch, refuses: Refuses
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    refuses("run", search(), "--output", output, says=(f"evomerge: {output}: ", fragment))


def test_a_run_directory_takes_no_second_search(run_directory: Path, search: WriteSearch, refuses: Refuses) -> None:
    again = (f"{run_directory}: already holds this search; go on with `evomerge resume {run_directory}`",)
    refuses("run", search(), "--output", run_directory, says=again)
    other = (f"{run_directory}: already holds another search; choose another --output",)
    refuses("run", search({"seed": 5}), "--output", run_directory, says=other)


# Runs

EDITED: dict[str, tuple[str, Any, str]] = {
    "seed": ("seed", 9, "seed is 9, but the archive was made with 0"),
    "population": ("optimizer.population", 8, "optimizer.population is 8, but the archive was made with 4"),
    "lag": ("optimizer.lag", 0, "optimizer.lag is 0, but the archive was made with 1"),
    "items": ("items.search", 9, "items.search is 9, but the archive was made with 8"),
    "metric": ("objectives.0.metric", "likelihood", 'objectives[0].metric is "likelihood", but'),
    "goal": ("objectives.1.goal", "minimize", 'objectives[1].goal is "minimize", but'),
    "objectives": ("objectives", [{"task": "base_qa"}], "objectives is [{"),
    "method": ("space.method", "ties", 'space.method is "ties", but the archive was made with "dare_ties"'),
    "bounds": ("space.density.start", 0.5, "space.density.start is 0.5, but the archive was made with 1.0"),
    "dtype": (
        "evaluation.dtype",
        "bfloat16",
        'evaluation.dtype is "bfloat16", but the archive was made with "float32"',
    ),
    "one model less": ("models.second", REMOVED, "models.second is null, but the archive was made with"),
    "a moved base": ("base", "/nowhere/base", "base: /nowhere/base: no such model folder"),
    "an unknown key": ("optimizer.evals", 3, "optimizer.evals is not a known key; did you mean 'evaluations'?"),
    "budget": ("optimizer.evaluations", -3, "optimizer.evaluations is -3; use a value greater than or equal to 1"),
}


@pytest.mark.parametrize("claim", EDITED)
def test_an_edited_search_is_not_resumed(claim: str, run_directory: Path, refuses: Refuses) -> None:
    key, value, fragment = EDITED[claim]
    path = run_directory / "search.yaml"
    content = yaml.safe_load(path.read_text())
    put(content, key, value)
    path.write_text(yaml.safe_dump(content))
    refuses("resume", run_directory, says=(f"evomerge: {path}: ", fragment))


def test_a_setting_that_changes_the_search_is_not_resumed(run_directory: Path, refuses: Refuses) -> None:
    refuses("resume", run_directory, "--set", "seed=3", says=("seed is 3, but the archive was made with 0",))


def overwrite_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def forget_kinds(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("DELETE FROM trial_user_attributes WHERE key = 'kind'")
    database.close()


DAMAGED: dict[str, tuple[Spoil, str]] = {
    "noise": (lambda path: path.write_bytes(b"\xff" * 5000), "file is not a database"),
    "half a copy": (lambda path: os.truncate(path, path.stat().st_size // 2), "cannot be read"),
    "zeros": (overwrite_half, "cannot be read"),
    "an empty file": (lambda path: path.write_bytes(b""), "is empty, though log.jsonl tells of evaluations"),
    "gone": (lambda path: path.unlink(), "is missing, though log.jsonl tells of evaluations"),
    "somebody else's": (forget_kinds, "cannot be read (KeyError: 'kind')"),
}


@pytest.mark.parametrize("command", ["resume", "candidates"])
@pytest.mark.parametrize("claim", DAMAGED)
def test_a_damaged_archive_is_left_alone(claim: str, command: str, run_directory: Path, refuses: Refuses) -> None:
    damage, fragment = DAMAGED[claim]
    damage(run_directory / "archive.db")
    says = (f"evomerge: {run_directory / 'archive.db'}: ", fragment, "restore it from a copy")
    refuses(command, run_directory, says=says)


@pytest.mark.parametrize("command", ["resume", "status", "front", "candidates", "export"])
def test_what_is_no_run_is_refused(command: str, tmp_path: Path, refuses: Refuses) -> None:
    (tmp_path / "empty").mkdir()
    refuses(command, "nowhere", says=("nowhere: no such run directory; give the folder that `evomerge run` made",))
    refuses(command, "empty", says=("empty: holds no search.yaml, so it is no run directory",))


def test_a_run_in_use_is_not_resumed(run_directory: Path, refuses: Refuses) -> None:
    with run_lock(run_directory):
        says = (f"{run_directory}: already in use by process {os.getpid()}", "choose another directory")
        refuses("resume", run_directory, says=says)


def test_a_run_that_cannot_be_written_is_not_resumed(run_directory: Path, refuses: Refuses) -> None:
    (run_directory / ".lock").unlink()
    (run_directory / ".lock").mkdir()
    refuses("resume", run_directory, says=(f"{run_directory / '.lock'}: cannot be written (Is a directory)",))


EXPORTS: dict[str, tuple[Any, ...]] = {
    "of an unknown candidate": (("--candidate", "unifrom"), "--candidate unifrom", "did you mean 'uniform'?"),
    "by an unknown objective": (("--prefer", "base_q=1"), "--prefer base_q=1", "did you mean 'base_qa'?"),
    "by a word": (("--prefer", "base_qa=much"), "--prefer base_qa=much: the weight 'much' is no number"),
    "by nothing": (("--prefer", "base_qa=0"), "--prefer: every weight is 0"),
    "by less than nothing": (("--prefer", "base_qa=-1"), "--prefer base_qa=-1: use a weight of at least 0"),
    "without a weight": (("--prefer", "base_qa"), "expected OBJECTIVE=WEIGHT"),
    "in two ways": (("--candidate", "base", "--prefer", "base_qa=1"), "--candidate base and --prefer base_qa=1"),
    "to a folder": (("-o", "run"), "run: is a folder; give -o the name of a file"),
    "below a file": (("-o", "run/search.yaml/recipe.yaml"), "cannot be written", "choose another -o"),
}


@pytest.mark.parametrize("claim", EXPORTS)
def test_an_export_is_refused(claim: str, run_directory: Path, refuses: Refuses) -> None:
    options, *fragments = EXPORTS[claim]
    refuses("export", run_directory, *options, says=tuple(fragments))


# Recipes and scoring by hand

RECIPES: dict[str, tuple[Any, ...]] = {
    "an unknown key of our own": ({"evomerge.fingerprnt": "0"}, "evomerge.fingerprnt", "did you mean 'fingerprint'?"),
    "an unknown method": ({"merge_method": "linaer"}, "merge_method is 'linaer'", "did you mean 'linear'?"),
    "a method in capitals": ({"merge_method": "TIES"}, "merge_method is 'TIES'", "did you mean 'ties'?"),
    "no method": ({"merge_method": REMOVED}, "merge_method is required but missing"),
    "no models": ({"models": REMOVED}, "give exactly one of models and slices"),
    "a model that is not there": ({"models.0.model": "./nowhere"}, "./nowhere: no such model folder"),
    "a weight in words": ({"models.0.parameters.weight": "much"}, "weight of", "is 'much'; expected a number"),
    "no weight": ({"models.0.parameters": {}}, "weight of", "is missing"),
    "a weight that is not a number": (
        {"models.0.parameters.weight": float("nan")},
        "models[0].parameters.weight is NaN",
    ),
    "a weight in a block": (
        {"models.0.parameters.weight": {"filter": "mlp"}},
        "models[0].parameters.weight.value is required",
    ),
    "a method without its base": ({"merge_method": "ties"}, "merge_method ties needs a base_model"),
    "modules": ({"modules": {"text": {}}, "models": REMOVED}, "modules is not supported; remove it"),
    "two tokenizers": ({"tokenizer": {}, "tokenizer_source": "base"}, "give at most one of tokenizer_source and"),
    "a tokenizer that is not there": ({"tokenizer_source": "./nowhere"}, "./nowhere: no such model folder"),
    "a token with two sources": (
        {"tokenizer.tokens": {"x": {"source": {"kind": "model_token", "model": "a", "token": "b", "token_id": 1}}}},
        "tokenizer.tokens.x.source: give exactly one of token_id and token",
    ),
    "a template by no known name": ({"chat_template": "lama3"}, "chat_template is 'lama3'", "did you mean 'llama3'?"),
    "an unknown dtype": ({"dtype": "float61"}, "dtype is \"float61\"; did you mean 'float16'?"),
    "another name of a dtype": ({"dtype": "fp16"}, 'dtype is "fp16"', "valid names: bfloat16, float16, float32"),
    "a list of weights in one string": ({"models.0.parameters.weight": "[0, 1]"}, "is '[0, 1]'; expected a number"),
    "nothing behind a required key": ({"merge_method": None}, "merge_method is required but missing; add it"),
    "nothing behind a parameter": ({"parameters": {"weight": None}}, "parameters.weight is null"),
    "a path in place of a model": (
        {"base_model": {"path": "x"}},
        "base_model.model is required but missing; write the model below it ({model: {path: NAME}})",
    ),
    "a model of a mapping without path": (
        {"models.0.model": {"model": {"revision": "x"}}},
        "models[0].model.model.path is required but missing; add it",
    ),
    "a revision that YAML reads as a number": (
        {"models.0.model": {"model": {"path": "x", "revision": 3}}},
        "models[0].model.model.revision is 3; write it as text, in quotes",
    ),
    "another architecture": (
        {"models.0.model": {"model": "x", "override_architecture": "LlamaForCausalLM"}},
        "models[0].model.override_architecture is not supported, since the model's config.json says what it is",
    ),
    "a model as a list": ({"base_model": ["x"]}, 'base_model is ["x"]'),
}


@pytest.fixture
def recipe(tiny_models: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe of two models, with keys changed."""

    def write(changes: dict[str, Any] | None = None) -> Path:
        models = [{"model": str(tiny_models[name]), "parameters": {"weight": 1.0}} for name in ("first", "second")]
        content: dict[str, Any] = {"merge_method": "linear", "models": models}
        for key, value in (changes or {}).items():
            put(content, key, value)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


@pytest.mark.parametrize("claim", RECIPES)
def test_a_wrong_recipe_is_not_merged(claim: str, recipe: Callable[..., Path], refuses: Refuses) -> None:
    changes, *fragments = RECIPES[claim]
    refuses("merge", recipe(changes), "merged", says=tuple(fragments))


def test_a_merge_goes_nowhere_but_to_a_new_folder(
    recipe: Callable[..., Path], tmp_path: Path, refuses: Refuses
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    refuses("merge", recipe(), "full", says=("full: exists and is not empty; choose a new folder",))
    refuses("merge", recipe(), "recipe.yaml", says=("recipe.yaml: exists",))
    refuses("merge", recipe(), "recipe.yaml/merged", says=("is a file; choose a path inside a folder",))
    refuses("merge", recipe(), "merged", "--device", "banana", says=("--device is 'banana'; use auto, cpu",))
    refuses("merge", recipe(), "merged", "--max-shard-size", "5", says=("--max-shard-size is '5'; use a size such",))
    refuses("merge", "nowhere.yaml", "merged", says=("nowhere.yaml: no such file; check the path",))


def test_what_cannot_be_scored_is_refused(tiny_models: dict[str, Path], search: WriteSearch, refuses: Refuses) -> None:
    path = search()
    refuses(
        "evaluate", tiny_models["first"], "--config", path, "--split", "test", says=("--split is 'test'; use search",)
    )
    refuses("evaluate", tiny_models["first"], "--config", "nowhere.yaml", says=("nowhere.yaml: no such file",))
    refuses("evaluate", "zoo:mth", "--config", path, says=("zoo:mth", "did you mean 'math'?"))
    refuses("evaluate", "./nowhere", "--config", path, says=("./nowhere: no such model folder",))
    refuses("evaluate", "nowhere.yaml", "--config", path, says=("nowhere.yaml: no such file",))


# Through a process of its own


def check_process(*arguments: object, says: tuple[str, ...], cwd: Path) -> None:
    before = contents(cwd)
    command = [sys.executable, "-c", "from evomerge.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)
    check_sentence(done.returncode, done.stdout, done.stderr, says)
    assert contents(cwd) == before


def test_a_process_refuses_a_wrong_value(search: WriteSearch, tmp_path: Path) -> None:
    path = search({"space.density.high": 1.4})
    check_process("run", path, says=(f"{path}: space.density.high is 1.4; use a value in (0, 1].",), cwd=tmp_path)


def test_a_process_refuses_a_wrong_command(tmp_path: Path) -> None:
    check_process("run", says=("Missing argument 'SEARCH.yaml' (see `evomerge run --help`).",), cwd=tmp_path)


def test_a_process_refuses_a_base_without_tokenizer(
    tiny_models: dict[str, Path], search: WriteSearch, tmp_path: Path
) -> None:
    without_tokenizer(Path(shutil.copytree(tiny_models["base"], tmp_path / "base")))
    check_process("run", search({"base": "./base"}), says=("tokenizer cannot be loaded",), cwd=tmp_path)


def test_a_second_process_is_refused_by_the_lock(run_directory: Path, tmp_path: Path) -> None:
    with run_lock(run_directory):
        says = (f"{run_directory}: already in use by process {os.getpid()} on ",)
        check_process("resume", run_directory, says=says, cwd=tmp_path)


@pytest.mark.ray
def test_more_gpus_than_there_are_are_refused(search: WriteSearch, tmp_path: Path) -> None:
    options = ("--workers", 2, "--set", "workers.num_gpus=64")
    says = ("workers: 2 worker(s) of 64 GPU each need 128 GPU", "lower workers.count or workers.num_gpus")
    check_process("run", search(), "--output", tmp_path / "run", *options, says=says, cwd=tmp_path)


@pytest.mark.ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere", "127.0.0.1:99999"])
def test_an_address_without_cluster_is_refused(address: str, search: WriteSearch, tmp_path: Path) -> None:
    options = ("--workers", 1, "--address", address)
    says = (f"--address {address}: cannot connect to Ray", "start a cluster there, or leave the address out")
    check_process("run", search(), "--output", tmp_path / "run", *options, says=says, cwd=tmp_path)


@pytest.mark.parametrize("options", [(), ("--workers", 0)])
def test_an_address_for_a_search_in_this_process_is_refused(
    options: tuple[object, ...], search: WriteSearch, run_directory: Path, refuses: Refuses
) -> None:
    says = ("--address auto: workers.pool is local", "no cluster is used; leave --address out")
    refuses("run", search(), "--output", "run2", "--address", "auto", *options, says=says)
    refuses("resume", run_directory, "--address", "auto", *options, says=says)


def test_a_run_whose_models_have_changed_is_not_resumed_or_exported(
    run_directory: Path, tiny_models: dict[str, Path], refuses: Refuses
) -> None:
    weights = tiny_models["second"] / "model.safetensors"
    kept = weights.read_bytes()
    says = (f"{run_directory}/search.yaml: models.second: the model's files have changed since this search began",)
    try:
        weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        refuses("resume", run_directory, says=says)
        refuses("export", run_directory, says=says)
    finally:
        weights.write_bytes(kept)
