"""A worker on the zoo, in this process: what goes wrong with one candidate stays with that candidate."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge import zoo
from evomerge.candidate import Descent, Gradient, Shard
from evomerge.config import files
from evomerge.config.running import WorkersConfig
from evomerge.devices import accelerator, count_gpus, resolve_device
from evomerge.errors import InputError
from evomerge.evaluation.harness import Harness
from evomerge.merging.naming import named_weights
from evomerge.merging.resident.models import fingerprint
from evomerge.merging.sources.models import find_models
from evomerge.recipe import Provenance, Recipe, Source, linear, single
from evomerge.workers.worker import Worker


@pytest.fixture
def search(search_file):
    return files.load(search_file(evaluation={"device": "cpu", "dtype": "float32"}))


@pytest.fixture
def worker(search):
    return Worker(search)


def merge(weight):
    sources = [Source(model=f"zoo:{name}", parameters={"weight": weight, "density": 0.5}) for name in ("math", "lang")]
    return Recipe(merge_method="dare_ties", base_model="zoo:base", models=tuple(sources), evomerge=Provenance(seed=7))


def without_time(evaluation):
    return {name: getattr(evaluation, name) for name in ("scores", "error", "outcomes", "items", "fingerprint")}


def test_an_evaluation_tells_scores_outcomes_items_time_and_fingerprint(worker):
    evaluation = worker.evaluate(merge(0.6), "search")
    assert evaluation.error is None
    assert set(evaluation.scores) == set(evaluation.outcomes) == {"base_qa", "cross_math_b"}
    assert {outcomes.count for outcomes in evaluation.outcomes.values()} == {24}
    assert evaluation.items == 48
    assert evaluation.seconds > 0
    assert len(evaluation.fingerprint) == 16


@pytest.mark.parametrize("name", ["base", "math", "lang"])
def test_the_recipe_of_one_model_is_that_model_to_the_bit(name, worker, search):
    model = AutoModelForCausalLM.from_pretrained(zoo.path(name), dtype=torch.float32)
    evaluation = worker.evaluate(single(f"zoo:{name}"), "search")
    assert evaluation.fingerprint == fingerprint(dict(model.named_parameters()))
    alone = Harness(search, model.eval(), AutoTokenizer.from_pretrained(zoo.path("base"))).evaluate("search")
    assert evaluation.scores == alone.scores
    assert evaluation.outcomes == alone.outcomes


@pytest.mark.parametrize("split", ["search", "heldout"])
def test_a_recipe_evaluates_bit_for_bit_the_same_before_and_after_others(split, worker):
    before = worker.evaluate(merge(0.6), split)
    other = worker.evaluate(merge(1.2), "heldout")
    worker.evaluate(linear({"zoo:math": 0.3, "zoo:lang": 0.7}), "search")
    assert without_time(worker.evaluate(merge(0.6), split)) == without_time(before)
    assert other.fingerprint != before.fingerprint


@pytest.mark.parametrize("count", [2, 5])
def test_shards_joined_in_any_order_are_the_whole_evaluation_and_take_one_merge(worker, monkeypatch, count):
    whole, merges = worker.evaluate(merge(0.6), "search"), []
    worker.evaluate(merge(0.3), "search")
    materialize = worker.models.materialize
    monkeypatch.setattr(worker.models, "materialize", lambda *given: merges.append(given[0]) or materialize(*given))
    parts = [worker.evaluate_shard(merge(0.6), "search", None, Shard(number, count)) for number in range(count)]
    worker.evaluate_shard(merge(0.1), "search", None, Shard(0, 1))  # it holds another candidate when it joins
    assert without_time(worker.join("search", None, parts[::-1])) == without_time(whole)
    assert len(merges) == 2


def test_shards_of_different_weights_are_no_evaluation(worker):
    parts = [worker.evaluate_shard(merge(0.2 + number), "search", None, Shard(number, 2)) for number in (0, 1)]
    if parts[1].fingerprint is None:  # one batch holds all items
        parts[1] = replace(parts[0], shard=Shard(1, 2), fingerprint="0" * 16)
    assert worker.join("search", None, parts).error.startswith("workers made different weights of it")


def test_two_workers_agree_to_the_bit(worker, search):
    assert without_time(Worker(search).evaluate(merge(0.6), "search")) == without_time(
        worker.evaluate(merge(0.6), "search")
    )


def test_an_exception_inside_scoring_is_that_candidate_s_failure(worker, monkeypatch):
    before = worker.evaluate(merge(0.6), "search")

    def broken(*_):
        raise RuntimeError("out of memory\nand more")

    with monkeypatch.context() as patch:
        patch.setattr("evomerge.evaluation.harness.task_metrics", broken)
        failed = worker.evaluate(merge(0.6), "search")
    assert failed.failed
    assert failed.error == "RuntimeError: out of memory"
    assert failed.fingerprint == before.fingerprint
    assert without_time(worker.evaluate(merge(0.6), "search")) == without_time(before)


def test_weights_that_are_no_numbers_are_a_failure_with_a_reason_and_the_next_candidate_is_unaffected(worker):
    before = worker.evaluate(merge(0.6), "search")
    failed = worker.evaluate(linear({"zoo:math": 1e41, "zoo:lang": -1e41}), "search")
    assert failed.failed
    assert failed.error.startswith("non-finite weights after the merge in model.")
    assert failed.scores is None
    assert not failed.outcomes
    assert without_time(worker.evaluate(merge(0.6), "search")) == without_time(before)


def test_a_recipe_with_a_model_that_the_worker_does_not_hold_is_a_failure_that_names_it(search):
    failed = Worker(search, find_models("zoo:base", ["zoo:base"])).evaluate(single("zoo:math"), "search")
    assert failed.failed
    assert "zoo:math" in failed.error


def test_only_the_named_models_are_held(search):
    alone = Worker(search, find_models("zoo:base", ["zoo:math"])).evaluate(single("zoo:math"), "search")
    assert without_time(alone) == without_time(Worker(search).evaluate(single("zoo:math"), "search"))


def test_an_unknown_device_is_an_input_error():
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == accelerator()
    with pytest.raises(InputError, match=r"evaluation.device is 'abacus'; valid names: auto, cpu, cuda, cuda:N"):
        resolve_device("abacus")
    with pytest.raises(InputError, match=r"evaluation.device is 'cuda:99'"):
        resolve_device("cuda:99")


def test_a_worker_spreads_its_models_over_the_whole_gpus_that_it_has(search, monkeypatch):
    monkeypatch.setattr("evomerge.devices.device_count", lambda kind: 2)

    def count(gpus, device="cuda"):
        return count_gpus(search.model_copy(update={"workers": WorkersConfig(num_gpus=gpus)}), device)

    assert [count(gpus) for gpus in (None, 0, 0.5, 1, 2)] == [1, 1, 1, 1, 2]
    assert count(2, "cpu") == 1
    with pytest.raises(InputError, match=r"workers\.num_gpus is 3, but torch sees 2 CUDA devices here"):
        count(3)


def descent(**changes):
    names = (("base_qa", 1.0), ("cross_math_b", 0.5))
    usual = {"step": 1, "share": 0.5, "shard": 0, "shards": 1, "weights": names, "wanted": ("weight",)}
    return Descent(**(usual | changes))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gradient_is_bit_for_bit_the_same_again_and_that_of_the_evaluated_weights(checkpointing, search_file):
    optimizer = {"evaluations": 20, "population": 8, "learning": {"checkpointing": checkpointing}}
    file = search_file(evaluation={"device": "cpu", "dtype": "float32"}, optimizer=optimizer)
    worker = Worker(files.load(file))
    first = worker.descend(merge(0.6), descent())
    evaluation = worker.evaluate(merge(0.6), "search")
    again = worker.descend(merge(0.6), descent())
    assert isinstance(first, Gradient)
    assert (first.losses, first.slopes, first.fingerprint) == (again.losses, again.slopes, again.fingerprint)
    assert first.fingerprint == evaluation.fingerprint
    assert first.seconds > 0
    assert set(first.losses) == {"base_qa", "cross_math_b"}
    tensors = set(named_weights(worker.models.model))
    places = {(name, model, "weight") for name in tensors for model in ("zoo:math", "zoo:lang")}
    assert set(first.slopes) == places
    assert without_time(worker.evaluate(merge(0.6), "search")) == without_time(evaluation)


def test_a_step_along_the_gradient_changes_the_loss_as_it_says(worker):
    everything, step = descent(share=1.0), 0.01
    gradient = worker.descend(linear({"zoo:math": 0.5, "zoo:lang": 0.6}), everything)

    def loss(weight):
        recipe = linear({"zoo:math": weight, "zoo:lang": 0.6})
        losses = worker.descend(recipe, descent(share=1.0, wanted=())).losses
        return losses["base_qa"] + 0.5 * losses["cross_math_b"]

    slope = sum(value for (_, model, _), value in gradient.slopes.items() if model == "zoo:math")
    assert slope == pytest.approx((loss(0.5 + step) - loss(0.5 - step)) / (2 * step), rel=1e-2, abs=1e-3)


def test_shards_of_a_gradient_sum_up_to_the_whole_and_take_one_merge(worker, monkeypatch):
    whole, merges = worker.descend(merge(0.6), descent()), []
    worker.descend(merge(0.3), descent())
    materialize = worker.models.materialize
    monkeypatch.setattr(worker.models, "materialize", lambda *given: merges.append(given[0]) or materialize(*given))
    parts = [worker.descend(merge(0.6), descent(shard=shard, shards=3)) for shard in range(3)]
    assert len(merges) == 1
    largest = max(map(abs, whole.slopes.values()))
    for place, slope in whole.slopes.items():
        assert sum(part.slopes.get(place, 0.0) for part in parts) == pytest.approx(slope, rel=1e-3, abs=1e-5 * largest)
    assert {name: sum(part.losses[name] for part in parts) for name in whole.losses} == pytest.approx(whole.losses)


def test_a_gradient_of_weights_that_are_no_numbers_is_a_failed_evaluation(worker):
    before = worker.descend(merge(0.6), descent())
    failed = worker.descend(linear({"zoo:math": 1e41, "zoo:lang": -1e41}), descent())
    assert failed.failed
    assert failed.error.startswith("non-finite weights after the merge in model.")
    assert worker.descend(merge(0.6), descent()).slopes == before.slopes


def test_a_gradient_of_a_method_without_derivatives_has_losses_and_no_slopes(worker):
    recipe = merge(0.6).model_copy(update={"merge_method": "karcher", "base_model": None})
    gradient = worker.descend(recipe, descent())
    assert gradient.slopes == {}
    assert set(gradient.losses) == {"base_qa", "cross_math_b"}
