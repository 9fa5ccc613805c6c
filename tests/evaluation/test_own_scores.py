"""Scores of the user's own on the worker: what functions are given, may return and must not do."""

import pickle
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from evomerge import zoo
from evomerge.candidate import Shard
from evomerge.config import files
from evomerge.config.search import SearchConfig
from evomerge.errors import CandidateFailed, InputError, WorkFailed
from evomerge.evaluation.own_files import checked, read_own
from evomerge.evaluation.own_scores import OwnItems, OwnScores, _checked
from evomerge.recipe import linear, single
from evomerge.search.preparation import prepare
from evomerge.workers.worker import Worker
from tests.own_scores import FLUENCY, ITEMS, OWN, own_search, write_files
from tests.searches import small_search

MIDDLE = linear({"zoo:math": 0.5, "zoo:lang": 0.5})


def config(folder: Path, source: str = FLUENCY, **changes: Any) -> SearchConfig:
    write_files(folder, source)
    (folder / "search.yaml").write_text(yaml.safe_dump(own_search(**changes)))
    return files.load(folder / "search.yaml")


def alone(folder: Path, source: str, **own: Any) -> SearchConfig:
    """A search for a score of the user's own and nothing else."""
    changes = {"objectives": [{"python": "my_scores:score", "name": "fluency", **own}]}
    return config(folder, source, **changes)


def scored(folder: Path, body: str, **own: Any) -> Any:
    worker = Worker(alone(folder, f"def score(model, tokenizer, split, **given):\n    {body}\n", **own))
    return worker.evaluate(single("zoo:math"), "search")


def test_a_score_per_item_is_the_function_of_the_merge_on_the_items_of_the_split(tmp_path: Path) -> None:
    """Computed again from the model's own logits, item by item."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    search = config(tmp_path)
    worker = Worker(search)
    evaluation = worker.evaluate(single("zoo:math"), "heldout")
    model = AutoModelForCausalLM.from_pretrained(zoo.path("math"))
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("base"))
    expected = []
    for item in worker._harness.own_items("heldout")["fluency"]:
        ids = torch.tensor([tokenizer.encode(item["text"])])
        with torch.no_grad():
            logits = model(ids).logits.log_softmax(-1)[0, :-1]
        expected.append(float(logits[range(len(ids[0]) - 1), ids[0, 1:]].mean()))
    assert evaluation.outcomes["fluency"].values == pytest.approx(expected, rel=1e-4)
    assert evaluation.scores is not None
    assert evaluation.scores["fluency"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert evaluation.items == 10 + 10
    assert 0 <= evaluation.scores["base_qa"] <= 1


def test_every_split_has_items_of_its_own(tmp_path: Path) -> None:
    worker = Worker(config(tmp_path))
    splits = [worker._harness.own_items(split)["fluency"] for split in ("search", "selection", "heldout")]
    texts = [{item["text"] for item in split} for split in splits]
    assert [len(split) for split in texts] == [8, 6, 10]
    assert len(set.union(*texts)) == 24
    assert set.union(*texts) <= {item["text"] for item in ITEMS}


def test_items_that_a_task_is_searched_on_are_not_held_out(tmp_path: Path) -> None:
    search = config(tmp_path, items={"search": 60, "heldout": 10})
    (tmp_path / "items.jsonl").write_bytes((Path(search.tasks.paths[0]) / "base_qa" / "search.jsonl").read_bytes())
    worker = Worker(search)
    asked = {item["question"] for item in worker._harness.own_items("heldout")["fluency"]}
    seen = {instances[0].doc["question"] for instances in worker._harness._splits["search"]._tasks[0].documents}
    assert len(asked) == 10
    assert worker.left_out("heldout") > 0
    assert len(seen) == 60
    assert not asked & seen


def test_shards_do_not_divide_own_scores_and_change_no_score(tmp_path: Path) -> None:
    worker = Worker(config(tmp_path, evaluation={"batch_size": 2}))
    whole = worker.evaluate(MIDDLE, "search")
    parts = [worker.evaluate_shard(MIDDLE, "search", None, Shard(number, 3)) for number in range(3)]
    joined = worker.join("search", None, parts[::-1])  # type: ignore[arg-type]
    assert [part.own is None for part in parts] == [False, True, True]  # type: ignore[union-attr]
    assert (joined.scores, joined.outcomes) == (whole.scores, whole.outcomes)


def test_the_source_travels_with_the_worker(tmp_path: Path) -> None:
    search, _ = checked(config(tmp_path))
    made = pickle.dumps(partial(Worker, search, own=read_own(search)))
    before = Worker(search).evaluate(MIDDLE, "search")
    for path in ("my_scores.py", "items.jsonl"):
        (tmp_path / path).unlink()
    after = pickle.loads(made)().evaluate(MIDDLE, "search")
    assert (after.scores, after.outcomes) == (before.scores, before.outcomes)


def test_random_numbers_are_the_same_for_every_candidate_and_leave_those_of_others_alone(tmp_path: Path) -> None:
    source = """
