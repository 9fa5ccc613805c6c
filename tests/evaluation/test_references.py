"""References: what the metrics of tasks of all kinds take for the right answer, and when there is none."""

from typing import Any

import pytest

from evomerge.evaluation.items import Division
from evomerge.evaluation.loading import check_metrics, distinct_tasks, load_targets
from evomerge.evaluation.references import Reference, references, without_references
from tests.evaluation.material import MEAN, choices, questions


@pytest.fixture
def found(search_config):
    """The references of an objective, and the documents that they are for."""

    def find(objective: str, **changes: Any) -> tuple[list[Reference | None], list[Any]]:
        config = search_config(objective, **changes)
        targets = load_targets(config.measured, config.tasks, config.evaluation)
        (metric,) = check_metrics(config, targets).objectives
        (task,) = targets[metric.task].tasks
        documents = Division(distinct_tasks(targets), config.items).searched_documents(task)
        name = metric.filter or targets[metric.task].filters()[0]
        return references(task, metric, name, documents, config.evaluation.apply_chat_template), documents

    return find


@pytest.fixture
def missing(search_config):
    """What `without_references` says of some objectives."""

    def find(*objectives: str) -> str | None:
        config = search_config(*objectives)
        targets = load_targets(config.measured, config.tasks, config.evaluation)
        division = Division(distinct_tasks(targets), config.items)
        measured = check_metrics(config, targets).objectives
        return without_references(measured, targets, division.searched_documents)

    return find


@pytest.mark.parametrize("metric", ["acc", "perplexity"])
def test_the_answer_of_a_loglikelihood_task_is_its_own_reference(metric, qa_task, found):
    qa_task()
    assert found(f"qa:{metric}")[0] == [Reference()] * 12


def test_a_metric_whose_goal_is_turned_around_has_no_reference(qa_task, found, missing):
    qa_task(
        metric_list=[
            {"metric": "acc", "aggregation": "mean", "higher_is_better": False},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ]
    )
    assert found("qa:acc")[0] == [None] * 12
    assert missing("qa:perplexity", "qa:acc") == "qa has no answer that its own metric would score best"
    assert missing("qa:perplexity") is None


@pytest.mark.parametrize(
    ("metric", "length"),
    [
        ("acc", lambda option: 1),
        ("acc_norm", len),
        ("acc_bytes", lambda option: len(option.encode())),
        ("acc_mutual_info", lambda option: 1),
        ("brier_score", lambda option: 1),
    ],
)
def test_options_are_compared_as_the_metric_compares_them(metric, length, write_task, found):
    rows = [row | {"options": [*row["options"], "né"]} for row in choices(9, seed=4)]
    how = {"aggregation": "brier_score", "higher_is_better": False} if metric == "brier_score" else MEAN
    write_choice(write_task, rows, metric_list=[{"metric": metric, **how}])
    made, documents = found(f"choice:{metric}")
    assert len(made) == len(documents) == 9
    for reference, document in zip(made, documents, strict=True):
        assert reference is not None
        assert reference.right == tuple(place == document["gold"] for place in range(len(document["options"])))
        assert reference.lengths == tuple(map(length, document["options"]))
        assert reference.mutual == (metric == "acc_mutual_info")


def write_choice(write_task, rows, **settings):
    defaults = {
        "validation_split": "search",
        "test_split": "heldout",
        "output_type": "multiple_choice",
        "doc_to_text": "<bos> Q {{question}} =",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "gold",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc", **MEAN}],
    }
    return write_task("choice", {"search": rows, "heldout": choices(9, seed=5)}, **(defaults | settings))


