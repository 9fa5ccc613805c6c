"""Metrics, prompts, devices and backends that cannot score are refused in one sentence."""

from typing import Any

import pytest

from tests.bad_input import VLLM, Refuses, flow
from tests.searches import WriteSearch

WRONG_VALUES: dict[str, tuple[Any, ...]] = {
    "an unknown task": (
        {"objectives.1.task": "base_qaa"},
        "objectives[1].task is 'base_qaa'",
        "did you mean 'base_qa'?",
    ),
    "an unknown metric": ({"objectives.0.metric": "accc"}, "objectives[0].metric is 'accc'", "did you mean 'acc'?"),
    "an unknown filter": ({"objectives.0.filter": "nune"}, "objectives[0].filter is 'nune'", "did you mean 'none'?"),
    "no folder of tasks": ({"tasks.paths": ["./nowhere"]}, "tasks.paths[0] is", "which does not exist"),
    "an unknown device": (
        {"evaluation.device": "banana"},
        "evaluation.device is 'banana'; valid names: auto, cpu, cuda, cuda:N",
    ),
    "a device that is not there": (
        {"evaluation.device": "cuda:99"},
        "evaluation.device is 'cuda:99'",
        "CUDA devices here",
    ),
    "a device for no weights": ({"evaluation.device": "meta"}, "evaluation.device is 'meta'; valid names: auto"),
    "an unknown way to share prefixes": (
        {"evaluation.prefix_sharing": "masks"},
        "evaluation.prefix_sharing is \"masks\"; did you mean 'mask'?",
    ),
    "an unknown argument of generation": (
        {"evaluation.generation_kwargs": {"temperatur": 0.5}},
        "evaluation.generation_kwargs.temperatur is no argument of generation; did you mean 'temperature'?",
    ),
    "an unknown backend": ({"evaluation.backend": "vlm"}, "evaluation.backend is \"vlm\"; did you mean 'vllm'?"),
    "an engine without its interpreter": ({"evaluation.backend": "vllm"}, "evaluation.vllm.python is missing"),
    "an engine for layer paths": (
        {"evaluation": VLLM, **flow(form="path")},
        "evaluation.backend is vllm, whose engine has the base's layers only, but space.kind is data_flow",
        "use backend: hf",
    ),
    "an engine with nothing to write": (
        {"evaluation": VLLM},
        "evaluation.backend is vllm, but no task has texts written (generate_until); use hf",
    ),
    "a cache of nothing": ({"evaluation.vllm": {"cache_gib": 0}}, "evaluation.vllm.cache_gib is 0"),
    "an unknown dtype": ({"evaluation.dtype": "fp16"}, "evaluation.dtype is \"fp16\"; did you mean 'float16'?"),
    "chat without a template": ({"evaluation.apply_chat_template": True}, "evaluation.apply_chat_template is true"),
}


@pytest.mark.parametrize("claim", WRONG_VALUES)
def test_a_wrong_value_in_a_search_file_is_refused(claim: str, refuses_search: Refuses) -> None:
    refuses_search(*WRONG_VALUES[claim])


def test_more_examples_in_a_prompt_than_there_are_items_are_refused(search: WriteSearch, refuses: Refuses) -> None:
    says = ("task 'base_qa'", "Sample larger than population", "evaluation.num_fewshot")
    refuses("run", search({"evaluation.num_fewshot": 10**4}), "--output", "new/run", says=says)


def test_a_gpu_is_refused_where_there_is_none(
    search: WriteSearch, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.devices.device_count", lambda kind: 0)
    says = ("evaluation.device is 'cuda', but torch sees 0 CUDA devices here; use auto or cpu",)
    path = search({"evaluation.device": "cuda"})
    refuses("run", path, "--output", "new/run", says=says)
    for pool in ("local", "ray"):
        refuses("check", path, "--set", f"workers.pool={pool}", says=says)
