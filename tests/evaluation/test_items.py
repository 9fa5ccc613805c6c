"""Which items are searched on, selected by and held out: never one in two places, by content."""

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from evomerge.config.base import SPLITS, Split
from evomerge.config.files import load as load_file
from evomerge.config.scoring import ItemsConfig
from evomerge.errors import InputError
from evomerge.evaluation import few_shots
from evomerge.evaluation.harness import Harness
from evomerge.evaluation.items import Division, both_splits
from evomerge.evaluation.loading import distinct_tasks, load_targets, of_metrics, only_reported
from evomerge.evaluation.rendering import document_digest, items_of
from tests.conftest import REPOSITORY


class Pretended:
    """As much of one of lm-eval's tasks as a division needs: documents are texts or dictionaries with one."""

    def __init__(
        self,
        name: str,
        validation: Sequence[Any] | None = None,
        test: Sequence[Any] | None = None,
        shots: int = 0,
        selection: Sequence[Any] | None = None,
    ) -> None:
        self._validation, self._test = validation, test
        self.dataset = {"kept": selection}
        self.config = SimpleNamespace(
            task=name,
            validation_split=None if validation is None else "validation",
            test_split=None if test is None else "test",
            training_split=None,
            num_fewshot=shots,
            doc_to_choice=None,
            process_docs=None,
            metadata={"version": 1} if selection is None else {"version": 1, "selection_split": "kept"},
        )

    def has_validation_docs(self) -> bool:
        return self._validation is not None

    def has_test_docs(self) -> bool:
        return self._test is not None

    def validation_docs(self) -> Sequence[Any]:
        return self._validation or []

    def test_docs(self) -> Sequence[Any]:
        return self._test or []

    def doc_to_text(self, document: Any) -> str:
        return str(document["text"] if isinstance(document, dict) else document)

    def doc_to_target(self, _document: Any) -> str:
        return ""


def divide(items: ItemsConfig, name: str, count: int) -> dict[Split, list[int]]:
    """The division of one task with one split of so many different items."""
    task = Pretended(name, test=range(count))
    division = Division([task], items)
    return {split: division.of(task, split) for split in SPLITS}


def choose(items: ItemsConfig, split: Split, name: str, count: int) -> list[int]:
    """A split of a task with so many items to search on, and as many others to report."""
    task = Pretended(name, validation=range(count), test=range(count, 2 * count))
    return Division([task], items).of(task, split)


names = st.text(min_size=1, max_size=12)
seeds = st.integers(0, 2**40)


@given(names, seeds, st.integers(3, 60), st.booleans(), st.data())
def test_a_division_is_sorted_disjoint_of_the_sizes_asked_for_and_repeatable(name, seed, count, selects, data):
    search = data.draw(st.none() | st.integers(1, count - 2))
    left = count - (max(1, round(count / 2)) if search is None else search)
    assume(left >= 1 + selects)
    selection = data.draw(st.integers(1, left - 1)) if selects else None
    heldout = data.draw(st.none() | st.integers(1, left - (selection or 0)))
    items = ItemsConfig(search=search, selection=selection, heldout=heldout, seed=seed)
    found = divide(items, name, count)
    everything = [number for numbers in found.values() for number in numbers]
    assert all(numbers == sorted(numbers) for numbers in found.values())
    assert len(everything) == len(set(everything))
    assert set(everything) <= set(range(count))
    asked = {"search": count - left, "selection": selection or 0}
    asked["heldout"] = left - asked["selection"] if heldout is None else heldout
    assert {split: len(numbers) for split, numbers in found.items()} == asked
    assert divide(items, name, count) == found


