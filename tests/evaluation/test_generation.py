"""Texts that a model writes, and what filters make of them, are lm-eval's own."""

import pytest
import torch

from evomerge.evaluation.harness import Harness
from tests.evaluation.reference import lm_eval_says


@pytest.mark.parametrize("name", ["word", "digit"])
@pytest.mark.parametrize("model", ["math", "base", "qwen2", "gpt2", "gemma3"])
def test_written_answers_are_lm_eval_s_and_the_objective_picks_the_filter(
    model, name, load, generation_task, search_config
):
    task = generation_task()
    harness = Harness(search_config(f"writing:exact_match:{name}"), *load(model))
    scores = harness.evaluate("search")
    metrics, items = lm_eval_says(task | {"test_split": "search"}, *load(model))
    texts = {item["doc_id"]: item["resps"] for item in items}
    assert {each.doc_id: [each.resps] for each in harness._splits["search"].whole.generations} == texts
    assert scores.scores == {"writing:exact_match": metrics[f"exact_match,{name}"]}
    if model == "math":
        assert scores.scores["writing:exact_match"] == (pytest.approx(1, abs=0.2) if name == "word" else 0)


def test_without_a_filter_the_objective_takes_the_task_s_first(load, generation_task, search_config):
    generation_task()
    model = load("math")
    named = Harness(search_config("writing:exact_match:word"), *model).evaluate("search")
    assert Harness(search_config("writing:exact_match"), *model).evaluate("search") == named


def test_majority_votes_see_as_many_answers_as_the_task_repeats(load, generation_task, search_config):
    vote = [{"function": "take_first_k", "k": 3}, {"function": "majority_vote"}, {"function": "take_first"}]
    steps = [{"function": "regex", "regex_pattern": r"(\w+)"}, *vote]
    task = generation_task(repeats=3, filter_list=[{"name": "vote", "filter": steps}])
    scores = Harness(search_config("writing:exact_match"), *load("math")).evaluate("search")
    metrics, _ = lm_eval_says(task | {"test_split": "search"}, *load("math"))
    assert scores.scores == {"writing:exact_match": metrics["exact_match,vote"]}


def test_generation_arguments_of_the_search_go_over_the_task_s(load, generation_task, search_config):
    task = generation_task()
    arguments = {"max_gen_toks": 1, "until": ["x"]}
    config = search_config("writing:exact_match:word", evaluation={"generation_kwargs": arguments})
    scores = Harness(config, *load("math")).evaluate("search")
    changed = task | {"test_split": "search", "generation_kwargs": task["generation_kwargs"] | arguments}
    metrics, _ = lm_eval_says(changed, *load("math"))
    assert scores.scores == {"writing:exact_match": metrics["exact_match,word"]}


def test_sampled_answers_leave_the_global_generator_alone(load, generation_task, search_config):
    generation_task(generation_kwargs={"max_gen_toks": 4, "do_sample": True, "temperature": 1.0})
    harness = Harness(search_config("writing:exact_match"), *load("math"))
    before = torch.get_rng_state()
    harness.evaluate("search")
    assert torch.equal(torch.get_rng_state(), before)
