"""lm-eval's own filters and metrics, applied to responses."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any


def task_metrics(task: Any, by_document: Sequence[Sequence[Any]]) -> dict[tuple[str, str], list[Any]]:
    """One value per document, by metric and filter, in the order of the documents; computed by lm-eval's own code.

    task: lm-eval's.
    by_document: the instances of each document, with their responses.
    """
    task._instances = [instance for instances in by_document for instance in instances]
    task.apply_filters()
    values: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for filter_name in task._instances[0].filtered_resps:
        for instances in by_document:
            responses = [instance.filtered_resps[filter_name] for instance in instances]
            for metric, value in task.process_results(instances[0].doc, responses).items():
                values[metric, filter_name].append(value)
    return values