@given(names, seeds, st.integers(3, 60), st.data())
def test_a_choice_is_sorted_disjoint_of_the_sizes_asked_for_and_repeatable(name, seed, count, data):
    selection = data.draw(st.integers(1, count - 1))
    search = data.draw(st.none() | st.integers(1, count - selection))
    heldout = data.draw(st.none() | st.integers(1, count))
    items = ItemsConfig(search=search, selection=selection, heldout=heldout, seed=seed)
    found = {split: choose(items, split, name, count) for split in SPLITS}
    asked = {"search": count - selection if search is None else search, "selection": selection}
    asked["heldout"] = count if heldout is None else heldout
    assert {split: len(numbers) for split, numbers in found.items()} == asked
    assert all(numbers == sorted(set(numbers)) for numbers in found.values())
    assert set().union(*found.values()) <= set(range(count))
    assert set(found["search"]).isdisjoint(found["selection"])  # of the validation split both
    assert {split: choose(items, split, name, count) for split in SPLITS} == found


@given(names, seeds)
def test_items_depend_on_the_seed_and_on_the_task(name, seed):
    items, other = (ItemsConfig(search=15, heldout=15, seed=value) for value in (seed, seed + 1))
    assert divide(items, name, 60) != divide(other, name, 60)
    assert divide(items, name, 60) != divide(items, name + "x", 60)
    assert choose(items, "search", name, 60) != choose(other, "search", name, 60)
    assert choose(items, "search", name, 60) != choose(items, "search", name + "x", 60)


@given(seeds, st.integers(1, 100))
def test_asking_for_fewer_held_out_items_keeps_the_search_items(seed, heldout):
    everything = divide(ItemsConfig(search=40, seed=seed), "task", 140)
    fewer = divide(ItemsConfig(search=40, heldout=heldout, seed=seed), "task", 140)
    assert fewer["search"] == everything["search"]
    assert set(fewer["heldout"]) <= set(everything["heldout"])


@given(seeds, st.integers(1, 60))
def test_asking_for_selection_items_changes_neither_search_nor_held_out_items(seed, selection):
    without = ItemsConfig(search=40, heldout=40, seed=seed)
    items = without.model_copy(update={"selection": selection})
    assert divide(items, "task", 140) == divide(without, "task", 140) | {"selection": mock.ANY}
    assert all(
        choose(items, split, "task", 140) == choose(without, split, "task", 140) for split in ("search", "heldout")
    )


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"search": 11}, r"items.search asks for 11 items, but task 't' has only 10"),
        ({"search": 10}, r"items.heldout asks for some items, but task 't' has only 0"),
        ({"search": 6, "heldout": 2, "selection": 3}, r"items.selection asks for 3 items, but task 't' has only 2"),
        ({"search": 6, "heldout": 5}, r"items.heldout asks for 5 items, but task 't' has only 4"),
    ],
)
def test_more_items_than_a_task_has_are_an_input_error(items, message):
    with pytest.raises(InputError, match=message):
        divide(ItemsConfig(**items), "t", 10)


def test_a_split_without_items_is_an_input_error():
    with pytest.raises(InputError, match=r"items.search asks for some items"):
        choose(ItemsConfig(), "search", "t", 0)
    with pytest.raises(InputError, match=r"items.heldout asks for 3 items"):
        choose(ItemsConfig(heldout=3), "heldout", "t", 2)


documents = st.integers(0, 30).map(lambda number: f"question {number}") | st.text(max_size=3)
numbered = st.builds(lambda text, number: {"text": text, "id": number}, documents, st.integers(0, 3))
sides = st.none() | st.lists(documents | numbered, max_size=40)


def shown(task: Pretended, document: Any) -> str:
    return " ".join(task.doc_to_text(document).split())


@given(
    tasks=st.lists(st.tuples(sides, sides), min_size=1, max_size=3),
    items=st.builds(
        ItemsConfig,
        search=st.none() | st.integers(1, 12),
        selection=st.none() | st.integers(1, 4),
        heldout=st.none() | st.integers(1, 12),
        seed=st.integers(0, 3),
    ),
)
def test_no_item_is_in_two_places_whatever_splits_and_tasks_it_stands_in(tasks, items):
    made = [Pretended(f"task{n}", *both) for n, both in enumerate(tasks)]
    assume(all(task.has_validation_docs() or task.has_test_docs() for task in made))
    try:
        division = Division(made, items)
    except InputError:
        return  # too few items are left
    texts: dict[Split, set[str]] = {split: set() for split in SPLITS}
    for task in made:
        for split in SPLITS:
            both = task.has_validation_docs() and task.has_test_docs()
            source = task.validation_docs() if not task.has_test_docs() else task.test_docs()
            if both_splits(task) and split != "heldout":
                source = task.validation_docs()
            assert both or not both_splits(task)
            texts[split] |= {shown(task, source[number]) for number in division.of(task, split)}
            wanted = getattr(items, split)
            assert wanted is None or len(division.of(task, split)) == wanted
    assert texts["search"].isdisjoint(texts["heldout"])
    assert texts["search"].isdisjoint(texts["selection"])
    assert texts["heldout"].isdisjoint(texts["selection"])