def test_several_options_may_be_right_but_not_all_and_not_none(write_task, found):
    rows = [{"question": f"q {number}", "options": list("abc")} for number in range(5)]
    golds = [[0, 2], [1], [0, 1, 2], [7], [2]]
    held = [row | {"gold": [1]} for row in choices(9, seed=5)]
    data = {
        "search": [row | {"gold": gold} for row, gold in zip(rows, golds, strict=True)],
        "heldout": held,
    }
    write_task(
        "choice",
        data,
        validation_split="search",
        test_split="heldout",
        output_type="multiple_choice",
        doc_to_text="Q {{question}} =",
        doc_to_choice="options",
        doc_to_target="gold",
        metric_list=[{"metric": "acc", **MEAN}],
    )
    rights = [reference and reference.right for reference in found("choice")[0]]
    assert rights == [(True, False, True), (False, True, False), None, None, (False, False, True)]


def test_an_answer_may_be_given_as_the_text_of_an_option(write_task, found):
    rows = [row | {"gold": row["options"][row["gold"]]} for row in choices(9, seed=4)]
    write_choice(write_task, rows, doc_to_target="{{gold}}")
    made, documents = found("choice")
    assert [reference.right.index(True) for reference in made] == [
        document["options"].index(document["gold"]) for document in documents
    ]


def test_where_options_are_questions_the_number_of_the_right_one_is_the_question(write_task, found):
    rows = [{"gold": number % 2, "first": f"kim {number}", "second": f"lee {number}"} for number in range(8)]
    write_task(
        "blanks",
        {"search": rows, "heldout": [row | {"first": f"old {row['first']}"} for row in rows]},
        validation_split="search",
        test_split="heldout",
        output_type="multiple_choice",
        doc_to_text="{{gold}}",
        doc_to_choice="{{[first, second]}}",
        doc_to_target="has three",
        target_delimiter=" ",
        metric_list=[{"metric": "acc", **MEAN}],
    )
    made, documents = found("blanks")
    assert [reference.right for reference in made] == [(doc["gold"] == 0, doc["gold"] == 1) for doc in documents]


@pytest.mark.parametrize("until", [["."], ".", ["=", "."]])
def test_a_text_stands_between_the_delimiter_and_the_first_stop(until, generation_task, found):
    task = {"generation_kwargs": {"until": until, "max_gen_toks": 6}, "target_delimiter": " "}
    generation_task(**task)
    made, documents = found("writing:exact_match:word")
    stop = until if isinstance(until, str) else until[0]
    kept = [(reference, document) for reference, document in zip(made, documents, strict=True) if reference is not None]
    assert len(kept) > 12
    for reference, document in kept:
        assert reference == Reference(text=f" {document['answer']}{stop}", answer=f" {document['answer']}")


def test_a_filter_that_finds_nothing_in_the_right_answer_leaves_the_item_out(generation_task, found, missing):
    generation_task()
    made, documents = found("writing:exact_match:digit")
    assert made == [None] * len(documents)
    clause = missing("writing:exact_match:word", "writing:exact_match:digit")
    assert clause == "writing:exact_match:digit has no answer that its own metric would score best"


def write_texts(write_task, answers, **settings):
    rows = [{"question": f"kim has {number}", "answer": answer} for number, answer in enumerate(answers)]
    return write_task(
        "texts",
        {"search": rows, "heldout": [row | {"question": f"lee {row['question']}"} for row in rows]},
        **{
            "validation_split": "search",
            "test_split": "heldout",
            "output_type": "generate_until",
            "doc_to_text": "Q {{question}} =",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 6},
            "filter_list": [{"name": "plain", "filter": [{"function": "take_first"}]}],
            "metric_list": [{"metric": "exact_match", **MEAN}],
            **settings,
        },
    )


def texts(made):
    return [reference and reference.text for reference in made]


def test_an_answer_that_a_stop_would_cut_is_no_reference(write_task, found):
    write_texts(write_task, ["two", "3.5", "", "four. and", "  "])
    assert texts(found("texts:exact_match")[0]) == ["two.", None, None, None, None]


def test_a_delimiter_that_no_filter_removes_spoils_the_answer(write_task, found):
    write_texts(write_task, ["two", "three"], target_delimiter=" ")
    assert found("texts:exact_match")[0] == [None, None]
    strip = {"function": "regex", "regex_pattern": r"(\w+)"}
    filters = [{"name": "strip", "filter": [strip, {"function": "take_first"}]}]
    write_texts(write_task, ["two", "three"], target_delimiter=" ", filter_list=filters)
    assert texts(found("texts:exact_match")[0]) == [" two.", " three."]


