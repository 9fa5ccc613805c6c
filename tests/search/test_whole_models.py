"""Searches over models that see as well: merged as a whole, scored by their language model on text alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from evomerge import zoo
from evomerge.layers import embedding_names, layer_count, layer_index
from evomerge.merging.sources.weights import tensor_table
from tests.commands import evomerge
from tests.every_architecture import architectures, tiny_config
from tests.searches import WriteSearch

pytestmark = pytest.mark.slow  # searches from end to end


def family(kind: str, root: Path, count: int = 2) -> list[Path]:
    """Tiny models of one architecture, with the zoo's tokenizer."""
    config_class, auto = architectures()[kind]
    torch.manual_seed(0)
    model = auto.from_config(tiny_config(config_class))
    folders = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        folders.append(root / f"model{number}")
        model.save_pretrained(folders[-1])
        for file in zoo.path("base").glob("tokenizer*"):
            shutil.copyfile(file, folders[-1] / file.name)
        (folders[-1] / "preprocessor_config.json").write_text("{}")
    return folders


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3"])
def test_a_search_over_whole_models_ships_what_it_scored(kind: str, search_file: WriteSearch, tmp_path: Path) -> None:
    base, tuned = family(kind, tmp_path)
    search = search_file(
        base=str(base),
        models={"tuned": str(tuned)},
        objectives=[{"task": "base_qa"}],
        items={"search": 8, "heldout": 8},
        space={"layer_granularity": 1},
        optimizer={"evaluations": 4, "population": 4},
    )
    evomerge("run", search, "--output", tmp_path / "run")
    rows = json.loads(evomerge("candidates", tmp_path / "run", "--json"))
    assert all(row["error"] is None for row in rows)
    groups = {name.split(":")[-1] for name in rows[-1]["genes"]}
    assert groups == {"embeddings", "layer_0", "layer_1", "head"}
    evomerge("export", tmp_path / "run", "--candidate", rows[-1]["id"], "-o", tmp_path / "recipe.yaml")
    assert "the one that was scored" in evomerge("merge", tmp_path / "recipe.yaml", tmp_path / "merged")
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (tmp_path / "merged" / "preprocessor_config.json").exists()


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3", "llava", "mistral3"])
def test_what_sees_has_no_part_in_the_language_model_s_layers(kind: str, tmp_path: Path) -> None:
    (folder,) = family(kind, tmp_path, 1)
    names = tensor_table(folder)
    assert layer_count(names) == 2
    seeing = [name for name in names if any(part in name for part in ("vision", "visual", "multi_modal_projector"))]
    assert seeing
    assert all(layer_index(name) is None for name in seeing)
    assert set(seeing) <= set(embedding_names(names))


@pytest.mark.parametrize(
    ("kind", "new", "old"),
    [("llava", "model.language_model.", "language_model.model."), ("qwen2_5_vl", "model.language_model.", "model.")],
)
def test_a_checkpoint_with_the_names_of_an_earlier_transformers_has_today_s(
    kind: str, new: str, old: str, tmp_path: Path
) -> None:
    (folder,) = family(kind, tmp_path, 1)
    expected = tensor_table(folder)
    renames: dict[str, Any] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        renames[name.replace(new, old) if name.startswith(new) else name] = tensor
    earlier = shutil.copytree(folder, tmp_path / "earlier")
    save_file(renames, earlier / "model.safetensors", metadata={"format": "pt"})
    found = tensor_table(earlier)
    assert {name: info.shape for name, info in found.items()} == {name: info.shape for name, info in expected.items()}