@given(
    sides=st.tuples(sides, sides).filter(any),
    kept=st.lists(documents | numbered, max_size=40),
    asked=st.integers(1, 6),
    search=st.none() | st.integers(1, 12),
    seed=st.integers(0, 3),
)
def test_a_split_kept_for_selection_gives_all_selection_items_and_moves_no_others(sides, kept, asked, search, seed):
    items = ItemsConfig(search=search, seed=seed)
    plain, own = Pretended("t", *sides), Pretended("t", *sides, selection=kept)
    try:
        without = Division([plain], items)
    except InputError:
        return  # too few items
    others = without.digests("search", "heldout")
    fresh = [number for number, item in enumerate(items_of(own, "selection")) if item.digests.isdisjoint(others)]
    selecting = items.model_copy(update={"selection": asked})
    if len(fresh) < asked:
        with pytest.raises(InputError, match=r"items.selection asks for . items, but task 't' has only"):
            Division([own], selecting)
        return
    division = Division([own], selecting)
    assert [division.of(own, split) for split in ("search", "heldout")] == [
        without.of(plain, split) for split in ("search", "heldout")
    ]
    chosen = division.of(own, "selection")
    assert chosen == sorted(set(chosen))
    assert len(chosen) == asked
    assert set(chosen) <= set(fresh)
    assert [item.text for item in division.items(own, "selection")] == [own.doc_to_text(kept[n]) for n in chosen]


@given(
    tasks=st.lists(st.tuples(sides, sides).filter(any), min_size=2, max_size=4),
    items=st.builds(ItemsConfig, search=st.integers(1, 6), selection=st.none() | st.just(1), seed=st.integers(0, 3)),
)
def test_a_task_that_is_only_reported_moves_no_item_of_others_and_holds_out_only_what_the_search_does_not_see(
    tasks, items
):
    *searched, reported = (Pretended(f"task{n}", *both) for n, both in enumerate(tasks))
    try:
        alone, beside = Division(searched, items), Division(searched, items, reported=[reported])
    except InputError:
        return  # too few items
    assert all(alone.of(task, split) == beside.of(task, split) for task in searched for split in SPLITS)
    assert alone.digests(*SPLITS) == beside.digests(*SPLITS)
    assert all(alone.withheld(task) == beside.withheld(task) for task in searched)
    assert beside.of(reported, "search") == beside.of(reported, "selection") == []
    held, seen = beside.items(reported, "heldout"), beside.digests("search", "selection")
    assert held
    assert all(item.digests.isdisjoint(seen) for item in held)
    assert all(item.digests <= beside.withheld(reported) for item in held)


def test_the_demo_searches_on_selects_by_and_holds_out_exactly_the_items_in_the_files_of_these_names():
    config = load_file(REPOSITORY / "search_spaces" / "demo.yaml")
    targets = load_targets(config.reported, config.tasks, config.evaluation)
    tasks = distinct_tasks(of_metrics(config.measured, targets))
    division = Division(tasks, config.items, reported=only_reported(config, targets))
    for task in tasks:
        for split in SPLITS:
            lines = (REPOSITORY / "evals" / task.config.task / f"{split}.jsonl").read_text().splitlines()
            questions = [f"<bos> Q {json.loads(line)['question']} =" for line in lines]
            assert [item.text for item in division.items(task, split)] == questions
            assert len(lines) == getattr(config.items, split)


