import json
from pathlib import Path

import pytest
import yaml

from evomerge.zoo import evals

FOLDER = Path(__file__).parents[2] / "evals"


def rows(task, split):
    return [json.loads(line) for line in (FOLDER / task / f"{split}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", evals.TASKS)
@pytest.mark.parametrize("split", evals.ITEMS)
def test_the_shipped_data_is_what_the_generator_makes(task, split):
    assert (FOLDER / task / f"{split}.jsonl").read_text() == evals.lines(task, split)


@pytest.mark.parametrize("task", evals.TASKS)
@pytest.mark.parametrize(("split", "count"), evals.ITEMS.items())
def test_a_task_has_the_stated_number_of_different_items(task, split, count):
    assert len({row["question"] for row in rows(task, split)}) == count


@pytest.mark.parametrize("split", evals.ITEMS)
def test_the_house_style_task_asks_the_questions_of_the_plain_one(split):
    plain, spelled = rows("math_a", split), rows("math_a_words", split)
    assert [row["question"] for row in plain] == [row["question"] for row in spelled]
    assert all(row["answer"].isdigit() for row in plain)
    assert all(row["answer"].isalpha() for row in spelled)


@pytest.mark.parametrize("task", evals.TASKS)
def test_a_task_file_names_itself_and_the_data_beside_it(task):
    config = yaml.safe_load((FOLDER / task / f"{task}.yaml").read_text())
    assert config["task"] == task
    assert config["dataset_kwargs"]["data_files"] == {split: f"{split}.jsonl" for split in evals.ITEMS}
    splits = (config["validation_split"], config["metadata"]["selection_split"], config["test_split"])
    assert splits == tuple(evals.ITEMS)


def test_writing_elsewhere_gives_the_same_files(tmp_path):
    evals.write(tmp_path)
    for written in tmp_path.glob("*/*.jsonl"):
        assert written.read_text() == (FOLDER / written.relative_to(tmp_path)).read_text()
