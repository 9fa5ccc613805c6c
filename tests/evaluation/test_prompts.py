"""Few-shot examples, chat templates and system instructions: lm-eval's own, and never an item's own answer."""

import pytest

from evomerge.evaluation.harness import Harness
from tests.evaluation.material import questions
from tests.evaluation.reference import lm_eval_says


@pytest.mark.parametrize("split", ["search", "heldout"])
def test_few_shot_scores_are_lm_eval_s(split, load, qa_task, search_config):
    task = qa_task(training_split="train", fewshot_split="train", fewshot_delimiter=" . ")
    config = search_config("qa", "qa:perplexity", evaluation={"num_fewshot": 2})
    scores = Harness(config, *load("base")).evaluate(split)
    metrics, _ = lm_eval_says(task | {"test_split": split, "num_fewshot": 2}, *load("base"))
    assert scores.scores["qa:perplexity"] == pytest.approx(metrics["perplexity,none"], rel=1e-4)


@pytest.mark.parametrize("test_split", ["heldout", None])
@pytest.mark.parametrize("source", [{"training_split": "train"}, {"fewshot_split": "train", "training_split": "kept"}])
def test_a_split_kept_for_selection_is_scored_as_lm_eval_scores_it(source, test_split, load, write_task, search_config):
    splits = {name: questions(12, seed) for seed, name in enumerate(("train", "search", "kept", "heldout"))}
    asked = {"output_type": "loglikelihood", "doc_to_text": "Q {{question}} =", "doc_to_target": " {{answer}}"}
    metric = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    task = write_task(
        "qa",
        splits,
        validation_split="search",
        test_split=test_split,
        metadata={"selection_split": "kept"},
        num_fewshot=2,
        metric_list=[metric],
        **asked,
        **source,
    )
    items = {"search": 6, "selection": 12, "heldout": 6}
    scores = Harness(search_config("qa:perplexity", items=items), *load("base")).evaluate("selection")
    asked_there = {"test_split": "kept"} if test_split else {"validation_split": "kept"}
    metrics, _ = lm_eval_says(task | asked_there, *load("base"))
    assert scores.items == 12
    assert scores.scores["qa:perplexity"] == pytest.approx(metrics["perplexity,none"], rel=1e-4)


def test_a_chat_template_and_a_system_instruction_are_applied_as_lm_eval_does(load, qa_task, search_config):
    task = qa_task()
    model, tokenizer = load("base")
    tokenizer.chat_template = "{% for m in messages %}{{ 'Q ' + m['content'] + ' = ' }}{% endfor %}"
    how = {"apply_chat_template": True, "system_instruction": "copy kim"}
    scores = Harness(search_config("qa:perplexity", evaluation=how), model, tokenizer).evaluate("heldout")
    metrics, _ = lm_eval_says(task, model, tokenizer, **how)
    plain = Harness(search_config("qa:perplexity"), model, tokenizer).evaluate("heldout")
    assert scores.scores["qa:perplexity"] == pytest.approx(metrics["perplexity,none"], rel=1e-4)
    assert scores.scores["qa:perplexity"] != pytest.approx(plain.scores["qa:perplexity"], rel=1e-2)


def test_examples_as_turns_of_a_conversation_are_lm_eval_s(load, qa_task, search_config):
    task = qa_task(training_split="train", fewshot_split="train")
    model, tokenizer = load("base")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] + ' ' + m['content'] + ' . ' }}{% endfor %}"
    how = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    config = search_config("qa:perplexity", evaluation={**how, "num_fewshot": 2})
    scores = Harness(config, model, tokenizer).evaluate("heldout")
    metrics, _ = lm_eval_says(task | {"num_fewshot": 2}, model, tokenizer, **how)
    assert scores.scores["qa:perplexity"] == pytest.approx(metrics["perplexity,none"], rel=1e-4)


@pytest.mark.parametrize(
    "splits",
    [
        {},
        {"fewshot_split": "search"},
        {"validation_split": None},
        {"validation_split": None, "fewshot_split": "heldout"},
        {"test_split": None},
        {"test_split": None, "fewshot_split": "search"},
    ],
)
def test_an_item_is_never_its_own_few_shot_example(splits, load, qa_task, search_config):
    qa_task(**splits, fewshot_delimiter=" . ")
    harness = Harness(search_config("qa", evaluation={"num_fewshot": 5}), *load("base"))
    harness.evaluate("search")
    for instance in harness._splits["search"].whole.likelihoods:
        context = instance.args[0]
        assert context.count("Q ") == 6
        assert context.count(instance.doc["question"]) == 1


def test_few_shot_examples_are_the_same_in_every_harness(load, qa_task, search_config):
    qa_task(training_split="train", fewshot_delimiter=" . ")
    config = search_config("qa", "qa:perplexity", evaluation={"num_fewshot": 3})
    first, second = (Harness(config, *load("base")) for _ in range(2))
    assert first.evaluate("search") == second.evaluate("search")
    for one, other in zip(
        first._splits["search"].whole.likelihoods, second._splits["search"].whole.likelihoods, strict=True
    ):
        assert one.args == other.args


def test_fewer_items_leave_the_contexts_of_the_others_alone(load, qa_task, search_config):
    qa_task(training_split="train", fewshot_delimiter=" . ")

    def contexts(**items):
        harness = Harness(search_config("qa", items=items, evaluation={"num_fewshot": 3}), *load("base"))
        harness.evaluate("search")
        return {instance.doc_id: instance.args for instance in harness._splits["search"].whole.likelihoods}

    assert contexts(search=5).items() < contexts().items()
