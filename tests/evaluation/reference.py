"""What lm-eval's own evaluate says of a task."""

import copy
from typing import Any

import lm_eval.utils
import pytest
from jinja2 import BaseLoader, Environment, StrictUndefined
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from evomerge.evaluation.few_shots import SEED


def lm_eval_says(
    task: dict[str, Any], model: Any, tokenizer: Any, samples: list[int] | None = None, **options: Any
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(metrics, one dictionary per item) of a task's test split, or of these of its items."""
    name = task["task"]
    plain = Environment(loader=BaseLoader, undefined=StrictUndefined, keep_trailing_newline=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.utils, "env", plain)
        reference = ConfigurableTask(config=copy.deepcopy(task))
        reference.set_fewshot_seed(SEED)
        results = evaluate(
            lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=7),
            task_dict={"tasks": {name: reference}},
            samples=samples and {name: samples},
            bootstrap_iters=0,
            **options,
        )
    return dict(results["results"][name]), results["samples"][name]
