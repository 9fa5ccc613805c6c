"""What moves no score: the order of objectives, other candidates before, the batch size. And the harness is silent."""

import copy

import pytest
import torch

from evomerge.evaluation.harness import Harness


def test_the_order_of_the_objectives_changes_no_score(load, qa_task, choice_task, search_config):
    qa_task()
    choice_task()
    names = ["qa", "choice", "choice:acc_norm"]
    forth, back = (Harness(search_config(*order), *load("qwen2")).evaluate("search") for order in (names, names[::-1]))
    assert forth.scores == pytest.approx(back.scores, abs=1e-6)
    assert {name: each.values.tolist() for name, each in forth.outcomes.items()} == {
        name: each.values.tolist() for name, each in back.outcomes.items()
    }


def test_a_model_scores_bit_for_bit_the_same_after_others_took_its_place(
    load, qa_task, choice_task, generation_task, search_config
):
    qa_task()
    choice_task()
    generation_task(repeats=3, generation_kwargs={"max_gen_toks": 4, "do_sample": True, "temperature": 3.0})
    model, tokenizer = load("math")
    harness = Harness(search_config("qa:perplexity", "choice", "writing:exact_match"), model, tokenizer)
    weights = copy.deepcopy(model.state_dict())
    before = harness.evaluate("search")
    model.load_state_dict(load("lang")[0].state_dict())
    other = harness.evaluate("search")
    torch.rand(3)
    model.load_state_dict(weights)
    assert harness.evaluate("search") == before
    assert other.scores != before.scores


def test_the_batch_size_changes_no_score_beyond_rounding(load, qa_task, choice_task, search_config):
    qa_task()
    choice_task()
    scores = [
        Harness(search_config("qa:perplexity", "choice", evaluation={"batch_size": size}), *load("gpt2")).evaluate(
            "search"
        )
        for size in (1, 3, 500)
    ]
    assert scores[0].scores["choice"] == scores[1].scores["choice"] == scores[2].scores["choice"]
    perplexities = [score.scores["qa:perplexity"] for score in scores]
    assert perplexities == pytest.approx([perplexities[0]] * 3, rel=1e-4)


def test_metrics_that_are_only_reported_are_measured_on_held_out_items_alone_and_move_no_other_score(
    load, qa_task, choice_task, search_config
):
    qa_task()
    choice_task()
    items = {"search": 10, "heldout": 12}
    alone, whole = search_config("qa:perplexity", items=items), search_config("qa", "choice", items=items)
    report = [{"task": "qa"}, {"task": "choice"}]
    beside = search_config("qa:perplexity", items=items, report=report)
    plain, other, reported = (Harness(config, *load("qwen2")) for config in (alone, whole, beside))
    assert reported.evaluate("search") == plain.evaluate("search")
    mine, without = reported.evaluate("heldout"), plain.evaluate("heldout")
    assert mine.scores["qa:perplexity"] == without.scores["qa:perplexity"]
    assert set(mine.scores) == {"qa:perplexity", "qa", "choice"}
    theirs = other.evaluate("heldout")
    for name in ("qa", "choice"):
        assert mine.scores[name] == theirs.scores[name]
        assert mine.outcomes[name].values.tolist() == theirs.outcomes[name].values.tolist()
    assert mine.items == theirs.items == without.items + 12


def test_nothing_is_printed(load, choice_task, generation_task, search_config, capfd):
    choice_task()
    generation_task()
    Harness(search_config("choice", "writing:exact_match"), *load("math")).evaluate("search")
    assert capfd.readouterr() == ("", "")