def test_a_split_that_is_named_twice_is_divided_and_one_that_holds_the_same_items_too():
    rows = [{"text": f"question {number}"} for number in range(60)]
    named = Pretended("t", rows, rows)
    named.config.test_split = "validation"
    copied = Pretended("t", rows, list(reversed(rows)))
    for task in (named, copied):
        assert not both_splits(task)
        division = Division([task], ItemsConfig(search=40, heldout=20))
        assert sorted(division.of(task, "search") + division.of(task, "heldout")) == list(range(60))
        with pytest.raises(InputError, match="has only 20 left for it; ask for fewer"):
            Division([task], ItemsConfig(search=40, heldout=40))


def test_what_one_task_searches_on_no_other_holds_out_and_the_order_of_tasks_is_no_matter():
    first = Pretended("first", test=[f"question {number}" for number in range(40)])
    second = Pretended("second", test=[{"text": f" question  {number}", "id": number} for number in range(20, 60)])
    one, two = (Division(tasks, ItemsConfig(search=20, seed=1)) for tasks in ([first, second], [second, first]))
    assert [one.of(task, split) for task in (first, second) for split in SPLITS] == [
        two.of(task, split) for task in (first, second) for split in SPLITS
    ]
    searched = set(one.of(first, "search"))
    held = {number + 20 for number in one.of(second, "heldout")}
    assert searched.isdisjoint(held)
    assert one.left_out[second] == len(searched & set(range(20, 60)) - {n + 20 for n in one.of(second, "search")})


def test_what_was_seen_elsewhere_is_not_held_out_and_others_take_its_place():
    task = Pretended("t", validation=range(30), test=range(100, 200))
    all_of_it = Division([task], ItemsConfig(heldout=40))
    seen = all_of_it.digests("heldout")
    other = Division([task], ItemsConfig(heldout=40), seen)
    assert set(other.of(task, "heldout")).isdisjoint(all_of_it.of(task, "heldout"))
    assert len(other.of(task, "heldout")) == 40
    assert other.of(task, "search") == all_of_it.of(task, "search")
    with pytest.raises(
        InputError, match=r"items.heldout asks for 80 items, but task 't' has only 60 left for it \(40 more"
    ):
        Division([task], ItemsConfig(heldout=80), seen)


SHOTS = {
    "output_type": "loglikelihood",
    "doc_to_text": "<bos> Q {{question}} =",
    "doc_to_target": " {{answer}}",
    "metric_list": [{"metric": "acc"}],
    "num_fewshot": 3,
}


def rows(*numbers: int) -> list[dict[str, Any]]:
    """Questions and answers that are the same for the same number, under document numbers that never are."""
    letters = ["tom", "ann", "bob", "eve", "sam", "kim"]
    return [
        {"question": f"copy {letters[n % 6]} {letters[n // 6 % 6]}", "answer": letters[n % 6], "id": f"{place}-{n}"}
        for place, n in enumerate(numbers)
    ]


def prompts(config, load, split) -> list[tuple[list[str], str]]:
    """For each item of a split the examples before it and its own question."""
    harness = Harness(config, *load("base"))
    harness.prepare(split)
    texts = [instances[0].args[0] for task in harness._splits[split]._tasks for instances in task.documents]
    found = [[part.split(" =")[0].strip() for part in text.split("<bos> Q ")[1:]] for text in texts]
    return [(parts[:-1], parts[-1]) for parts in found]