def test_after_a_chat_template_an_answer_has_no_delimiter(write_task, found):
    write_texts(write_task, ["two", "three"], target_delimiter=" ")
    assert texts(found("texts:exact_match", evaluation={"apply_chat_template": True})[0]) == ["two.", "three."]


@pytest.mark.parametrize(("prefix", "between"), [("so", " "), ("so ", "")])
def test_an_answer_that_is_begun_already_goes_on_after_a_blank(prefix, between, write_task, found):
    strip = {"function": "regex", "regex_pattern": r"(\w+)"}
    filters = [{"name": "strip", "filter": [strip, {"function": "take_first"}]}]
    write_texts(write_task, ["two", "three"], gen_prefix=prefix, target_delimiter="\n", filter_list=filters)
    assert texts(found("texts:exact_match")[0]) == [f"{between}two.", f"{between}three."]


def test_the_first_of_several_right_texts_is_the_reference(write_task, found):
    write_texts(write_task, [["two", "2"], ["three", "3"]], doc_to_target="answer")
    assert texts(found("texts:exact_match")[0]) == ["two.", "three."]


def test_the_number_of_an_option_stands_for_its_text(write_task, found):
    write_texts(write_task, [0, 1, 1], doc_to_choice=["yes", "no"], doc_to_target="answer")
    assert texts(found("texts:exact_match")[0]) == ["yes.", "no.", "no."]


def test_a_rolling_likelihood_is_its_own_reference(text_task, found):
    rows = questions(6, seed=1)
    text_task(rows)
    assert found("text:word_perplexity")[0] == [Reference()] * 6


@pytest.mark.parametrize(("wanted", "kept"), [("doc['answer']", True), ("'something else'", False)])
def test_code_that_scores_results_decides_what_is_right(wanted, kept, write_task, found, tmp_path):
    write_texts(write_task, ["two", "three"])
    (tmp_path / "scoring.py").write_text(
        f"def score(doc, results):\n    return {{'exact_match': float(results[0] == {wanted})}}\n"
    )
    file = tmp_path / "texts.yaml"
    file.write_text(file.read_text() + "process_results: !function scoring.score\n")
    made = found("texts:exact_match", tasks={"paths": [str(tmp_path)], "allow_code": ["texts"]})[0]
    assert texts(made) == (["two.", "three."] if kept else [None, None])


def test_an_error_rate_is_least_for_the_reference(write_task, found, tmp_path):
    write_texts(
        write_task, ["two", "three", "two"], metric_list=[{"metric": "errors", **MEAN, "higher_is_better": False}]
    )
    (tmp_path / "scoring.py").write_text(
        "def score(doc, results):\n    return {'errors': len(set(results[0]) ^ set(doc['answer']))}\n"
    )
    file = tmp_path / "texts.yaml"
    file.write_text(file.read_text() + "process_results: !function scoring.score\n")
    made = found("texts:errors", tasks={"paths": [str(tmp_path)], "allow_code": ["texts"]})[0]
    assert texts(made) == ["two.", "three.", "two."]


@pytest.mark.parametrize("kind", ["loglikelihood", "multiple_choice", "generate_until"])
def test_a_document_whose_template_fails_has_no_reference_and_spoils_no_other(kind, write_task, found):
    metric = "exact_match" if kind == "generate_until" else "acc"
    options = {"doc_to_choice": ["one", "two"]} if kind == "multiple_choice" else {}
    write_texts(
        write_task,
        ["0", "bad", "1"] if options else ["two", "bad", "one"],
        output_type=kind,
        doc_to_target="{{answer if answer != 'bad' else 1 // 0}}",
        metric_list=[{"metric": metric, **MEAN}],
        **options,
    )
    made = found(f"texts:{metric}")[0]
    assert [reference is None for reference in made] == [False, True, False]
