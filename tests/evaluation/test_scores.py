"""Scores, log-likelihoods and margins are lm-eval's own."""

from random import Random

import pytest

from evomerge.evaluation.harness import Harness
from tests.evaluation.material import ARCHITECTURES, MEAN, choices, sentence
from tests.evaluation.reference import lm_eval_says
from tests.searches import EVALS


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


@pytest.mark.parametrize(
    ("model", "task", "answer"),
    [
        ("math", "math_a", " {{answer}} <eos>"),
        ("math", "math_a_words", " {{answer}} <eos>"),
        ("lang", "lang_b", " {{answer}} <eos>"),
        ("base", "cross_math_b", " {{answer}} <eos>"),
    ],
)
def test_the_zoo_s_accuracies_are_lm_eval_s(model, task, answer, load, zoo_task, search_config):
    scores = Harness(search_config(task, tasks={"paths": [str(EVALS)]}), *load(model)).evaluate("search")
    metrics, items = lm_eval_says(zoo_task(task, answer), *load(model))
    assert scores.scores == {task: metrics["acc,none"]}
    assert scores.outcomes[task].values.tolist() == [item["acc"] for item in items]
    assert scores.items == len(items) == 200


@pytest.mark.parametrize("split", ["search", "heldout"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_likelihoods_are_lm_eval_s(architecture, split, load, qa_task, search_config):
    task = qa_task()
    scores = Harness(search_config("qa", "qa:perplexity"), *load(architecture)).evaluate(split)
    metrics, _ = lm_eval_says(task | {"test_split": split}, *load(architecture))
    assert scores.scores["qa"] == metrics["acc,none"]
    assert scores.scores["qa:perplexity"] == pytest.approx(metrics["perplexity,none"], rel=1e-4)


@pytest.mark.parametrize("metric", ["acc", "acc_norm", "acc_mutual_info"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_multiple_choice_is_lm_eval_s(architecture, metric, load, choice_task, search_config):
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
    architecture, sharing, load, write_task, search_config
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
    load, qa_task, choice_task, search_config
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_perplexity_of_texts_longer_than_the_context_is_lm_eval_s(architecture, load, write_task, search_config):
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
