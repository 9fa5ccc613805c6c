"""The harness against lm-eval's own evaluate, and what a search relies on beyond it."""

import copy
import json
import math
from pathlib import Path
from random import Random

import lm_eval.utils
import numpy as np
import pytest
import torch
import yaml
from jinja2 import BaseLoader, Environment, StrictUndefined
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch.nn import functional

from evomerge.candidate import Subset
from evomerge.errors import CandidateFailed, InputError
from evomerge.evaluation.few_shots import SEED as FEWSHOT_SEED
from evomerge.evaluation.harness import Harness
from evomerge.evaluation.items import Division
from evomerge.evaluation.loading import check_metrics, distinct_tasks, exam_warnings, load_targets
from evomerge.zoo.language import DIGITS, NAMES, NUMBERS, OBJECTS, VERBS

EVALS = Path(__file__).parents[2] / "evals"
WORDS = (*DIGITS, *NAMES, *NUMBERS, *OBJECTS, *VERBS)
MEAN = {"aggregation": "mean", "higher_is_better": True}
ARCHITECTURES = ("llama", "qwen2", "gpt2", "gemma3")


@pytest.fixture
def lm_eval_says(monkeypatch):
    """(metrics, one dictionary per item) of lm-eval's evaluate on a task's test split."""

    def run(task, model, tokenizer, samples=None, **options):
        plain = Environment(loader=BaseLoader, undefined=StrictUndefined, keep_trailing_newline=True)
        with monkeypatch.context() as patch:
            patch.setattr(lm_eval.utils, "env", plain)
            reference = ConfigurableTask(config=copy.deepcopy(task))
            reference.set_fewshot_seed(FEWSHOT_SEED)
            results = evaluate(
                lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=7),
                task_dict={"tasks": {task["task"]: reference}},
                samples=samples and {task["task"]: samples},
                bootstrap_iters=0,
                **options,
            )
        return results["results"][task["task"]], results["samples"][task["task"]]

    return run


def sentence(rng, low, high):
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def questions(count, seed=0):
    """Different questions, each with an answer of one to three words."""
    rng = Random(seed)
    rows = {sentence(rng, 3, 9): sentence(rng, 1, 3) for _ in range(2 * count)}
    return [{"question": question, "answer": answer} for question, answer in list(rows.items())[:count]]


def choices(count, seed=0):
    """Questions with two to four options of one to four words, some of them sharing their first words."""
    rng = Random(seed)
    rows = []
    for _ in range(count):
        stem = sentence(rng, 1, 2)
        options = [*dict.fromkeys([stem, f"{stem} {sentence(rng, 1, 2)}", *(sentence(rng, 1, 2) for _ in range(2))])]
        rows.append({"question": sentence(rng, 2, 8), "options": options, "gold": rng.randrange(len(options))})
    return rows


@pytest.fixture
def zoo_task():
    """A shipped task's settings as lm-eval takes them, with its search items as the ones to evaluate."""

    def read(name, answer):
        files = {"search": str(EVALS / name / "search.jsonl")}
        return {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "test_split": "search",
            "output_type": "loglikelihood",
            "doc_to_text": "<bos> Q {{question}} =",
            "doc_to_target": answer,
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", **MEAN}],
        }

    return read


