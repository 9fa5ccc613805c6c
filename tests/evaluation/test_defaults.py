"""What a search does not set is as in lm-eval: its defaults are written down here, so that a change of them is noticed,
and scores with nothing set are those of its `simple_evaluate`.
"""

import copy
import inspect
from dataclasses import fields
from random import Random

import lm_eval.utils
import pytest
from jinja2 import BaseLoader, Environment, StrictUndefined
from lm_eval.api.task import TaskConfig
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from evomerge.config.scoring import EvaluationConfig
from evomerge.evaluation.few_shots import SEED as FEWSHOT_SEED
from evomerge.evaluation.generation import SAMPLING_SEED
from evomerge.evaluation.harness import Harness
from evomerge.zoo.language import DIGITS, NAMES, NUMBERS, OBJECTS, VERBS

pytestmark = pytest.mark.slow  # lm-eval scores every case too

WORDS = (*DIGITS, *NAMES, *NUMBERS, *OBJECTS, *VERBS)
TEMPLATE = (
    "{% for m in messages %}{{ '<bos> Q ' + m['content'] + ' ' if m['role'] != 'assistant' else '= ' + m['content'] + "
    "' <eos> ' }}{% endfor %}{% if add_generation_prompt %}= {% endif %}"
)


def defaults(function: object) -> dict[str, object]:
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


def test_lm_eval_s_defaults_are_those_that_evaluation_follows() -> None:
    of_calls = defaults(simple_evaluate)
    assert {name: of_calls[name] for name in ("num_fewshot", "system_instruction", "gen_kwargs", "limit")} == {
        "num_fewshot": None,
        "system_instruction": None,
        "gen_kwargs": None,
        "limit": None,
    }
    assert of_calls["apply_chat_template"] is False
    assert of_calls["fewshot_as_multiturn"] is True  # which means something with a chat template only
    assert of_calls["fewshot_random_seed"] == FEWSHOT_SEED
    assert of_calls["torch_random_seed"] == SAMPLING_SEED
    of_command = {field.name: field.default for field in fields(EvaluatorConfig)}
    assert of_command["fewshot_as_multiturn"] is None  # it follows apply_chat_template then
    assert of_command["apply_chat_template"] is False


def test_lm_eval_takes_no_argument_that_nobody_has_looked_at() -> None:
    """Those that change a score are compared above and below; the others are about output, caches and machines."""
    looked_at = (
        "model_args tasks num_fewshot batch_size max_batch_size device use_cache cache_requests rewrite_requests_cache "
        "delete_requests_cache limit samples bootstrap_iters check_integrity write_out log_samples evaluation_tracker "
        "system_instruction apply_chat_template fewshot_as_multiturn gen_kwargs task_manager verbosity predict_only "
        "random_seed numpy_random_seed torch_random_seed fewshot_random_seed confirm_run_unsafe_code metadata"
    )
    assert set(defaults(simple_evaluate)) == set(looked_at.split())
    of_model = (
        "backend revision subfolder tokenizer truncation logits_cache max_length device dtype softmax_dtype "
        "mixed_precision_dtype batch_size max_batch_size trust_remote_code use_fast_tokenizer add_bos_token "
        "prefix_token_id parallelize max_memory_per_gpu max_cpu_memory offload_folder tp_plan peft delta autogptq "
        "gptqmodel gguf_file think_end_token enable_thinking chat_template_args"
    )
    assert set(defaults(HFLM.__init__)) == set(of_model.split())


def test_lm_eval_s_model_has_the_defaults_that_evaluation_follows() -> None:
    wanted = {
        "truncation": False,
        "max_length": None,
        "softmax_dtype": None,  # the one where float32 is taken instead
        "mixed_precision_dtype": None,
        "add_bos_token": None,
        "prefix_token_id": None,
        "think_end_token": None,
        "enable_thinking": None,
        "chat_template_args": None,
    }
    found = defaults(HFLM.__init__)
    assert {name: found[name] for name in wanted} == wanted
    assert HFLM._DEFAULT_MAX_LENGTH == 2048
    assert inspect.getattr_static(HFLM, "max_gen_toks").fget(None) == 256


