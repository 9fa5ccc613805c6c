"""A model card shows the evidence, and nothing of the machine on which the merge was made."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from evomerge.export.card import model_card
from evomerge.export.licenses import Verdict
from evomerge.export.names import public_names, public_recipe, without_paths
from evomerge.recipe import HeldoutRow, HeldoutTable, ModelToken, Provenance, Recipe, Source, TokenizerSettings
from evomerge.recipe import TokenSettings as Token
from evomerge.runs import directory as runs
from tests.commands import evomerge

HOME = "/home/alice/private project"
PATHS = [
    f"{HOME}/models/law",
    f"{HOME}/models/law/",
    "~/models/verse",
    "../alice/verse",
    r"C:\Users\alice\models\tales",
    f"{HOME}/evil`| <b>name</b>\n---\nlicense: mit",
    f"lab/seed-3b+{HOME}/adapters/lora",
    f"{HOME}/.cache/huggingface/hub/models--lab--seed-3b/snapshots/{'a' * 40}",
    "/",
]


def merge_of(*references: str, **provenance: object) -> Recipe:
    sources = tuple(Source(model=reference, parameters={"weight": 1.0}) for reference in references)
    made = Provenance.model_validate(provenance)
    return Recipe(merge_method="task_arithmetic", base_model="lab/seed-3b", models=sources, evomerge=made)


def card_of(recipe: Recipe) -> str:
    return model_card(recipe, "f00d", Verdict("other", ()))


@pytest.mark.parametrize("path", PATHS)
def test_a_path_becomes_a_name(path: str) -> None:
    recipe = merge_of(path, aliases={path: path})
    card = card_of(recipe)
    assert "alice" not in card
    assert "~" not in card
    _, front, body = card.split("---\n", 2)
    content = yaml.safe_load(front)
    assert content["license"] == "other"
    assert len(content["base_model"]) == 2
    assert [line for line in body.splitlines() if line.startswith("- `")] == [
        f"- `{name}`" for name in content["base_model"]
    ]


def test_an_alias_stands_for_its_path() -> None:
    card = card_of(merge_of(f"{HOME}/cache/x", aliases={f"{HOME}/cache/x": "lab/law-3b@main"}))
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == ["lab/seed-3b", "lab/law-3b@main"]
    assert "alice" not in card


def test_models_with_the_same_last_part_stay_apart() -> None:
    names = public_names(merge_of("/a/model", "/b/model", "/c/model"))
    assert [names[path] for path in ("/a/model", "/b/model", "/c/model")] == ["model", "model (2)", "model (3)"]


def test_the_models_of_a_tokenizer_are_named_too() -> None:
    source = ModelToken(kind="model_token", model=f"{HOME}/one", token="x")
    tokenizer = TokenizerSettings(source=f"{HOME}/two", tokens={"a": Token(source=source)})
    recipe = merge_of("lab/law-3b").model_copy(update={"tokenizer": tokenizer, "chat_template": f"{HOME}/three"})
    assert "alice" not in card_of(recipe)
    assert "alice" not in public_recipe(recipe).to_yaml()


PARTS = st.text(st.characters(exclude_characters="/\\", exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(folders=st.lists(PARTS, min_size=1, max_size=3), name=PARTS)
def test_no_folder_of_any_path_is_in_a_card(folders: list[str], name: str) -> None:
    path = "/".join(["", "srv", "kept-secret", *folders, name])
    card = card_of(merge_of(path))
    assert "kept-secret" not in card
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert len(yaml.safe_load(front)["base_model"]) == 2
    fence = re.search(r"^(`{3,})yaml\n(.*)\n\1$", body, re.MULTILINE | re.DOTALL)
    assert fence is not None
    assert Recipe.model_validate(yaml.safe_load(fence[2])).references[1] == public_names(merge_of(path))[path]


def test_a_text_loses_the_paths_of_models_and_of_what_they_consist_of() -> None:
    recipe = merge_of(f"{HOME}/law", f"lab/seed-3b+{HOME}/lora")
    text = f"{HOME}/law/config.json and {HOME}/lora, not lab/seed-3b"
    assert without_paths(text, recipe) == "law/config.json and lora, not lab/seed-3b"


def test_the_table_has_controls_intervals_and_item_counts() -> None:
    rows = (
        HeldoutRow(title="base", mean=0.25, scores={"a|b": 0.25, "c": 3.0}, intervals={"a|b": (0.2, 0.3)}),
        HeldoutRow(title="this merge", mean=None, scores={"a|b": None}),
    )
    card = card_of(merge_of("lab/law-3b", table=HeldoutTable(items={"a|b": 40}, rows=rows)))
    table = [line for line in card.splitlines() if line.startswith("| ")]
    assert table == [
        r"| model | a\|b | c | mean |",
        "| --- | --- | --- | --- |",
        "| items | 40 |  |  |",
        "| base | 0.250 (0.200 to 0.300) | 3.000 | 0.250 |",
        "| this merge | - | - | - |",
    ]


def test_a_merge_of_a_search_carries_its_held_out_table(finished: Path, tmp_path: Path) -> None:
    evomerge("export", finished, "-o", tmp_path / "recipe.yaml")
    evomerge("merge", tmp_path / "recipe.yaml", tmp_path / "merged")
    table = Recipe.model_validate(yaml.safe_load((tmp_path / "recipe.yaml").read_text())).evomerge.table
    assert table is not None
    run = runs.read(finished)
    by_id = {row["id"]: row for row in json.loads(evomerge("candidates", finished, "--json"))}
    titles = {"base": "base", "parent first": "parent-first", "parent second": "parent-second"}
    best = run.results.best()
    assert best is not None
    titles |= {"uniform merge": "uniform", "this merge": best.candidate.id}
    assert [row.title for row in table.rows if row.title in titles][-1] == table.rows[-1].title == "this merge"
    card = (tmp_path / "merged" / "README.md").read_text()
    for row in table.rows:
        known = by_id[titles[row.title]]
        assert row.scores == known["heldout"]
        assert row.mean == known["heldout_mean"]
        for name, (low, high) in row.intervals.items():
            assert low <= known["heldout"][name] <= high
            assert f"{known['heldout'][name]:.3f} ({low:.3f} to {high:.3f})" in card
    record = run.archive.find(best.candidate.id, "heldout")
    assert record is not None
    assert table.items == {name: len(np.asarray(each.values)) for name, each in record.evaluation.outcomes.items()}
    assert str(tmp_path.parent) not in card