@pytest.fixture
def qa_task(write_task):
    """A log-likelihood task with a search, a held-out and a training split."""

    def write(name="qa", count=12, **settings):
        splits = {
            "train": questions(9, seed=1),
            "search": questions(count, seed=2),
            "heldout": questions(count + 4, seed=3),
        }
        defaults = {
            "validation_split": "search",
            "test_split": "heldout",
            "output_type": "loglikelihood",
            "doc_to_text": "<bos> Q {{question}} =",
            "doc_to_target": " {{answer}}",
            "metric_list": [
                {"metric": "acc", **MEAN},
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        }
        return write_task(name, splits, **(defaults | settings))

    return write


@pytest.fixture
def choice_task(write_task):
    """A multiple-choice task with templates for options and answer."""

    def write(name="choice", count=25, metrics=("acc", "acc_norm"), **settings):
        defaults = {
            "validation_split": "search",
            "test_split": "heldout",
            "output_type": "multiple_choice",
            "doc_to_text": "<bos> Q {{question}} =",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "{{gold}}",
            "target_delimiter": " ",
            "metric_list": [{"metric": metric, **MEAN} for metric in metrics],
        }
        splits = {"search": choices(count, seed=4), "heldout": choices(count, seed=5)}
        return write_task(name, splits, **(defaults | settings))

    return write


@pytest.fixture
def generation_task(write_task):
    """Two-step sums to be answered by writing; `word` takes the first word written, `digit` the first digit."""

    def write(name="writing", **settings):
        def filters(name, pattern):
            steps = [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]
            return {"name": name, "filter": steps}

        lines = (EVALS / "math_a_words" / "search.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines[:40]]
        defaults = {
            "validation_split": "search",
            "test_split": "heldout",
            "output_type": "generate_until",
            "doc_to_text": "<bos> Q {{question}} =",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 6, "do_sample": False},
            "filter_list": [filters("word", r"(\w+)"), filters("digit", r"(\d)")],
            "metric_list": [{"metric": "exact_match", **MEAN}],
        }
        return write_task(name, {"search": rows[:24], "heldout": rows[24:]}, **(defaults | settings))

    return write


def check(config):
    targets = load_targets(config.measured, config.tasks, config.evaluation)
    checked = check_metrics(config, targets).objectives
    Division(distinct_tasks(targets), config.items)
    return checked


# Scores are lm-eval's


@pytest.mark.parametrize(
    ("model", "task", "answer"),
    [
        ("math", "math_a", " {{answer}} <eos>"),
        ("math", "math_a_words", " {{answer}} <eos>"),
        ("lang", "lang_b", " {{answer}} <eos>"),
        ("base", "cross_math_b", " {{answer}} <eos>"),
    ],
)
def test_the_zoo_s_accuracies_are_lm_eval_s(model, task, answer, load, zoo_task, search_config, lm_eval_says):
    scores = Harness(search_config(task, tasks={"paths": [str(EVALS)]}), *load(model)).evaluate("search")
    metrics, items = lm_eval_says(zoo_task(task, answer), *load(model))
    assert scores.scores == {task: metrics["acc,none"]}
    assert scores.outcomes[task].values.tolist() == [item["acc"] for item in items]
    assert scores.items == len(items) == 200


@pytest.mark.parametrize("split", ["search", "heldout"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_likelihoods_are_lm_eval_s(architecture, split, load, qa_task, search_config, lm_eval_says):
    task = qa_task()
    scores = Harness(search_config("qa", "qa:perplexity"), *load(architecture)).evaluate(split)
    metrics, _ = lm_eval_says(task | {"test_split": split}, *load(architecture))
    assert scores.scores["qa"] == metrics["acc,none"]
    assert scores.scores["qa:perplexity"] == pytest.approx(metrics["perplexity,none"], rel=1e-4)


@pytest.mark.parametrize("metric", ["acc", "acc_norm", "acc_mutual_info"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_multiple_choice_is_lm_eval_s(architecture, metric, load, choice_task, search_config, lm_eval_says):
    task = choice_task(metrics=[metric])
    config = search_config(f"choice:{metric}", evaluation={"prefix_sharing": "mask"})
    scores = Harness(config, *load(architecture)).evaluate("heldout")
    metrics, items = lm_eval_says(task, *load(architecture))
    (score,) = scores.scores.values()
    (outcomes,) = scores.outcomes.values()
    assert score == metrics[f"{metric},none"]
    assert outcomes.values.tolist() == [item[metric] for item in items]
    assert 0 < score < 1
    assert ((outcomes.margins > 0) == (outcomes.values == 1)).all()


def mixed_questions(count, seed):
    """Short, long and empty questions; questions beyond the context of 64 tokens; options of one to five tokens, some
    beginning alike."""
    rng = Random(seed)
    rows = choices(count, seed)
    for number, row in enumerate(rows):
        row["question"] = ["", sentence(rng, 1, 2), sentence(rng, 30, 40), sentence(rng, 70, 120)][number % 4]
        row["options"].append(row["options"][0] + " " + sentence(rng, 2, 4))
    return rows


@pytest.mark.parametrize("sharing", ["mask", "none"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_option_s_log_likelihood_is_lm_eval_s_whatever_its_length_and_its_question_s(
    architecture, sharing, load, write_task, search_config, lm_eval_says
):
    task = write_task(
        "mixed",
        {"search": mixed_questions(16, seed=6), "heldout": mixed_questions(4, seed=7)},
        validation_split="search",
        test_split="heldout",
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{options}}",
        doc_to_target="{{gold}}",
        target_delimiter=" ",
        metric_list=[{"metric": "acc", **MEAN}],
    )
    model, tokenizer = load(architecture)
    harness = Harness(search_config("mixed", evaluation={"prefix_sharing": sharing}), model, tokenizer)
    scores = harness.evaluate("search")
    metrics, items = lm_eval_says(task | {"test_split": "search"}, model, tokenizer)
    theirs = [answer[0] for item in items for answer in item["resps"]]
    ours = [instance.resps[0] for instance in harness._splits["search"].whole.likelihoods]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert scores.scores["mixed"] == metrics["acc,none"]
    assert any(batch.segments is not None for batch in harness._splits["search"].whole.requests.batches) == (
        sharing == "mask"
    )
    room = model.config.max_position_embeddings
    long = [len(tokenizer.encode(text)) > room + 1 for item in items for text in map("".join, item["arguments"])]
    assert scores.truncated == sum(long)
    assert any(long) == (architecture != "llama")


def test_margins_are_the_leads_of_the_right_options_and_for_one_answer_of_its_closest_token(
    load, qa_task, choice_task, search_config, lm_eval_says
):
    task = choice_task(metrics=["acc", "acc_norm"])
    qa_task()
    scores = Harness(search_config("choice", "choice:acc_norm", "qa"), *load("math")).evaluate("heldout")
    _, items = lm_eval_says(task, *load("math"))
    for name, lengths in (("choice", lambda _: 1), ("choice:acc_norm", len)):
        for item, margin in zip(items, scores.outcomes[name].margins, strict=True):
            options = item["doc"]["options"]
            values = [answer[0][0] / lengths(option) for answer, option in zip(item["resps"], options, strict=True)]
            right = values.pop(item["doc"]["gold"])
            assert margin == pytest.approx(right - max(values), abs=2e-3, rel=1e-3)
    answered = scores.outcomes["qa"]
    assert ((answered.margins > 0) == (answered.values == 1)).all()


def test_a_model_that_takes_no_packed_rows_is_refused_them(load, choice_task, search_config):
    from transformers import BloomConfig, BloomForCausalLM

    choice_task()
    model = BloomForCausalLM(BloomConfig(vocab_size=79, hidden_size=32, n_layer=1, n_head=2)).eval()
    harness = Harness(search_config("choice", evaluation={"prefix_sharing": "mask"}), model, load("base")[1])
    with pytest.raises(InputError, match=r"evaluation.prefix_sharing is 'mask', which this model does not take"):
        harness.prepare("search")


def test_a_model_that_takes_masks_and_misreads_them_is_refused_packed_rows(
    load, choice_task, search_config, monkeypatch
):
    choice_task()
    config = search_config("choice", evaluation={"prefix_sharing": "mask"})
    monkeypatch.setattr("evomerge.evaluation.prepared.attention", lambda *_: None)
    with pytest.raises(InputError, match=r"log-likelihoods differ by .* from those without; set it to 'none'"):
        Harness(config, *load("qwen2")).prepare("search")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_perplexity_of_texts_longer_than_the_context_is_lm_eval_s(
    architecture, load, write_task, search_config, lm_eval_says
):
    rng = Random(0)
    rows = [{"text": sentence(rng, low, low + 9)} for low in (1, 40, 130, 300)]
    task = write_task(
        "text",
        {"heldout": rows, "search": [{"text": "tom has two keys"}, {"text": "ann"}]},
        validation_split="search",
        test_split="heldout",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": metric} for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    )
    names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    scores = Harness(search_config(*(f"text:{name}" for name in names)), *load(architecture)).evaluate("heldout")
    metrics, _ = lm_eval_says(task, *load(architecture))
    assert scores.scores == {f"text:{name}": pytest.approx(metrics[f"{name},none"], rel=1e-4) for name in names}
    assert scores.outcomes == {}


@pytest.mark.parametrize("name", ["word", "digit"])
@pytest.mark.parametrize("model", ["math", "base", "qwen2", "gpt2", "gemma3"])
def test_written_answers_are_lm_eval_s_and_the_objective_picks_the_filter(
    model, name, load, generation_task, search_config, lm_eval_says
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


def test_majority_votes_see_as_many_answers_as_the_task_repeats(load, generation_task, search_config, lm_eval_says):
    vote = [{"function": "take_first_k", "k": 3}, {"function": "majority_vote"}, {"function": "take_first"}]
    steps = [{"function": "regex", "regex_pattern": r"(\w+)"}, *vote]
    task = generation_task(repeats=3, filter_list=[{"name": "vote", "filter": steps}])
    scores = Harness(search_config("writing:exact_match"), *load("math")).evaluate("search")
    metrics, _ = lm_eval_says(task | {"test_split": "search"}, *load("math"))
    assert scores.scores == {"writing:exact_match": metrics["exact_match,vote"]}


@pytest.mark.parametrize("split", ["search", "heldout"])
def test_few_shot_scores_are_lm_eval_s(split, load, qa_task, search_config, lm_eval_says):
    task = qa_task(training_split="train", fewshot_split="train", fewshot_delimiter=" . ")
    config = search_config("qa", "qa:perplexity", evaluation={"num_fewshot": 2})
    scores = Harness(config, *load("base")).evaluate(split)
    metrics, _ = lm_eval_says(task | {"test_split": split, "num_fewshot": 2}, *load("base"))
    assert scores.scores["qa:perplexity"] == pytest.approx(metrics["perplexity,none"], rel=1e-4)


def test_a_chat_template_and_a_system_instruction_are_applied_as_lm_eval_does(
    load, qa_task, search_config, lm_eval_says
):
    task = qa_task()
    model, tokenizer = load("base")
    tokenizer.chat_template = "{% for m in messages %}{{ 'Q ' + m['content'] + ' = ' }}{% endfor %}"
    how = {"apply_chat_template": True, "system_instruction": "copy kim"}
    scores = Harness(search_config("qa:perplexity", evaluation=how), model, tokenizer).evaluate("heldout")
    metrics, _ = lm_eval_says(task, model, tokenizer, **how)
    plain = Harness(search_config("qa:perplexity"), model, tokenizer).evaluate("heldout")
    assert scores.scores["qa:perplexity"] == pytest.approx(metrics["perplexity,none"], rel=1e-4)
    assert scores.scores["qa:perplexity"] != pytest.approx(plain.scores["qa:perplexity"], rel=1e-2)


def test_examples_as_turns_of_a_conversation_are_lm_eval_s(load, qa_task, search_config, lm_eval_says):
    task = qa_task(training_split="train", fewshot_split="train")
    model, tokenizer = load("base")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] + ' ' + m['content'] + ' . ' }}{% endfor %}"
    how = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    config = search_config("qa:perplexity", evaluation={**how, "num_fewshot": 2})
    scores = Harness(config, model, tokenizer).evaluate("heldout")
    metrics, _ = lm_eval_says(task | {"num_fewshot": 2}, model, tokenizer, **how)
    assert scores.scores["qa:perplexity"] == pytest.approx(metrics["perplexity,none"], rel=1e-4)


def test_generation_arguments_of_the_search_go_over_the_task_s(load, generation_task, search_config, lm_eval_says):
    task = generation_task()
    arguments = {"max_gen_toks": 1, "until": ["x"]}
    config = search_config("writing:exact_match:word", evaluation={"generation_kwargs": arguments})
    scores = Harness(config, *load("math")).evaluate("search")
    changed = task | {"test_split": "search", "generation_kwargs": task["generation_kwargs"] | arguments}
    metrics, _ = lm_eval_says(changed, *load("math"))
    assert scores.scores == {"writing:exact_match": metrics["exact_match,word"]}


# Groups


@pytest.fixture
def group(qa_task, choice_task, tmp_path):
    """A group of a group, a tag and a task with a setting of its own; `by_size` as in aggregate_metric_list."""

    def write(by_size, **settings):
        metrics = ("acc",)
        choice_task("one", count=9, metrics=metrics)
        choice_task("two", count=14, metrics=metrics, tag="pair")
        choice_task("three", count=5, metrics=metrics, tag="pair")
        qa_task("four", metric_list=[{"metric": "acc", **MEAN}], training_split="train", fewshot_delimiter=" . ")
        aggregate = {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": by_size}]}
        inner = {"group": "inner", "task": ["pair"]}
        outer = {"group": "outer", "task": ["one", "inner", {"task": "four", "num_fewshot": 2}]} | aggregate | settings
        for document in (inner, outer):
            (tmp_path / f"{document['group']}.yaml").write_text(yaml.safe_dump(document))

    return write


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_s_score_is_lm_eval_s(by_size, load, group, search_config, tmp_path, monkeypatch):
    group(by_size)
    scores = Harness(search_config("outer", "two"), *load("qwen2")).evaluate("heldout")
    monkeypatch.chdir(tmp_path)
    loaded = TaskManager(include_path=str(tmp_path), include_defaults=False).load(["outer"])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    model, tokenizer = load("qwen2")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=7)
    results = evaluate(lm=lm, task_dict=loaded, bootstrap_iters=0)
    assert scores.scores["outer"] == pytest.approx(results["groups"]["outer"]["acc,none"])
    assert scores.scores["two"] == results["results"]["two"]["acc,none"]
    assert scores.items == sum(count["effective"] for count in results["n-samples"].values())
    assert 0 < scores.scores["outer"] < 1
    assert ("outer" in scores.outcomes) == by_size
    if by_size:
        assert scores.outcomes["outer"].values.mean() == pytest.approx(scores.scores["outer"])
        assert scores.outcomes["outer"].margins is not None


def test_a_metric_that_a_group_does_not_join_is_an_input_error(group, search_config):
    group(True, aggregate_metric_list=[{"metric": "acc_norm"}])
    with pytest.raises(InputError, match=r"objectives\[0\].metric is 'acc', which task 'outer' does not report"):
        check(search_config("outer"))


# Exams


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"validation_split": None}, "heldout"),
        ({"test_split": None}, "search"),
        ({}, None),
    ],
)
def test_searching_on_the_items_of_published_scores_is_warned_of(changes, warned, qa_task, search_config):
    qa_task(**changes)
    config = search_config("qa")
    targets = load_targets(config.objectives, config.tasks, config.evaluation)
    assert exam_warnings(targets) == ()  # the files are the user's own
    (task,) = targets["qa"].tasks
    task.config.dataset_path, task.config.dataset_kwargs = "owner/benchmark", None
    found = exam_warnings(targets)
    assert len(found) == (warned is not None)
    if warned is not None:
        assert found[0].startswith(f"objective qa: the search would choose by items of the {warned} split of owner/")


# Items


def documents(config, model, split):
    """The questions that a harness asks, in order."""
    harness = Harness(config, *model)
    harness.evaluate(split)
    return [instance.doc["question"] for instance in harness._splits[split].whole.likelihoods]


def test_a_task_with_two_splits_is_searched_on_the_first_and_reported_on_the_second(load, qa_task, search_config):
    qa_task(count=12)
    model = load("base")
    assert documents(search_config("qa"), model, "search") == [row["question"] for row in questions(12, seed=2)]
    assert documents(search_config("qa"), model, "heldout") == [row["question"] for row in questions(16, seed=3)]


@pytest.mark.parametrize("splits", [{"validation_split": None}, {"test_split": None}])
def test_a_task_with_one_split_is_divided_and_two_harnesses_divide_it_alike(splits, load, qa_task, search_config):
    qa_task(**splits)
    config = search_config("qa", items={"search_fraction": 0.4})
    search, heldout = (documents(config, load("base"), split) for split in ("search", "heldout"))
    assert set(search).isdisjoint(heldout)
    assert len(search) + len(heldout) == (16 if splits == {"validation_split": None} else 12)
    assert [search, heldout] == [documents(config, load("base"), split) for split in ("search", "heldout")]


def test_a_limited_number_of_items_is_scored_as_lm_eval_scores_those_very_items(
    load, qa_task, search_config, lm_eval_says
):
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


# Repetition


def test_the_order_of_the_objectives_changes_no_score(load, qa_task, choice_task, search_config):
    qa_task()
    choice_task()
    names = ["qa", "choice", "choice:acc_norm"]
    forth, back = (Harness(search_config(*order), *load("qwen2")).evaluate("search") for order in (names, names[::-1]))
    assert forth.scores == pytest.approx(back.scores, abs=1e-6)
    assert {name: each.values.tolist() for name, each in forth.outcomes.items()} == {
        name: each.values.tolist() for name, each in back.outcomes.items()
    }


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


def test_sampled_answers_leave_the_global_generator_alone(load, generation_task, search_config):
    generation_task(generation_kwargs={"max_gen_toks": 4, "do_sample": True, "temperature": 1.0})
    harness = Harness(search_config("writing:exact_match"), *load("math"))
    before = torch.get_rng_state()
    harness.evaluate("search")
    assert torch.equal(torch.get_rng_state(), before)


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


def test_nothing_is_printed(load, choice_task, generation_task, search_config, capfd):
    choice_task()
    generation_task()
    Harness(search_config("choice", "writing:exact_match"), *load("math")).evaluate("search")
    assert capfd.readouterr() == ("", "")


# What cannot be scored


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("task", ["qa", "choice"])
def test_a_model_whose_log_likelihoods_are_no_numbers_fails_instead_of_scoring_by_chance(
    task, value, load, qa_task, choice_task, search_config
):
    qa_task()
    choice_task()
    model, tokenizer = load("base")
    harness = Harness(search_config(task), model, tokenizer)
    before = harness.evaluate("search")
    weight = model.model.norm.weight
    with torch.no_grad():
        kept = weight.clone()
        weight.fill_(value)
        with pytest.raises(CandidateFailed, match=f"{task} is not a number"):
            harness.evaluate("search")
        weight.copy_(kept)
    assert harness.evaluate("search") == before


def test_a_perplexity_too_large_for_a_float_fails(load, qa_task, search_config):
    qa_task()
    model, tokenizer = load("base")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    with pytest.raises(CandidateFailed, match="qa:perplexity is inf"):
        Harness(search_config("qa:perplexity"), model, tokenizer).evaluate("search")


@pytest.mark.parametrize(
    ("question", "answer", "part"),
    [("how", "", "answer"), ("how", "many", "answer"), ("", "", "answer"), (" ", "how", "question")],
)
def test_a_question_or_an_answer_without_tokens_is_an_input_error_that_names_the_item(
    question, answer, part, load, write_task, search_config
):
    rows = [{"question": "how many", "answer": " three"}, {"question": question, "answer": answer}]
    write_task(
        "empty",
        {"search": rows, "heldout": rows},
        validation_split="search",
        test_split="heldout",
        output_type="loglikelihood",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc", **MEAN}],
    )
    with pytest.raises(InputError, match=rf"task 'empty': the {part} of item 1 .* has no tokens of its own"):
        Harness(search_config("empty"), *load("base")).evaluate("search")


def test_more_new_tokens_than_the_context_holds_are_an_input_error(load, generation_task, search_config):
    generation_task(generation_kwargs={"until": ["."], "max_gen_toks": 128})
    with pytest.raises(InputError, match=r"task 'writing' asks for 128 new tokens.*holds only 128"):
        Harness(search_config("writing:exact_match"), *load("base")).evaluate("search")


# Objectives


def test_goals_come_from_the_task_unless_the_objective_says_otherwise(qa_task, search_config):
    qa_task()
    objectives = [{"task": "qa"}, {"task": "qa", "metric": "perplexity"}]
    assert [objective.goal for objective in check(search_config(objectives=objectives))] == ["maximize", "minimize"]
    objectives[1]["goal"] = "maximize"
    assert [objective.goal for objective in check(search_config(objectives=objectives))] == ["maximize", "maximize"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objectives": [{"task": "qa"}, {"task": "qa", "metric": "perplexty"}]},
            r"objectives\[1\].metric.*'perplexity'",
        ),
        ({"objectives": [{"task": "qa", "filter": "nine"}]}, r"objectives\[0\].filter.*did you mean 'none'"),
        ({"items": {"search": 13}}, r"items.search asks for 13 items.*only 12"),
        ({"items": {"heldout": 17}}, r"items.heldout asks for 17 items.*only 16"),
    ],
)
def test_what_a_task_does_not_have_is_an_input_error_before_any_model_runs(changes, message, qa_task, search_config):
    qa_task()
    with pytest.raises(InputError, match=message):
        check(search_config("qa", **changes))


