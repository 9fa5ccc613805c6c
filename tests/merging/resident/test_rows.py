"""Models with other vocabularies in memory: the same merge as one that is written, wherever they live."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.config.files import load
from evomerge.export import checkpoint
from evomerge.merging import vocabulary
from evomerge.merging.methods import METHODS
from evomerge.merging.resident.models import ResidentModels
from evomerge.merging.sources.models import Models, models_of
from evomerge.merging.vocabulary import Vocabulary
from evomerge.recipe import Recipe, Source, single
from tests.merging.ways import FEW
from tests.models import UNMEASURED
from tests.vocabularies import renumbered, words_of

PLACES = ("device", "host", "disk")


@pytest.fixture(scope="module")
def folders(tiny_models, tmp_path_factory) -> dict[str, Path]:
    """The base with rows to spare; a fine-tune with its tokens in another order, one with more, one that lacks some."""
    root, words = tmp_path_factory.mktemp("vocabularies"), words_of(tiny_models["base"])
    few = [word for number, word in enumerate(words) if number < 4 or number % 5]
    return {
        "base": tiny_models["base"],
        "turned": renumbered(tiny_models["first"], root / "turned", words[::-1], shift=0.01),
        "more": renumbered(tiny_models["second"], root / "more", ["<tool>", *words, "<extra>"], 90, shift=-0.01),
        "few": renumbered(tiny_models["third"], root / "few", few, 200),
    }


@pytest.fixture(scope="module")
def models(folders, tmp_path_factory) -> tuple[Models, Vocabulary]:
    path = tmp_path_factory.mktemp("search") / "search.yaml"
    named = ", ".join(f"{name}: {folder}" for name, folder in folders.items() if name != "base")
    path.write_text(
        f"{{base: {folders['base']}, models: {{{named}}}, objectives: [{{task: t}}], "
        "space: {tokenizer_source: base}}"
    )
    config = load(path)
    found = models_of(config)
    made = vocabulary.of_search(config, found)
    assert made is not None
    return found, made


@pytest.fixture(scope="module")
def resident(models) -> dict[tuple[str, str], ResidentModels]:
    return {
        (place, fields): ResidentModels(
            models[0], "cpu", "bfloat16", sources=place, fields=fields, vocabulary=models[1]
        )
        for place in PLACES
        for fields in ("kept", "made")
    }


def merge(folders: dict[str, Path], names: Sequence[str], method: str, base: str | None = "base") -> Recipe:
    row = METHODS[method]
    return Recipe(
        merge_method=method,
        base_model=str(folders[base]) if base and (row.uses_base or base != "base") else None,
        models=tuple(
            Source(model=str(folders[name]), parameters={"weight": 0.4 + 0.1 * place, "density": 0.6})
            for place, name in enumerate(names)
        ),
        parameters={"t": 0.3, "epsilon": 0.05, "lambda": 1.1},
    )


def written(recipe: Recipe, models: tuple[Models, Vocabulary], folder: Path) -> str:
    whole = recipe.model_copy(update={"dtype": "bfloat16", "tokenizer": models[1].wanted})
    return checkpoint.merge(whole, folder, "the recipe", card=False)[0]


@pytest.mark.parametrize("method", UNMEASURED)
def test_every_method_makes_in_memory_what_it_writes(method, folders, models, resident, tmp_path):
    most = METHODS[method].most
    recipe = merge(folders, ("few", "turned", "more")[:most], method)
    expected = written(recipe, models, tmp_path / "out")
    ways = resident if method in FEW else [("device", "kept"), ("host", "made"), ("disk", "made")]
    assert {resident[way].materialize(recipe) for way in ways} == {expected}


@settings(max_examples=12)
@given(names=st.permutations(["turned", "more", "few", "base"]), count=st.integers(1, 4), data=st.data())
def test_rows_follow_the_models_that_are_merged(names, count, data, folders, models, resident, tmp_path_factory):
    """What stands in for tokens that a model lacks depends on the others, in the same memory merge after merge."""
    base = data.draw(st.sampled_from([None, *names[:count]]))
    recipe = merge(folders, names[:count], "linear", base if base != "base" else None)
    expected = written(recipe, models, tmp_path_factory.mktemp("written") / "out")
    assert {placed.materialize(recipe) for placed in resident.values()} == {expected}


def test_a_model_alone_computes_what_it_computed(folders, resident):
    """Each token has its own embedding in the base's row, and the probability of a next token is the model's."""
    from transformers import AutoTokenizer

    from evomerge.merging.building import load_model

    placed = resident["device", "kept"]
    placed.materialize(single(str(folders["turned"])))
    text = "Q fay = bob ."
    there = load_model(folders["turned"], torch.bfloat16)
    words = {name: AutoTokenizer.from_pretrained(folders[name]) for name in ("base", "turned")}
    ids = {name: torch.tensor([own.convert_tokens_to_ids(text.split())]) for name, own in words.items()}
    assert ids["base"].tolist() != ids["turned"].tolist()
    with torch.no_grad():
        ours, theirs = placed.candidate(ids["base"]).logits, there(ids["turned"]).logits
    moved = [words["turned"].convert_tokens_to_ids(word) for word in words_of(folders["base"])]
    assert torch.equal(ours[..., : len(moved)], theirs[..., moved])


def test_a_rehearsal_takes_what_a_merge_takes(folders, models):
    from evomerge.merging.resident.rehearsal import RehearsedModels

    for place in PLACES:
        rehearsed = RehearsedModels(models[0], "cpu", "bfloat16", sources=place, vocabulary=models[1])
        rehearsed.rehearse(merge(folders, ("turned", "few"), "task_arithmetic"))
        rows = 2 * 128 * 32 * 4 * 3  # embeddings and head of three models in the base's 128 rows, float32
        whole = sum(tensor.numel() for tensor in rehearsed.model.parameters())
        assert rehearsed.traffic.sources == rows + 3 * 4 * (whole - 2 * 128 * 32)
