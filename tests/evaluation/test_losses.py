"""Losses against transformers in float64 on lm-eval's own prompts, whatever the batches, shards and mini-batches."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from evomerge.candidate import Descent
from evomerge.errors import CandidateFailed
from evomerge.evaluation.harness import Harness
from tests.evaluation.material import MEAN, WORDS, questions
from tests.evaluation.reference import lm_eval_says


def descent(*names: str, weight: float = 1.0, **changes: Any) -> Descent:
    usual = {"step": 0, "share": 1.0, "shard": 0, "shards": 1, "wanted": ()}
    return Descent(**{**usual, **changes}, weights=tuple((name, weight) for name in names))


class Float64:
    """A model in float64, and lm-eval's way of cutting texts into tokens."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._lm = HFLM(pretrained=model, tokenizer=tokenizer)
        self._model = model.double()

    @torch.no_grad()
    def tokens(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            return self._lm._encode_pair(context, continuation)
        return [self._lm.prefix_token_id], self._lm.tok_encode(continuation, add_special_tokens=False)

    @torch.no_grad()
    def __call__(self, context: str, continuation: str) -> float:
        """The log-likelihood of a continuation."""
        before, after = self.tokens(context, continuation)
        ids = torch.tensor([[*before, *after]])
        chances = self._model(ids).logits[0, :-1].log_softmax(-1)
        return float(chances.gather(1, ids[0, 1:, None])[len(before) - 1 :].sum())


def plain_loss(exact: Float64, pairs: list[tuple[str, str]]) -> float:
    tokens = sum(len(exact.tokens(*pair)[1]) for pair in pairs) / len(pairs)
    return -sum(exact(*pair) for pair in pairs) / len(pairs) / tokens


def choice_loss(exact: Float64, items: list[dict[str, Any]], length: Callable[[str], int], mutual: bool) -> float:
    losses = []
    for item in items:
        options = item["doc"]["options"]
        values = [exact(*pair) for pair in item["arguments"]]
        if mutual:
            values = [own - alone for own, alone in zip(values, values[len(options) :], strict=False)]
        scores = torch.tensor(
            [value / length(option) for value, option in zip(values, options, strict=False)], dtype=torch.float64
        )
        losses.append(-float(scores.log_softmax(0)[item["doc"]["gold"]]))
    return sum(losses) / len(losses)


def arguments(item: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in item["arguments"]]


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("name", ["base", "qwen2"])
def test_a_loglikelihood_s_loss_is_that_of_the_answer_after_lm_eval_s_prompt(name, shots, load, qa_task, search_config):
    task = qa_task(training_split="train", fewshot_split="train", fewshot_delimiter=" . ")
    harness = Harness(search_config("qa", evaluation={"num_fewshot": shots}), *load(name))
    _, items = lm_eval_says(task | {"test_split": "search", "num_fewshot": shots}, *load(name))
    exact = Float64(*load(name))
    expected = plain_loss(exact, [pair for item in items for pair in arguments(item)])
    assert harness.descend(harness._model, descent("qa"))["qa"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("metric", "length"),
    [
        ("acc", lambda option: 1),
        ("acc_norm", len),
        ("acc_bytes", lambda option: len(option.encode())),
        ("acc_mutual_info", lambda option: 1),
    ],
)
def test_a_choice_s_loss_is_the_cross_entropy_over_what_the_metric_compares(
    metric, length, load, choice_task, search_config
):
    task = choice_task(count=9, metrics=[metric])
    config = search_config(f"choice:{metric}")
    (name,) = (objective.name for objective in config.objectives)
    harness = Harness(config, *load("qwen2"))
    _, items = lm_eval_says(task | {"test_split": "search"}, *load("qwen2"))
    expected = choice_loss(Float64(*load("qwen2")), items, length, metric == "acc_mutual_info")
    (loss,) = harness.descend(harness._model, descent(name)).values()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_where_options_are_questions_the_loss_compares_the_answer_after_each(load, write_task, search_config):
    rows = [{"gold": n % 2, "options": [f"kim has {w}", f"lee has {w} kim"]} for n, w in enumerate(WORDS[:8])]
    task = write_task(
        "blanks",
        {"search": rows, "heldout": [{**row, "options": row["options"][::-1]} for row in rows]},
        validation_split="search",
        test_split="heldout",
        output_type="multiple_choice",
        doc_to_text="{{gold}}",
        doc_to_choice="options",
        doc_to_target="{{options[0][:3]}} has",
        target_delimiter=" ",
        metric_list=[{"metric": "acc", **MEAN}],
    )
    harness = Harness(search_config("blanks"), *load("qwen2"))
    _, items = lm_eval_says(task | {"test_split": "search"}, *load("qwen2"))
    assert all(len({answer for _, answer in arguments(item)}) == 1 for item in items)
    expected = choice_loss(Float64(*load("qwen2")), items, lambda option: 1, False)
    assert harness.descend(harness._model, descent("blanks"))["blanks"] == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def written(write_task) -> Callable[..., dict[str, Any]]:
    """Answers of one to three words, to be written up to a full stop."""

    def write(**settings: Any) -> dict[str, Any]:
        words = [{"function": "regex", "regex_pattern": r"(\w+(?: \w+)*)"}, {"function": "take_first"}]
        usual = {
            "validation_split": "search",
            "test_split": "heldout",
            "output_type": "generate_until",
            "doc_to_text": "<bos> Q {{question}} =",
            "doc_to_target": "{{answer}}",
            "target_delimiter": " ",
            "generation_kwargs": {"until": [" ."], "max_gen_toks": 6, "do_sample": False},
            "filter_list": [{"name": "words", "filter": words}],
            "metric_list": [{"metric": "exact_match", **MEAN}],
        }
        splits = {"train": questions(6, seed=1), "search": questions(10, seed=2), "heldout": questions(10, seed=3)}
        return write_task("writing", splits, **(usual | settings))

    return write


TEXT = "writing:exact_match"


@pytest.mark.parametrize("shots", [0, 2])
def test_a_text_s_loss_is_that_of_the_reference_after_lm_eval_s_prompt(shots, load, written, search_config):
    task = written(fewshot_split="train", fewshot_delimiter=" . ")
    harness = Harness(search_config(TEXT, evaluation={"num_fewshot": shots}), *load("base"))
    _, items = lm_eval_says(task | {"test_split": "search", "num_fewshot": shots}, *load("base"))
    pairs = [(item["arguments"][0][0], f" {item['doc']['answer']} .") for item in items]
    assert all(prompt.count(" . ") == shots for prompt, _ in pairs)
    (loss,) = harness.descend(harness._model, descent(*names_of(harness))).values()
    assert loss == pytest.approx(plain_loss(Float64(*load("base")), pairs), rel=1e-5)


def names_of(harness: Harness) -> list[str]:
    return [metric.name for metric in harness._config.measured]


def test_a_text_s_tokens_follow_those_of_the_prompt_whatever_they_would_be_together(load, written, search_config):
    """The words "= one" and "=one" have the same tokens apart, but "=one" is no word."""
    losses = []
    for delimiter in (" ", ""):
        written(target_delimiter=delimiter)
        harness = Harness(search_config(TEXT), *load("base"))
        losses.append(harness.descend(harness._model, descent(*names_of(harness))))
    assert losses[0] == losses[1]


def test_a_rolling_text_s_loss_is_that_of_its_windows(load, text_task, search_config):
    rows = [{"question": "kim " * number + row["question"]} for number, row in enumerate(questions(8, 1))]
    rows.append({"question": "", "answer": ""})
    text_task(rows)
    config = search_config("text:word_perplexity")
    harness = Harness(config, *load("base"))
    (name,) = (objective.name for objective in config.objectives)
    pairs = [("", row["question"]) for row in rows[:-1]]
    loss = harness.descend(harness._model, descent(name))[name]
    assert loss == pytest.approx(plain_loss(Float64(*load("base")), pairs), rel=1e-5)


@pytest.fixture
def three(qa_task, choice_task, generation_task, search_config, load) -> Callable[..., Harness]:
    """A harness of three tasks, of which items of one have no reference."""
    qa_task()
    choice_task(count=15)
    generation_task(target_delimiter=" ", generation_kwargs={"until": [" ."], "max_gen_toks": 6})

    def make(batch_size: int = 16) -> Harness:
        config = search_config(*NAMES[:2], f"{TEXT}:word", evaluation={"batch_size": batch_size})
        return Harness(config, *load("base"))

    return make


NAMES = ("qa", "choice:acc_norm", "writing:exact_match")


def slopes(harness: Harness, request: Descent) -> torch.Tensor:
    """The gradient on all parameters."""
    for parameter in harness._model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    harness.descend(harness._model, request)
    return torch.cat([parameter.grad.flatten() for parameter in harness._model.parameters()])


def test_losses_and_gradients_do_not_depend_on_the_batch_size(three):
    request = descent(*NAMES, wanted=("weight",))
    wide, narrow = three(64), three(1)
    losses = [harness.descend(harness._model, request) for harness in (wide, narrow)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    gradients = [slopes(harness, request) for harness in (wide, narrow)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("shards", [2, 3, 50])
def test_shards_sum_up_to_the_whole(share, shards, three):
    harness = three()
    whole = harness.descend(harness._model, descent(*NAMES, share=share, step=3))
    parts = [
        harness.descend(harness._model, descent(*NAMES, share=share, step=3, shard=shard, shards=shards))
        for shard in range(shards)
    ]
    assert {name: sum(part[name] for part in parts) for name in NAMES} == pytest.approx(whole, rel=1e-5)


def test_the_gradient_of_the_sum_is_the_weighted_sum_of_the_gradients(three):
    harness = three()
    qa, choice = (slopes(harness, descent(name, wanted=("weight",))) for name in NAMES[:2])
    both = replace(descent(wanted=("weight",)), weights=((NAMES[0], 2.0), (NAMES[1], -0.5)))
    expected = 2 * qa - 0.5 * choice
    torch.testing.assert_close(slopes(harness, both), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_step_s_mini_batch_is_always_the_same_and_another_step_s_is_another(three):
    harness = three()
    harness.prepare("search")
    losses = harness._splits["search"]._losses
    batches = [losses.chosen(descent(*NAMES, step=step, share=0.4)) for step in (1, 2, 1)]
    other = three()
    other.prepare("search")
    assert batches[0] == batches[2] == other._splits["search"]._losses.chosen(descent(*NAMES, step=1, share=0.4))
    assert all(batches[0][name] != batches[1][name] for name in NAMES)
    everything = losses.chosen(descent(*NAMES))
    assert [len(everything[name]) for name in NAMES[:2]] == [12, 15]
    assert all(0 < len(batches[0][name]) < len(everything[name]) for name in NAMES)
    assert all(item in everything[name] for name in NAMES for item in batches[0][name])
    parts = [losses.chosen(descent(*NAMES, shard=shard, shards=2)) for shard in (0, 1)]
    for name in NAMES:
        assert sorted(map(id, parts[0][name] + parts[1][name])) == sorted(map(id, everything[name]))


def test_metrics_without_weight_run_no_backward_pass(three):
    harness = three()
    plain = harness.descend(harness._model, descent(*NAMES))
    for parameter in harness._model.parameters():
        parameter.requires_grad_(True)
    assert harness.descend(harness._model, descent(*NAMES, weight=0.0, wanted=("weight",))) == plain
    assert all(parameter.grad is None for parameter in harness._model.parameters())


def test_losses_alone_are_told_where_no_derivative_is_wanted_or_there_is_none(three):
    harness = three()
    for parameter in harness._model.parameters():
        parameter.requires_grad_(False)
    losses = [harness.descend(harness._model, descent(*NAMES, wanted=wanted)) for wanted in ((), ("density",))]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_fails_the_candidate(value, three):
    harness = three()
    with torch.no_grad():
        next(harness._model.parameters())[5:] = value
    with pytest.raises(CandidateFailed, match="the loss of qa is nan"):
        harness.descend(harness._model, descent(*NAMES))


UNLABELLED = {"optimizer": {"learning": {"loss": "entropy"}}}


@torch.no_grad()
def entropy_after(exact: Float64, context: str) -> float:
    """The entropy of the token that follows a text."""
    ids = torch.tensor([exact._lm.tok_encode(context)])
    chances = exact._model(ids).logits[0, -1].log_softmax(-1)
    return -float((chances.exp() * chances).sum())


def test_without_labels_a_text_s_loss_is_the_entropy_of_its_first_token(load, written, search_config):
    task = written()
    harness = Harness(search_config(TEXT, **UNLABELLED), *load("base"))
    _, items = lm_eval_says(task | {"test_split": "search"}, *load("base"))
    exact = Float64(*load("base"))
    expected = sum(entropy_after(exact, item["arguments"][0][0]) for item in items) / len(items)
    (loss,) = harness.descend(harness._model, descent(*names_of(harness))).values()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_without_labels_a_loglikelihood_s_loss_is_the_entropy_where_its_answer_begins(load, qa_task, search_config):
    task = qa_task()
    harness = Harness(search_config("qa", **UNLABELLED), *load("qwen2"))
    _, items = lm_eval_says(task | {"test_split": "search"}, *load("qwen2"))
    exact, pairs = Float64(*load("qwen2")), [pair for item in items for pair in arguments(item)]
    contexts = [exact._lm.tokenizer.decode(exact.tokens(*pair)[0]) for pair in pairs]
    expected = sum(entropy_after(exact, context) for context in contexts) / len(contexts)
    assert harness.descend(harness._model, descent("qa"))["qa"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("metric", "length"), [("acc", lambda option: 1), ("acc_norm", len)])
def test_without_labels_a_choice_s_loss_is_the_entropy_over_its_options(
    metric, length, load, choice_task, search_config
):
    task = choice_task(count=9, metrics=[metric])
    config = search_config(f"choice:{metric}", **UNLABELLED)
    harness = Harness(config, *load("qwen2"))
    _, items = lm_eval_says(task | {"test_split": "search"}, *load("qwen2"))
    exact, losses = Float64(*load("qwen2")), []
    for item in items:
        pairs = zip(item["arguments"], item["doc"]["options"], strict=True)
        scores = torch.tensor([exact(*pair) / length(option) for pair, option in pairs], dtype=torch.float64)
        losses.append(-float((scores.softmax(0) * scores.log_softmax(0)).sum()))
    (loss,) = harness.descend(harness._model, descent(*names_of(harness))).values()
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_without_labels_answers_change_nothing(load, choice_task, written, search_config):
    losses = []
    for turned in (False, True):
        choice_task(count=9, **({"doc_to_target": "{{(gold + 1) % 2}}"} if turned else {}))
        written(doc_to_target="{{question}}" if turned else "{{answer}}")
        config = search_config("choice:acc", TEXT, **UNLABELLED)
        harness = Harness(config, *load("base"))
        losses.append(harness.descend(harness._model, descent(*names_of(harness))))
    assert losses[0] == losses[1]