import random
import numpy
import torch

def score(model, tokenizer, split):
    return random.random() + numpy.random.rand() + float(torch.rand(1)) + split.seed
"""
    worker = Worker(alone(tmp_path, source))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    first, second = (worker.evaluate(recipe, "search").scores for recipe in (MIDDLE, single("zoo:lang")))
    heldout = worker.evaluate(MIDDLE, "heldout").scores
    assert first == second != heldout
    assert (before[0], before[1]) == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    assert torch.equal(before[2], torch.get_rng_state())


@pytest.mark.parametrize(
    ("value", "score", "by_item"),
    [
        (3, 3.0, None),
        (True, 1.0, None),
        (np.float32(0.5), 0.5, None),
        (torch.tensor(0.25), 0.25, None),
        ([1, 0, 1, 0], 0.5, [1, 0, 1, 0]),
        ((0.5, True, np.int64(2), torch.tensor(0.5)), 1.0, [0.5, 1, 2, 0.5]),
        (torch.tensor([1.0, 2.0, 3.0, 6.0]), 3.0, [1, 2, 3, 6]),
    ],
)
def test_numbers_of_any_kind_are_taken(value: Any, score: float, by_item: list[float] | None) -> None:
    said = _checked("mine", value, 4)
    assert said.score == score
    assert (None if said.outcomes is None else said.outcomes.values.tolist()) == by_item


@pytest.mark.parametrize("value", [None, "0.5", [1.0, 2.0], [], [[1.0], [2.0], [3.0], [4.0]], {"a": 1.0}])
def test_anything_else_stops_the_search_with_a_sentence(value: Any) -> None:
    with pytest.raises(InputError, match=r"mine: its function returned .*, expected a number, or 4 numbers"):
        _checked("mine", value, 4)


@pytest.mark.parametrize("value", [float("nan"), [1.0, float("inf"), 0.0, 0.0]])
def test_what_is_not_finite_fails_the_candidate(value: Any) -> None:
    with pytest.raises(CandidateFailed, match="mine: its function returned"):
        _checked("mine", value, 4)


def test_an_exception_fails_the_candidate_and_names_the_line(tmp_path: Path) -> None:
    evaluation = scored(tmp_path, "return 1 / 0")
    assert evaluation.error == "fluency: ZeroDivisionError: division by zero (line 2)"
    assert evaluation.fingerprint is not None


def test_a_function_that_ends_the_process_fails_the_candidate_alone(tmp_path: Path) -> None:
    assert scored(tmp_path, "raise SystemExit(3)").error == "fluency: SystemExit: 3 (line 2)"


def test_what_does_not_answer_stops_the_search_instead_of_failing_candidates(tmp_path: Path) -> None:
    with pytest.raises(WorkFailed, match=r"fluency: .*does not answer \(ConnectionRefusedError: no.*then resume"):
        scored(tmp_path, "raise ConnectionRefusedError('no')")


def test_a_function_must_not_change_the_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has changed the model's weights"):
        scored(tmp_path, "next(model.parameters()).mul_(2); return 0.0")


def test_a_function_must_not_leave_hooks_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has left hooks on the model"):
        scored(tmp_path, "model.register_forward_hook(lambda *given: None); return 0.0")


def test_a_model_that_was_put_into_training_is_put_back(tmp_path: Path) -> None:
    worker = Worker(alone(tmp_path, "def score(model, tokenizer, split):\n    model.train()\n    return 1.0\n"))
    worker.evaluate(MIDDLE, "search")
    assert not worker.models.candidate.training


def test_arguments_are_handed_on_and_cannot_be_changed(tmp_path: Path) -> None:
    source = "def score(model, tokenizer, split, given):\n    given.append(1)\n    return len(given)\n"
    worker = Worker(alone(tmp_path, source, arguments={"given": [1, 2]}))
    scores = [worker.evaluate(recipe, "search").scores for recipe in (MIDDLE, MIDDLE)]
    assert scores == [{"fluency": 3.0}] * 2


@pytest.mark.parametrize(
    ("source", "arguments", "says"),
    [
        ("def score(model, tokenizer): return 0", {}, r"score cannot be called .*too many positional arguments"),
        ("def score(model, tokenizer, split): return 0", {"far": 1}, r"cannot be called .*far"),
        ("import nothing_of_this_name\ndef score(a, b, c): return 0", {}, r"cannot be run \(ModuleNotFoundError"),
        ("raise SystemExit\ndef score(a, b, c): return 0", {}, r"cannot be run \(SystemExit"),
        ("score = 3", {}, "score in .* is no function"),
    ],
)
def test_what_cannot_be_called_is_told_before_anything_is_scored(
    source: str, arguments: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        Worker(alone(tmp_path, source, arguments=arguments))


@pytest.mark.parametrize(
    ("taken", "arguments", "says"),
    [
        ("model, tokenizer", {}, "too many positional arguments"),
        ("model, tokenizer, split, *, far", {}, "missing a required.* 'far'"),
        ("model, tokenizer, split", {"far": 1}, "unexpected keyword argument 'far'"),
        ("model, tokenizer, split, far, /", {"far": 1}, "'far'"),
        ("model, tokenizer, split, near=2, *, far=3", {"far": 1}, None),
        ("*models, **others", {"far": 1}, None),
        ("model, /, tokenizer, split=None, *, far", {"far": 1}, None),
    ],
)
def test_a_function_that_cannot_be_called_is_told_from_its_source(
    taken: str, arguments: dict[str, Any], says: str | None, tmp_path: Path
) -> None:
    source = f"def score(other): return 1\n\n\ndef score({taken}):\n    return 0\n"
    if says is None:
        assert checked(alone(tmp_path, source, arguments=arguments))
        return
    with pytest.raises(InputError, match=rf"objectives\[0\].python: score cannot be called .*{says}"):
        checked(alone(tmp_path, source, arguments=arguments))


def test_a_decorated_function_is_not_judged_by_its_source(tmp_path: Path) -> None:
    source = "def takes_all(function): return lambda *given: 0\n\n\n@takes_all\ndef score(): return 0\n"
    assert checked(alone(tmp_path, source))


def test_checking_a_search_runs_no_code(tmp_path: Path) -> None:
    source = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n{FLUENCY}"
    search = config(tmp_path, source)
    prepared = prepare(search)
    OwnItems.of(prepared.config, read_own(prepared.config))
    assert not (tmp_path / "ran").exists()
    OwnScores(prepared.config, read_own(prepared.config))
    assert (tmp_path / "ran").exists()


def test_gradients_cannot_be_followed_through_a_function_and_evolution_works_alone(tmp_path: Path) -> None:
    budget = {"evaluations": 40, "population": 4}
    prepared = prepare(config(tmp_path, optimizer=budget))
    assert any("fluency is a function of your own" in warning for warning in prepared.warnings)
    assert "learned" not in prepared.config.optimizer.names
    for loss in ("likelihood", "entropy", "activations"):
        asked = {"name": "learned", "evaluations": 40, "learning": {"loss": loss}}
        with pytest.raises(InputError, match="asks for learned, but fluency is a function of your own"):
            prepare(config(tmp_path, optimizer=asked))


def test_subsets_are_off_where_a_function_sees_all_items(tmp_path: Path) -> None:
    many = {"items": {"search": 12, "heldout": 12}, "optimizer": {"name": "cma_es", "evaluations": 8}}
    assert prepare(config(tmp_path, **many)).config.subsets is False
    with pytest.raises(InputError, match="fluency is a function of your own, which sees all items"):
        prepare(config(tmp_path, **many, subsets=True))


def test_the_digest_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    digests = []
    for folder, source in (("here", FLUENCY), ("there", FLUENCY), ("other", f"{FLUENCY}\n")):
        (tmp_path / folder).mkdir()
        digests.append(checked(config(tmp_path / folder, source))[0].digest())
    assert digests[0] == digests[1] != digests[2]
    changed = config(tmp_path / "here", objectives=[{"task": "base_qa"}, {**OWN, "arguments": {"scale": 2.0}}])
    assert checked(changed)[0].digest() != digests[0]
    (tmp_path / "there" / "items.jsonl").write_text('{"text": "copy two"}\n' * 40)
    assert checked(files.load(tmp_path / "there" / "search.yaml"))[0].digest() != digests[0]


def test_a_search_without_own_scores_loads_none(tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(small_search()))
    plain = files.load(tmp_path / "search.yaml")
    assert checked(plain) == (plain, {})
