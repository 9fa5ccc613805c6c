"""Groups of tasks: their scores are lm-eval's own."""

import pytest
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from evomerge.errors import InputError
from evomerge.evaluation.few_shots import SEED as FEWSHOT_SEED
from evomerge.evaluation.harness import Harness
from tests.evaluation.material import MEAN, check


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


def test_a_group_brings_no_such_metric_to_a_task_of_lm_eval(search_config, tmp_path):
    member = {"task": "arc_easy", "metric_list": [{"metric": "accuracy_of_mine", **MEAN}]}
    group = {"group": "mine", "task": [member], "aggregate_metric_list": [{"metric": "accuracy_of_mine"}]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(group))
    with pytest.raises(InputError, match=r"metric 'accuracy_of_mine'.*add 'arc_easy' to tasks.allow_code"):
        check(search_config("mine:accuracy_of_mine"))