@pytest.mark.parametrize("sampler", ["default", "first_n"])
@pytest.mark.parametrize("source", ["train", "search", "one", "heldout", "kept"])
def test_no_example_is_the_item_itself_or_held_out_whatever_it_is_drawn_from(
    source, sampler, write_task, search_config, load
):
    splits = {
        "train": rows(0, 1, 2, 3, 20, 21),
        "search": rows(*range(12), 3, 4, 5),
        "heldout": rows(*range(10, 30), 12, 13),
        "kept": rows(*range(9, 12), *range(28, 36)),
    }
    sides = {"test_split": "heldout"} if source == "one" else {"validation_split": "search", "test_split": "heldout"}
    drawn = {} if source == "one" else {"fewshot_split": source}
    own = {"metadata": {"selection_split": "kept"}} if source == "kept" else {}
    write_task("t", splits, **SHOTS, **sides, **drawn, **own, fewshot_config={"sampler": sampler})
    config = search_config("t", items={"search": 8, "selection": 2, "heldout": 4})
    searched, selected, held = (prompts(config, load, split) for split in SPLITS)
    seen = {question for _, question in searched} | {example for examples, _ in searched for example in examples}
    assert len(searched) == 8
    assert len(selected) == 2
    assert len(held) == 4
    assert seen.isdisjoint({question for _, question in selected})
    assert seen.isdisjoint({question for _, question in held})
    for examples, question in [*searched, *selected, *held]:
        assert len(examples) == 3
        assert question not in examples


def test_too_few_examples_beside_what_is_held_out_are_an_input_error(write_task, search_config, load):
    write_task("t", {"only": rows(*range(8))}, **SHOTS, test_split="only")
    config = search_config("t", items={"search": 2, "heldout": 6})
    with pytest.raises(InputError, match="task 't' shows 3 few-shot examples, but only 1 are left"):
        Harness(config, *load("base")).prepare("search")


def test_examples_shown_in_a_search_count_as_seen(write_task, search_config):
    write_task(
        "t", {"train": rows(*range(20, 30)), "one": rows(*range(12))}, **SHOTS, test_split="one", fewshot_split="train"
    )
    config = search_config("t", items={"search": 4, "heldout": 4})
    (task,) = distinct_tasks(load_targets(config.objectives, config.tasks, config.evaluation))
    division = Division([task], config.items)
    shown = few_shots.shown(task, division)
    assert 3 * 2 <= len(shown) <= 4 * 3 * 2  # two digests an example
    assert shown.isdisjoint(division.digests("search", "selection"))


@pytest.mark.parametrize("source", ["train", "kept"])
def test_examples_shown_with_a_split_kept_for_selection_count_as_seen(source, write_task, search_config, load):
    splits = {"train": rows(*range(20, 36)), "one": rows(*range(12)), "kept": rows(*range(12, 20))}
    own = {"metadata": {"selection_split": "kept"}}
    write_task("t", splits, **SHOTS, **own, test_split="one", fewshot_split=source)
    config = search_config("t", items={"search": 4, "selection": 3, "heldout": 4})
    (task,) = distinct_tasks(load_targets(config.objectives, config.tasks, config.evaluation))
    counted = few_shots.shown(task, Division([task], config.items))
    asked = [*prompts(config, load, "search"), *prompts(config, load, "selection")]
    shown = {example for examples, _ in asked for example in examples}
    known = {row["question"]: document_digest(row) for row in splits[source]}
    assert {known[question] for question in shown} == counted & set(known.values())


def test_selection_items_that_an_earlier_search_has_seen_come_last_and_are_still_taken(write_task, search_config):
    """So a model that a search has made can be scored with that search's file."""
    own = {"metadata": {"selection_split": "kept"}}
    splits = {"one": rows(*range(12)), "kept": rows(*range(20, 30))}
    write_task("t", splits, **{**SHOTS, "num_fewshot": 0}, **own, test_split="one")
    config = search_config("t", items={"search": 4, "selection": 6, "heldout": 4})
    (task,) = distinct_tasks(load_targets(config.objectives, config.tasks, config.evaluation))
    alone = Division([task], config.items)
    seen = alone.digests("search", "selection")
    again = Division([task], config.items, seen)
    assert (again.of(task, "search"), again.of(task, "heldout")) == (
        alone.of(task, "search"),
        alone.of(task, "heldout"),
    )
    fresh = [number for number in range(10) if number not in alone.of(task, "selection")]
    assert set(fresh) < set(again.of(task, "selection"))
    assert len(again.of(task, "selection")) == 6
    everything = config.items.model_copy(update={"selection": 10})
    whole = Division([task], everything)
    repeated = Division([task], everything, whole.digests("search", "selection"))
    assert repeated.of(task, "selection") == whole.of(task, "selection")