def test_a_task_that_lm_eval_cannot_load_is_an_input_error_with_its_file(qa_task, search_config, tmp_path):
    qa_task(doc_to_text="{{no_such_field}}")
    with pytest.raises(InputError, match=rf"{tmp_path / 'qa.yaml'}: lm-eval cannot load task 'qa'"):
        check(search_config("qa"))


def test_a_template_cannot_run_code(qa_task, search_config, tmp_path):
    trap = tmp_path / "trap"
    qa_task(doc_to_text="{{ cycler.__init__.__globals__.os.system('touch TRAP') }}".replace("TRAP", str(trap)))
    with pytest.raises(InputError, match="unsafe"):
        check(search_config("qa"))
    assert not trap.exists()


@pytest.mark.parametrize("extra", [{}, {"process_results": "no function"}])
@pytest.mark.parametrize("how", [{"metric": "accuracy_of_mine"}, {"metric": "exact_match", "hf_evaluate": True}])
def test_a_metric_that_would_be_fetched_and_run_is_refused_unless_allowed(
    how, extra, qa_task, search_config, monkeypatch
):
    import evaluate as library

    fetched = []
    monkeypatch.setattr(library, "load", lambda name: fetched.append(name) or functional)
    qa_task(metric_list=[{**how, **MEAN}], **extra)
    with pytest.raises(InputError, match=rf"metric '{how['metric']}'.*tasks.allow_code"):
        check(search_config(f"qa:{how['metric']}"))
    assert not fetched


def test_a_group_brings_no_such_metric_to_a_task_of_lm_eval(search_config, tmp_path):
    member = {"task": "arc_easy", "metric_list": [{"metric": "accuracy_of_mine", **MEAN}]}
    group = {"group": "mine", "task": [member], "aggregate_metric_list": [{"metric": "accuracy_of_mine"}]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(group))
    with pytest.raises(InputError, match=r"metric 'accuracy_of_mine'.*add 'arc_easy' to tasks.allow_code"):
        check(search_config("mine:accuracy_of_mine"))


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
    assert documents(config, load("base"), "search") == [row["question"] for row in questions(12, seed=2)]
    assert documents(config, load("base"), "heldout") == [row["question"] for row in questions(16, seed=3)]
