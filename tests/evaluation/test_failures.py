"""What cannot be scored fails, instead of scoring by chance."""

import math

import pytest
import torch

from evomerge.errors import CandidateFailed, InputError
from evomerge.evaluation.harness import Harness
from tests.evaluation.material import MEAN


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