def test_lm_eval_s_tasks_have_the_defaults_that_evaluation_follows() -> None:
    found = {field.name: field.default for field in fields(TaskConfig)}
    wanted = {
        "num_fewshot": None,
        "repeats": 1,
        "target_delimiter": " ",
        "fewshot_delimiter": "\n\n",
        "description": "",
        "gen_prefix": None,
        "generation_kwargs": None,
        "filter_list": None,
    }
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("written", [None, False, True])
def test_examples_are_turns_where_a_chat_template_is_applied_unless_the_file_says_otherwise(
    template: bool, written: bool | None
) -> None:
    evaluation = EvaluationConfig(apply_chat_template=template, fewshot_as_multiturn=written)
    assert evaluation.multiturn is (template if written is None else written)


def rows(count: int, seed: int) -> list[dict[str, object]]:
    random = Random(seed)

    def words(most: int) -> str:
        return " ".join(random.choices(WORDS, k=random.randint(1, most)))

    return [{"question": words(8), "options": [words(3), words(3) + " one"], "gold": n % 2} for n in range(count)]


KINDS = {
    "loglikelihood": {"doc_to_target": " {{options[0]}}", "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}]},
    "multiple_choice": {
        "doc_to_choice": "{{options}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "generate_until": {
        "doc_to_target": "{{options[0]}}",
        "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"max_gen_toks": 12},  # the models' context is short
    },
    "loglikelihood_rolling": {"doc_to_target": "{{question}}", "metric_list": [{"metric": "word_perplexity"}]},
}


@pytest.mark.parametrize(
    ("kind", "shots", "template"),
    [
        ("loglikelihood", None, False),
        ("loglikelihood", 2, True),
        ("multiple_choice", None, False),
        ("multiple_choice", None, True),
        ("multiple_choice", 2, False),
        ("multiple_choice", 2, True),
        ("multiple_choice", 0, True),
        ("generate_until", 2, False),
        ("generate_until", 2, True),
        ("loglikelihood_rolling", None, False),
    ],
)
def test_scores_with_nothing_else_set_are_those_of_simple_evaluate(
    kind, shots, template, write_task, search_config, load, monkeypatch
) -> None:
    own = {} if shots is None else {"num_fewshot": shots}
    task = write_task(
        "t",
        {"train": rows(8, 1), "search": rows(20, 2), "heldout": rows(9, 3)},
        validation_split="search",
        test_split="heldout",
        fewshot_split="train",
        output_type=kind,
        doc_to_text="{{question}}",
        target_delimiter=" ",
        **KINDS[kind],
        **own,
    )
    metrics = [entry["metric"] for entry in KINDS[kind]["metric_list"]]
    model, tokenizer = load("lang")
    tokenizer.chat_template = TEMPLATE
    evaluation = {"batch_size": 16, "apply_chat_template": template}
    config = search_config(*(f"t:{metric}" for metric in metrics), evaluation=evaluation)
    mine = Harness(config, model, tokenizer).evaluate("heldout").scores
    monkeypatch.setattr(
        lm_eval.utils, "env", Environment(loader=BaseLoader, undefined=StrictUndefined, keep_trailing_newline=True)
    )
    said = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3),
        tasks=[copy.deepcopy(task)],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=template,
        bootstrap_iters=0,
        log_samples=False,
    )["results"]["t"]
    for metric in metrics:
        name = "t" if metric == "acc" else f"t:{metric}"
        assert mine[name] == pytest.approx(said[f"{metric},none"], rel=1e-5), metric


def test_a_number_of_examples_leaves_tasks_alone_that_ask_for_none(load, write_task, search_config) -> None:
    """As lm-eval has it: a 0 in the task's own file is never overridden."""
    splits = {"train": rows(8, 1), "search": rows(10, 2), "heldout": rows(9, 3)}
    settings = KINDS["multiple_choice"] | {"output_type": "multiple_choice", "doc_to_text": "<bos> Q {{question}} ="}
    settings["target_delimiter"] = " "
    sides = {"validation_split": "search", "test_split": "heldout", "fewshot_split": "train"}
    write_task("none", splits, num_fewshot=0, **settings, **sides)
    write_task("free", splits, **settings, **sides)
    harness = Harness(search_config("none", "free", evaluation={"num_fewshot": 2}), *load("base"))
    harness.prepare("search")
    prompts = {task.task.config.task: task.documents[0][0].args[0] for task in harness._splits["search"]._tasks}
    assert prompts["none"].count("<bos>") == 1
    assert prompts["free"].count("<bos>") == 3
