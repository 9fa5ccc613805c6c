"""What a recipe's search saw travels with it, and no report shows it as held out."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from evomerge import recipe as recipes
from evomerge.config.files import load
from evomerge.evaluation.items import Division
from evomerge.evaluation.loading import distinct_tasks, load_targets
from evomerge.search.preparation import prepare
from evomerge.seen import SIZE, decoded, digest_of, encoded
from tests.commands import evomerge
from tests.searches import WriteSearch

digests = st.frozensets(st.binary(min_size=SIZE, max_size=SIZE))


@given(digests)
def test_digests_come_back_from_their_text_which_is_one_for_each_set(some: frozenset[bytes]) -> None:
    text = encoded(some)
    assert decoded(text) == some
    assert encoded(sorted(some, reverse=True)) == text
    assert len(text) == 8 * len(some)


@pytest.mark.parametrize("text", ["%%%", "AAAA", "AAAAAAAAAA=="])
def test_text_that_is_none_is_told(text: str) -> None:
    with pytest.raises(ValueError, match=r"base64|bytes"):
        decoded(text)


def test_documents_have_one_digest_whatever_the_order_of_their_keys() -> None:
    assert digest_of({"a": 1, "b": "x"}) == digest_of({"b": "x", "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": "1"})
    assert len(digest_of("\ud800", float("nan"), object)) == SIZE


def heldout(config_file: Path, seen: frozenset[bytes]) -> frozenset[bytes]:
    """The digests of what is held out where some items were seen."""
    config = load(config_file)
    tasks = distinct_tasks(load_targets(config.measured, config.tasks, config.evaluation))
    return Division(tasks, config.items, seen).digests("heldout")


def test_a_recipe_and_its_checkpoint_carry_what_the_search_saw_and_evaluate_leaves_it_out(
    search_file: WriteSearch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = search_file(
        optimizer={"evaluations": 2}, objectives=[{"task": "base_qa"}], items={"search": 30, "heldout": 10}
    )
    evomerge("run", mine, "--output", tmp_path / "run")
    evomerge("export", tmp_path / "run", "-o", tmp_path / "recipe.yaml")
    evomerge("merge", tmp_path / "recipe.yaml", tmp_path / "merged")
    recipe = recipes.load(tmp_path / "recipe.yaml")
    seen = recipe.evomerge.digests
    assert len(seen) == 2 * 30
    assert recipes.load(tmp_path / "merged" / "evomerge_recipe.yaml").evomerge.digests == seen

    task = yaml.safe_load((Path(load(mine).tasks.paths[0]) / "base_qa" / "base_qa.yaml").read_text())
    files = task["dataset_kwargs"]["data_files"]
    (tmp_path / "tasks").mkdir()
    rows = (Path(load(mine).tasks.paths[0]) / "base_qa" / files[task["validation_split"]]).read_text().splitlines()
    (tmp_path / "tasks" / "rows.jsonl").write_text("\n".join(rows[:200]) + "\n")
    task |= {"dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, "validation_split": None, "test_split": "test"}
    del task["metadata"]  # which names a split for selection
    (tmp_path / "tasks" / "base_qa.yaml").write_text(yaml.safe_dump({k: v for k, v in task.items() if v is not None}))
    other = search_file(
        "other.yaml",
        objectives=[{"task": "base_qa"}],
        items={"search": 10},
        tasks={"paths": [str(tmp_path / "tasks")]},
    )
    assert heldout(other, frozenset()) & seen
    for target in (tmp_path / "recipe.yaml", tmp_path / "merged"):
        row = json.loads(evomerge("evaluate", target, "--config", other, "--split", "heldout", "--json"))
        assert row["left_out"] > 0
        assert row["items"] + row["left_out"] == 190
        assert len(heldout(other, seen)) == 2 * row["items"]
        assert f"{row['left_out']} items are left out" in capsys.readouterr().err
    again = search_file(
        "again.yaml",
        models={"merged": str(tmp_path / "merged")},
        objectives=[{"task": "base_qa"}],
        items={"search": 10},
        tasks={"paths": [str(tmp_path / "tasks")]},
    )
    prepared = prepare(load(again))
    assert any("are not held out, since they are the same" in warning for warning in prepared.warnings)


def test_what_cannot_be_read_of_it_is_told_with_file_and_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipes.linear({"zoo:math": 1.0}).to_yaml().replace("evomerge:", "evomerge:\n  seen: AAAA")
    (tmp_path / "recipe.yaml").write_text(recipe)
    evomerge("merge", tmp_path / "recipe.yaml", tmp_path / "out", status=2)
    assert f"{tmp_path / 'recipe.yaml'}: evomerge.seen: cannot be read (it has 3 bytes" in capsys.readouterr().err
