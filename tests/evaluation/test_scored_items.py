"""Which items are scored for which split, limit and subset, and what is told of each."""

import numpy as np
import pytest

from evomerge.candidate import Subset
from evomerge.evaluation.harness import Harness
from tests.evaluation.material import asked, questions
from tests.evaluation.reference import lm_eval_says


def test_a_task_with_two_splits_is_searched_on_the_first_and_reported_on_the_second(load, qa_task, search_config):
    qa_task(count=12)
    model = load("base")
    assert asked(search_config("qa"), model, "search") == [row["question"] for row in questions(12, seed=2)]
    assert asked(search_config("qa"), model, "heldout") == [row["question"] for row in questions(16, seed=3)]


@pytest.mark.parametrize("splits", [{"validation_split": None}, {"test_split": None}])
def test_a_task_with_one_split_is_divided_and_two_harnesses_divide_it_alike(splits, load, qa_task, search_config):
    qa_task(**splits)
    config = search_config("qa", items={"search_fraction": 0.4})
    search, heldout = (asked(config, load("base"), split) for split in ("search", "heldout"))
    assert set(search).isdisjoint(heldout)
    assert len(search) + len(heldout) == (16 if splits == {"validation_split": None} else 12)
    assert [search, heldout] == [asked(config, load("base"), split) for split in ("search", "heldout")]


def test_a_class_task_with_two_splits_is_searched_on_the_first_too(load, qa_task, search_config, tmp_path):
    qa_task()
    (tmp_path / "mine.py").write_text(
        "from lm_eval.api.task import ConfigurableTask\n"
        "class Mine(ConfigurableTask):\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config={key: value for key, value in config.items() if key != 'class'})\n"
        "    def has_test_docs(self):\n"
        "        return True\n"
        "    def test_docs(self):\n"
        "        return self.dataset['heldout']\n"
    )
    file = tmp_path / "qa.yaml"
    file.write_text(file.read_text() + "class: !function mine.Mine\n")
    config = search_config("qa", tasks={"paths": [str(tmp_path)], "allow_code": ["qa"]})
    assert asked(config, load("base"), "search") == [row["question"] for row in questions(12, seed=2)]
    assert asked(config, load("base"), "heldout") == [row["question"] for row in questions(16, seed=3)]


def test_a_limited_number_of_items_is_scored_as_lm_eval_scores_those_very_items(load, qa_task, search_config):
    task = qa_task(count=20, validation_split=None)
    config = search_config("qa", "qa:perplexity", items={"search": 7, "heldout": 9})
    harness = Harness(config, *load("base"))
    scores = harness.evaluate("search")
    chosen = [instance.doc_id for instance in harness._splits["search"].whole.likelihoods]
    metrics, items = lm_eval_says(task, *load("base"), samples=chosen)
    assert scores.items == len(items) == 7
    assert [item["doc_id"] for item in items] == chosen == sorted(set(chosen))
    assert scores.scores["qa:perplexity"] == pytest.approx(metrics["perplexity,none"], rel=1e-4)
    assert harness.evaluate("heldout").items == 9


def test_every_item_has_one_outcome_and_the_score_is_their_mean(load, choice_task, search_config):
    choice_task(count=31)
    scores = Harness(search_config("choice", "choice:acc_norm"), *load("qwen2")).evaluate("search")
    assert scores.items == 31
    assert {name: each.count for name, each in scores.outcomes.items()} == dict.fromkeys(scores.scores, 31)
    for name, outcomes in scores.outcomes.items():
        assert outcomes.values.mean() == scores.scores[name]


def test_a_score_that_is_no_mean_over_items_has_no_outcomes(load, qa_task, search_config):
    qa_task()
    scores = Harness(search_config("qa", "qa:perplexity"), *load("base")).evaluate("search")
    assert set(scores.scores) == {"qa", "qa:perplexity"}
    assert set(scores.outcomes) == {"qa"}


def test_a_subset_s_outcomes_are_those_of_the_same_items_among_all(
    load, qa_task, choice_task, generation_task, search_config
):
    qa_task()
    choice_task()
    generation_task(generation_kwargs={"max_gen_toks": 4})
    harness = Harness(search_config("qa", "choice", "writing:exact_match"), *load("math"))
    whole, again = harness.evaluate("search"), []
    for number in range(6):
        subset = Subset(number, 0.4)
        scores = harness.evaluate("search", subset=subset)
        assert scores.items == sum(outcomes.count for outcomes in scores.outcomes.values()) < whole.items
        for name, outcomes in scores.outcomes.items():
            all_items = whole.outcomes[name]
            assert outcomes.count == round(0.4 * all_items.count)
            assert outcomes.values.tolist() == all_items.values[outcomes.places].tolist()
            assert scores.scores[name] == pytest.approx(outcomes.values.mean())
            if outcomes.margins is not None:
                np.testing.assert_allclose(outcomes.margins, all_items.margins[outcomes.places], atol=2e-3, rtol=1e-3)
        again.append((subset, scores))
    assert len({scores.outcomes["qa"].places.tobytes() for _, scores in again}) > 1
    assert all(harness.evaluate("search", subset=subset) == scores for subset, scores in again)
    assert harness.evaluate("search") == whole
