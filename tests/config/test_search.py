"""What a search file means as a whole: the names of metrics, what is measured where, and the digest."""

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from evomerge.config.search import SearchConfig
from tests.searches import small_search


def search(**changes: Any) -> SearchConfig:
    return SearchConfig.model_validate(small_search(**changes))


def metric(filter_name: str | None = None) -> dict[str, Any]:
    return {"task": "sums", "metric": "exact_match"} | ({"filter": filter_name} if filter_name else {})


def test_what_is_only_reported_is_measured_after_all_else_and_changes_no_other_name() -> None:
    alone = search(objectives=[metric("strict")], constraints=[{"task": "base_qa", "retain": 0.9}])
    config = alone.model_validate(alone.model_dump() | {"report": [metric("loose"), {"task": "math_a_words"}]})
    names = [each.name for each in alone.measured]
    assert [each.name for each in config.measured] == names == ["sums:exact_match", "base_qa"]
    assert [each.name for each in config.reported] == [*names, "sums:exact_match:loose", "math_a_words"]
    assert alone.reported == alone.measured


def test_what_would_have_the_name_of_another_metric_is_no_report() -> None:
    for report in ([metric("strict")], [metric()], [metric("loose"), metric("loose")]):
        with pytest.raises(ValidationError, match=r"reported anyway; remove it"):
            search(objectives=[metric("strict")], report=report)


def test_a_report_is_part_of_the_digest_and_a_search_without_one_has_the_digest_of_before() -> None:
    plain, reported = search(), search(report=[{"task": "math_a_words"}])
    assert plain.digest() == search(report=[]).digest() != reported.digest()
    before = search(tasks={"paths": ["evals"]}, optimizer={"name": "auto", "evaluations": 20, "population": 8})
    assert before.digest() == "20ee7d9680790b8d"  # as versions without the key had it: it names shared archives
    assert SearchConfig.model_validate(yaml.safe_load(reported.to_yaml())) == reported


def test_what_is_kept_where_in_memory_is_not_part_of_the_digest() -> None:
    placed = search(evaluation={"sources": "disk", "fields": "made", "adapters": "factors"})
    assert placed.digest() == search().digest() != search(evaluation={"batch_size": 7}).digest()
