"""Statistics on the disk: which folder serves a merge, and what is wrong with those that serve none."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from evomerge.errors import InputError
from evomerge.merging.methods.kernels import checksum, fingerprint_of
from evomerge.merging.sources.models import Models, find_models
from evomerge.merging.sources.statistics import NOTES, Shelf, Stored, read, remove_unfinished, shelf_of
from evomerge.merging.sources.weights import WEIGHTS
from evomerge.recipe import MeasuredOn, Provenance, Recipe, Source

Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def found(tiny_models: dict[str, Path]) -> Models:
    base, *others = (str(tiny_models[name]) for name in ("base", "first", "second"))
    return find_models(base, [base, *others])


def stored(folder: Path, models: Sequence[str], kind: str = "grams", value: float = 1.0, **measured: Any) -> Path:
    """Writes a statistic of one tensor, of models with some identities, and returns its folder."""
    tensors = {"tensor": torch.full((4,), value), "0:tensor": torch.ones(3)}
    digest = fingerprint_of(int(checksum(tensor, name)) for name, tensor in tensors.items())
    own = folder / f"{kind}-{'0' * 16}-{digest}"
    own.mkdir(parents=True)
    save_file(tensors, own / WEIGHTS)
    (own / NOTES).write_text(json.dumps({"kind": kind, "models": list(models), "measured": measured}))
    return own


def grams(models: Models, where: Shelf) -> Stored:
    return where.find("grams", list(models)[1], models)


def merge_of(models: Models, **noted: Any) -> Recipe:
    base, *others = models
    sources = tuple(Source(model=model, parameters={"weight": 1.0}) for model in others)
    block = Provenance(statistics=MeasuredOn(**noted))
    return Recipe(merge_method="regmean", base_model=base, models=sources, evomerge=block)


@pytest.mark.parametrize("named", [True, False])
def test_the_folder_that_the_user_gives_comes_first(found: Models, tmp_path: Path, named: bool) -> None:
    reference = list(found)[1]
    for name in ("given", "of the run", "statistics"):
        own = stored(tmp_path / name, [found[reference].identity])
    names = {reference: {"grams": own.name}} if named else {}
    recipe = merge_of(found, folder=str(tmp_path / "of the run"), names=names)
    where = str(tmp_path / "recipe.yaml")
    assert grams(found, shelf_of(recipe, where, tmp_path / "given")).folder.parent.name == "given"
    assert grams(found, shelf_of(recipe, where)).folder.parent.name == "of the run"
    assert grams(found, shelf_of(merge_of(found), where)).folder.parent.name == "statistics"


def test_other_measurements_in_later_folders_do_not_matter(found: Models, tmp_path: Path) -> None:
    identity = found[list(found)[1]].identity
    stored(tmp_path / "later", [identity], value=2.0)
    assert grams(found, Shelf([tmp_path / "empty", tmp_path / "later"])).folder.parent.name == "later"
    stored(tmp_path / "first", [identity])
    assert grams(found, Shelf([tmp_path / "first", tmp_path / "later"])).folder.parent.name == "first"
    stored(tmp_path / "first", [identity], value=2.0)
    with pytest.raises(InputError, match=r"matrices .*, and .*first holds 2 measurements \(grams-.*; move all but"):
        grams(found, Shelf([tmp_path / "first", tmp_path / "later"]))


@pytest.mark.parametrize("kind", ["row_weights", "merged_grams"])
def test_what_was_measured_over_another_base_is_not_found(found: Models, tmp_path: Path, kind: Any) -> None:
    base, *others = found
    identities = [found[model].identity for model in others]
    stored(tmp_path, identities, kind, base="of another")
    with pytest.raises(InputError, match=r"no such statistic of these models lies in .*; measure it with"):
        Shelf([tmp_path]).find(kind, others[0], found)
    own = stored(tmp_path, identities, kind, 2.0, base=found[base].identity)
    assert Shelf([tmp_path]).find(kind, others[0], found).folder == own
    other = stored(tmp_path, identities, kind, 3.0, base=found[others[1]].identity)  # of a recipe's own base
    assert Shelf([tmp_path], base=others[1]).find(kind, others[0], found).folder == other


def test_what_does_not_record_its_base_serves_those_alone_that_name_it(found: Models, tmp_path: Path) -> None:
    model = list(found)[1]
    old = stored(tmp_path, [found[model].identity], "row_weights")
    with pytest.raises(InputError, match="no such statistic of these models"):
        Shelf([tmp_path]).find("row_weights", model, found)
    named = Shelf([tmp_path], {model: {"row_weights": old.name}})
    assert named.find("row_weights", model, found).folder == old


def with_tensors(**tensors: torch.Tensor) -> Spoil:
    return lambda folder: save_file(tensors, folder / WEIGHTS)


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-3])


SPOILED: dict[str, tuple[Spoil, str]] = {
    "other values": (with_tensors(tensor=torch.zeros(4), **{"0:tensor": torch.ones(3)}), "its values have changed"),
    "a tensor that is missing": (with_tensors(tensor=torch.ones(4)), "its values have changed"),
    "another shape": (with_tensors(tensor=torch.ones((2, 2)), **{"0:tensor": torch.ones(3)}), "values have changed"),
    "no file of values": (lambda folder: (folder / WEIGHTS).unlink(), "holds no model.safetensors"),
    "half a file": (cut, "not a valid safetensors file"),
}


@pytest.mark.parametrize("claim", SPOILED)
def test_statistics_that_have_changed_are_refused_and_read_once(found: Models, tmp_path: Path, claim: str) -> None:
    spoil, says = SPOILED[claim]
    own = stored(tmp_path, [found[list(found)[1]].identity])
    shelf = Shelf([tmp_path], again="measure again")
    assert grams(found, shelf).folder == own
    spoil(own)
    assert grams(found, shelf).folder == own
    with pytest.raises(InputError, match=f"^{own}.*{says}.*; .*remove the folder, and measure again.$"):
        grams(found, Shelf([tmp_path], again="measure again"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read"),
        ("[]", "the file is []; write keys and values"),
        ('{"kind": "grams"}', "models is required but missing"),
        ('{"kind": "grams", "models": 5}', "models is 5; write a list"),
        ('{"kind": "gram", "models": []}', "kind is \"gram\"; did you mean 'grams'?"),
        ('{"kind": "grams", "models": [], "shared": [1]}', "shared is [1]; write keys and values"),
        ('{"kind": "grams", "models": [], "mean": "much"}', 'mean is "much"'),
    ],
)
def test_notes_of_another_form_are_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / NOTES).write_text(content)
    with pytest.raises(InputError) as refused:
        read(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path / NOTES}: ")
    assert says in str(refused.value)


def test_what_is_given_must_be_a_folder_of_statistics(found: Models, tmp_path: Path) -> None:
    own = stored(tmp_path, ["one"])
    for given, says in ((own, "is a single statistic; give the folder"), (own / NOTES, "which is no folder")):
        with pytest.raises(InputError, match=f"--statistics is {given}.*{says}"):
            shelf_of(merge_of(found), "recipe.yaml", given)


def test_what_a_killed_measurement_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    own, left = stored(tmp_path, ["one"]), tmp_path / ".row_weights-abcd"
    left.mkdir()
    (left / WEIGHTS).touch()
    (tmp_path / ".hidden").mkdir()
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {own.name, ".hidden"}
    remove_unfinished(tmp_path / "nowhere")
