"""A shared recipe says where its models lie and what they are called elsewhere, and is written whole or not at all."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge import recipe as recipes
from evomerge import zoo
from evomerge.archive.archive import Archive, Record
from evomerge.candidate import Candidate, Evaluation
from evomerge.config.search import SearchConfig
from evomerge.errors import EvomergeError, InputError
from evomerge.export.recipe import shared_recipe, write_recipe
from evomerge.merging.sources.models import Model, Models
from evomerge.merging.sources.references import ModelSource
from evomerge.merging.sources.weights import Weights
from evomerge.outcomes import Outcomes
from evomerge.recipe import Provenance, Recipe, Slice, Source, single
from evomerge.search.results import Results
from evomerge.seen import SIZE, encoded
from evomerge.versions import versions
from tests.bad_input import contents
from tests.searches import small_search

BASE, MATH, LORA = "zoo:base", "zoo:math", "owner/lora"
SEEN = encoded([b"a" * SIZE, b"b" * SIZE])


def found(reference: str, name: str, adapter: str | None = None) -> Model:
    """A model of the zoo as if it had been found by a reference, with an adapter as if there were one."""
    source = ModelSource(zoo.path(name), Path(adapter) if adapter else None)
    return Model(reference, source, {"model_type": "llama"}, Weights(ModelSource(zoo.path(name))))


BASE_FOLDER, MATH_FOLDER = str(zoo.path("base")), str(zoo.path("math"))
MODELS = Models(
    found(BASE, "base"),
    {
        BASE: found(BASE, "base"),
        MATH: found(MATH, "math"),
        LORA: found(LORA, "base", "/adapters/lora"),
        f"{MATH}+{LORA}": found(f"{MATH}+{LORA}", "math", "/adapters/lora"),
        MATH_FOLDER: found(MATH_FOLDER, "math"),
    },
)


def merged(*models: str, **changes: Any) -> Recipe:
    sources = tuple(Source(model=model, parameters={"weight": 1 / 3}) for model in models)
    return Recipe(merge_method="task_arithmetic", base_model=BASE, models=sources, **changes)


def config(models: Sequence[str]) -> SearchConfig:
    named = {f"m{index}": model for index, model in enumerate(models)}
    return SearchConfig.model_validate(
        small_search(models=named, objectives=[{"task": "base_qa"}], evaluation={"dtype": "bfloat16"})
    )


def scored(values: Sequence[float]) -> Evaluation:
    outcomes = {"base_qa": Outcomes.of(values)}
    return Evaluation({"base_qa": sum(values) / len(values)}, outcomes=outcomes, items=len(values), fingerprint="f00d")


def shared(
    recipe: Recipe, directory: Path, models: Sequence[str] = (MATH, LORA), heldout: bool = True
) -> tuple[Recipe, Archive]:
    """The shared recipe of a candidate in an archive with controls."""
    search = config(models)
    archive = Archive(directory, search, ())
    archive.record_seen(SEEN)
    controls = ["base", *(f"parent-m{index}" for index in range(len(models)))]
    for index, name in enumerate(controls):
        for split in search.splits:
            archive.record(Candidate(name, "control", -1, index, single(BASE)), scored([0, 1, 0, 0]), split)
    candidate = Candidate("g0000-00", "search", 0, 0, recipe)
    archive.record(candidate, scored([1, 1, 1, 0]), "search")
    if heldout:
        archive.record(candidate, scored([1, 1, 0, 0]), "heldout")
    record: Record | None = archive.find("g0000-00", "search")
    assert record is not None
    return shared_recipe(record, Results(archive, search), MODELS), archive


def test_a_shared_recipe_has_paths_and_the_references_that_stand_for_them(tmp_path: Path) -> None:
    recipe, _ = shared(merged(MATH), tmp_path)
    assert recipe.references == (BASE_FOLDER, MATH_FOLDER)
    assert recipe.evomerge.aliases == {BASE_FOLDER: BASE, MATH_FOLDER: MATH}
    assert recipe.renamed(recipe.evomerge.aliases).references == (BASE, MATH)


def test_a_path_needs_no_alias(tmp_path: Path) -> None:
    recipe, _ = shared(merged(MATH_FOLDER), tmp_path, [MATH_FOLDER])
    assert recipe.evomerge.aliases == {BASE_FOLDER: BASE}


def test_an_adapter_by_itself_becomes_one_of_the_base_and_after_a_plus_it_stays_as_it_is(tmp_path: Path) -> None:
    on_math = f"{MATH}+{LORA}"
    recipe, _ = shared(merged(LORA, on_math), tmp_path, [LORA, on_math])
    lone, other = f"{BASE_FOLDER}+/adapters/lora", f"{MATH_FOLDER}+/adapters/lora"
    assert recipe.references == (BASE_FOLDER, lone, other)
    assert recipe.evomerge.aliases == {BASE_FOLDER: BASE, lone: f"{BASE}+{LORA}", other: on_math}


def test_every_place_that_names_a_model_has_its_path(tmp_path: Path) -> None:
    slices = [
        Slice(sources=(Source(model=model, layer_range=(start, start + 2)),), base_model=BASE)
        for start, model in enumerate((BASE, MATH))
    ]
    recipe = Recipe(merge_method="passthrough", slices=tuple(slices), tokenizer_source=MATH, chat_template=BASE)
    renamed, _ = shared(recipe, tmp_path)
    assert "zoo:" not in renamed.model_copy(update={"evomerge": Provenance()}).to_yaml()
    assert (renamed.tokenizer_source, renamed.chat_template) == (MATH_FOLDER, BASE_FOLDER)
    assert renamed.renamed(renamed.evomerge.aliases).slices == recipe.slices


def test_a_shared_recipe_says_what_made_it_and_what_it_scored_and_merges_as_before(tmp_path: Path) -> None:
    before = merged(MATH, evomerge=Provenance(seed=7, rescale="density"))
    recipe, archive = shared(before, tmp_path)
    assert recipe.dtype == "bfloat16"
    assert (recipe.merge_method, recipe.parameters) == (before.merge_method, before.parameters)
    assert recipe.renamed(recipe.evomerge.aliases).models == before.models
    noted = recipe.evomerge
    assert (noted.seed, noted.rescale) == (7, "density")
    assert (noted.candidate, noted.fingerprint) == ("g0000-00", "f00d")
    assert (noted.scores, noted.heldout) == ({"base_qa": 0.75}, {"base_qa": 0.5})
    assert noted.versions == versions() == archive.recorded_versions()
    assert noted.seen == archive.seen == SEEN
    assert len(noted.verdicts) > 0
    assert all("0.250" in verdict for verdict in noted.verdicts)


def test_a_candidate_without_held_out_scores_has_neither_these_nor_verdicts(tmp_path: Path) -> None:
    recipe, _ = shared(merged(MATH), tmp_path, heldout=False)
    assert (recipe.evomerge.heldout, recipe.evomerge.verdicts) == (None, ())


numbers = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
scores = st.none() | st.dictionaries(texts, st.none() | numbers, max_size=3)
provenances = st.builds(
    Provenance,
    seed=st.integers(0, 2**62),
    rescale=st.sampled_from(["density", "l1"]),
    candidate=st.none() | texts,
    fingerprint=st.none() | texts,
    scores=scores,
    heldout=scores,
    verdicts=st.lists(texts, max_size=2).map(tuple),
    aliases=st.dictionaries(texts, texts, max_size=2),
    versions=st.dictionaries(texts, texts, max_size=2),
    head_apart=st.booleans(),
)


@settings(max_examples=40)
@given(st.lists(numbers, min_size=1, max_size=4), st.booleans(), provenances)
def test_a_recipe_that_is_written_and_read_is_equal(
    tmp_path_factory: pytest.TempPathFactory, weights: list[float], normalize: bool, noted: Provenance
) -> None:
    sources = tuple(Source(model=f"/models/m{i}", parameters={"weight": each}) for i, each in enumerate(weights))
    parts = (Source(model="/models/größer", layer_range=(0, 2), parameters={"weight": weights}),)
    for changes in ({"models": sources}, {"slices": (Slice(sources=parts),)}):
        recipe = Recipe(merge_method="linear", parameters={"normalize": normalize}, evomerge=noted, **changes)
        path = tmp_path_factory.getbasetemp() / "recipe.yaml"
        write_recipe(recipe, path)
        again = recipes.load(path)
        assert again == recipe
        assert again.content_id() == recipe.content_id()


def test_a_shared_recipe_is_read_equal_from_new_folders(tmp_path: Path) -> None:
    recipe, _ = shared(merged(MATH, LORA), tmp_path)
    write_recipe(recipe, tmp_path / "new" / "folders" / "recipe.yaml")
    assert recipes.load(tmp_path / "new" / "folders" / "recipe.yaml") == recipe


def fails(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


class Full:
    """A file of which half a text has been written when the disk is full."""

    def __init__(self, handle: int, *_: Any, **__: Any) -> None:
        self._handle = handle

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def write(self, content: bytes) -> None:
        os.write(self._handle, content[: len(content) // 2])
        fails()


@pytest.mark.parametrize(("step", "failing"), [("fdopen", Full), ("replace", fails)])
@pytest.mark.parametrize("older", [None, "an older recipe\n"])
def test_a_recipe_that_cannot_be_written_leaves_the_folder_as_it_was(
    step: str, failing: Callable[..., Any], older: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    if older is not None:
        path.write_text(older)
    before = contents(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(os, step, failing)
        with pytest.raises(EvomergeError, match=r"recipe\.yaml: cannot be written \(No space left on device\)"):
            write_recipe(merged(MATH), path)
    assert contents(tmp_path) == before
    write_recipe(merged(MATH), path)
    assert recipes.load(path) == merged(MATH)
    assert [each.name for each in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_recipe_goes_neither_over_a_folder_nor_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="is a folder; give -o the name of a file"):
        write_recipe(merged(MATH), tmp_path)
    with pytest.raises(InputError, match=r"cannot be written .*choose another -o"):
        write_recipe(merged(MATH), tmp_path / "file" / "recipe.yaml")
    assert contents(tmp_path) == before


def test_layers_side_by_side_are_written_only_where_they_are_asked_for(tmp_path: Path) -> None:
    part = Source(model=MATH, layer_range=(0, 6))
    row = Recipe(merge_method="passthrough", base_model=MATH, slices=(Slice(sources=(part,)),))
    recipe = row.model_copy(update={"evomerge": Provenance(parallel=((2, 4),))})
    with pytest.raises(InputError, match=r"layers 2 to 3 side by side, .* give --evomerge-only for a recipe"):
        write_recipe(recipe, tmp_path / "recipe.yaml")
    assert contents(tmp_path) == {}
    write_recipe(recipe, tmp_path / "recipe.yaml", evomerge_only=True)
    assert recipes.load(tmp_path / "recipe.yaml") == recipe
    write_recipe(row, tmp_path / "row.yaml")
    assert recipes.load(tmp_path / "row.yaml") == row
