"""StreamedMerge: the same weights as in memory, a few tensors at a time, for models of any number of layers."""

import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen2Config

from evomerge.errors import InputError
from evomerge.export import checkpoint
from evomerge.layers import layer_index, with_layer
from evomerge.merging.methods import METHODS
from evomerge.merging.resident.models import ResidentModels, fingerprint
from evomerge.merging.skeleton import Skeleton, skeleton_of
from evomerge.merging.sources.weights import Weights
from evomerge.merging.streamed import merge as stream_module
from evomerge.recipe import Provenance, Recipe, Slice, Source
from tests.merging.ways import FEW
from tests.models import UNMEASURED, load_models

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def make_model(tmp_path_factory) -> Callable[..., str]:
    """A tiny random model of any architecture, by its config."""

    def make(config: Any, seed: int = 0) -> str:
        folder = tmp_path_factory.mktemp("model")
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="module")
def resident(tiny_models) -> Callable[[str], ResidentModels]:
    folders = {str(folder): folder for folder in tiny_models.values()}
    made: dict[str, ResidentModels] = {}

    def models(dtype: str) -> ResidentModels:
        if dtype not in made:
            made[dtype] = load_models(folders, tiny_models["base"], "cpu", dtype)
        return made[dtype]

    return models


def whole(method: str, base: str, *models: str, dtype: str = "float32") -> Recipe:
    values = {"weight": 0.6, "density": 0.7}
    sources = tuple(Source(model=model, parameters=values) for model in models)
    return Recipe(
        merge_method=method,
        base_model=base if METHODS[method].uses_base else None,
        models=sources[: METHODS[method].most],
        parameters={"t": 0.3},
        dtype=dtype,
        evomerge=Provenance(seed=3),
    )


def passthrough(*parts: tuple[str, int, int], **keys: Any) -> Recipe:
    slices = tuple(Slice(sources=(Source(model=model, layer_range=(start, end)),)) for model, start, end in parts)
    return Recipe(merge_method="passthrough", slices=slices, **keys)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    weights = Weights(folder)
    return {name: weights.read(name) for name in weights.table}


# The same as in memory


@pytest.mark.parametrize(
    ("method", "dtype"), [*((method, "bfloat16") for method in UNMEASURED), *((method, "float32") for method in FEW)]
)
def test_the_fingerprint_is_that_of_the_merge_in_memory(method, dtype, tiny_models, resident, tmp_path):
    recipe = whole(method, *(str(tiny_models[name]) for name in ("base", "first", "second")), dtype=dtype)
    found, _ = checkpoint.merge(recipe, tmp_path / "out", "recipe.yaml")
    assert found == resident(dtype).materialize(recipe)
    assert found == fingerprint(load_file(tmp_path / "out" / "model.safetensors"))


def test_tied_parameters_count_once(make_model, tmp_path):
    models = [make_model(LlamaConfig(**SMALL, num_hidden_layers=2, tie_word_embeddings=True), seed) for seed in (0, 1)]
    recipe = whole("linear", *models[:1], *models)
    found, _ = checkpoint.merge(recipe, tmp_path / "out", "recipe.yaml")
    folders = {model: Path(model) for model in models}
    assert found == load_models(folders, Path(models[0]), "cpu", "float32").materialize(recipe)
    assert "lm_head.weight" not in stored(tmp_path / "out")


# What it holds at a time


def test_no_more_tensors_are_alive_than_one_merge_takes(tiny_models, tmp_path, monkeypatch):
    alive, most = weakref.WeakSet[torch.Tensor](), 0

    read = Weights.read

    def watched(*arguments: Any) -> torch.Tensor:
        nonlocal most
        alive.add(tensor := read(*arguments))
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(Weights, "read", watched)
    checkpoint.merge(whole("ties", *map(str, tiny_models.values())), tmp_path / "out", "recipe.yaml")
    assert 0 < most <= 4


def test_weights_are_written_in_shards_of_at_most_the_given_size(tiny_models, tmp_path):
    recipe = whole("linear", *map(str, tiny_models.values()))
    found, _ = checkpoint.merge(recipe, tmp_path / "parts", "recipe.yaml", shard_size="60KB")
    assert found == checkpoint.merge(recipe, tmp_path / "one", "recipe.yaml", shard_size="1K")[0]
    for folder, limit in (("parts", 60_000), ("one", 4_000)):
        files = list((tmp_path / folder).glob("*.safetensors"))
        index = json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {file.name for file in files}
        tables = {file.name: load_file(file) for file in files}
        assert {name: file for file, table in tables.items() for name in table} == index["weight_map"]
        sizes = [[tensor.nbytes for tensor in table.values()] for table in tables.values()]
        assert all(sum(size) <= limit or len(size) == 1 for size in sizes)
        assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "parts")
    assert fingerprint(dict(loaded.named_parameters())) == found


@pytest.mark.parametrize("size", ["5", "five", "0GB", "-1GB", "5 XB", ""])
def test_a_shard_size_that_is_none_is_refused(size, tiny_models, tmp_path):
    with pytest.raises(InputError, match=f"--max-shard-size is '{size}'; use a size such as 5GB"):
        checkpoint.merge(whole("linear", *map(str, tiny_models.values())), tmp_path / "o", "r.yaml", shard_size=size)
    assert not list(tmp_path.iterdir())


# Other layers than the models have

LISTED = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
ARCHITECTURES = {
    "llama": LlamaConfig(**SMALL, num_hidden_layers=4),
    "qwen2": Qwen2Config(**SMALL, num_hidden_layers=4, layer_types=LISTED, sliding_window=4, use_sliding_window=True),
    "gemma3": Gemma3TextConfig(**SMALL, num_hidden_layers=4, head_dim=8, layer_types=LISTED, sliding_window=4),
    "gpt2": GPT2Config(vocab_size=64, n_embd=16, n_layer=4, n_head=2, n_positions=32),
}


@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_layers_are_repeated_dropped_and_reordered_with_what_the_config_says_of_them(config, make_model, tmp_path):
    """Compared with the layers taken out of the source by hand, run one after the other."""
    source = make_model(config)
    order = [2, 3, 0, 3, 2, 3]
    checkpoint.merge(
        passthrough((source, 2, 4), (source, 0, 1), (source, 3, 4), (source, 2, 4)), tmp_path / "o", "r.yaml"
    )
    merged, model = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "o", source))
    assert merged.config.num_hidden_layers == 6
    if hasattr(config, "layer_types") and config.layer_types:
        assert merged.config.layer_types == [config.layer_types[layer] for layer in order]
    originals, layers = dict(model.named_parameters()), dict(merged.named_parameters())
    for name, parameter in layers.items():
        number = layer_index(name)
        expected = name if number is None else with_layer(name, order[number])
        assert torch.equal(parameter, originals[expected]), name
    assert merged(torch.arange(12)[None]).logits.isfinite().all()


def test_models_of_different_depths_give_their_layers(make_model, tmp_path):
    short, long = (make_model(LlamaConfig(**SMALL, num_hidden_layers=layers), layers) for layers in (2, 5))
    checkpoint.merge(passthrough((short, 0, 2), (long, 3, 5)), tmp_path / "a", "r.yaml")
    checkpoint.merge(passthrough((long, 4, 5), (short, 1, 2)), tmp_path / "b", "r.yaml")
    assert torch.equal(
        stored(tmp_path / "a")["model.layers.3.mlp.up_proj.weight"],
        stored(Path(long))["model.layers.4.mlp.up_proj.weight"],
    )
    assert json.loads((tmp_path / "b" / "config.json").read_text())["num_hidden_layers"] == 2


def test_models_that_do_not_fit_together_are_refused(make_model, tmp_path):
    narrow, wide, deep = (
        make_model(LlamaConfig(**SMALL | changes, num_hidden_layers=layers))
        for changes, layers in (({}, 2), ({"intermediate_size": 32}, 2), ({}, 3))
    )
    cases = {
        r"r.yaml: model.layers.0.mlp.\w+.weight of .* has shape \[\d+, \d+\], but the merge .* only models of one": (
            passthrough((narrow, 0, 1), (wide, 0, 1))
        ),
        r"r.yaml: .* has 3 layers, but .* has 2; models are merged whole": whole("linear", narrow, narrow, deep),
        r"r.yaml: slices\[0\] takes layers \[0, 3\) of .*, which has 2": passthrough((narrow, 0, 3)),
    }
    for message, recipe in cases.items():
        with pytest.raises(InputError, match=message):
            checkpoint.merge(recipe, tmp_path / "out", "r.yaml")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def with_tensors(tmp_path) -> Callable[..., str]:
    """A copy of a model whose file holds some more tensors."""

    def add(model: str, **tensors: torch.Tensor) -> str:
        folder = shutil.copytree(model, tmp_path / "source")
        more = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        save_file(load_file(folder / "model.safetensors") | more, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    return add


def test_a_tensor_that_the_merge_would_lose_is_refused(make_model, with_tensors, tmp_path):
    base = make_model(LlamaConfig(**SMALL, num_hidden_layers=2))
    more = with_tensors(base, model__layers__1__mlp__up_proj__bias=torch.zeros(24))
    with pytest.raises(InputError, match=r"has the tensor model\.layers\.1\.mlp\.up_proj\.bias, which the merge"):
        checkpoint.merge(whole("ties", base, base, more), tmp_path / "out", "r.yaml")


def test_what_a_layer_holds_besides_parameters_is_copied_with_it(make_model, with_tensors, tmp_path, monkeypatch):
    def with_scalars(*arguments: Any) -> Skeleton:
        skeleton = skeleton_of(*arguments)
        layers = skeleton.config.num_hidden_layers
        return replace(
            skeleton, buffers={f"model.layers.{layer}.scalar": ((1,), torch.float64) for layer in range(layers)}
        )

    plain = make_model(LlamaConfig(**SMALL, num_hidden_layers=2))
    scalars = {f"model__layers__{layer}__scalar": torch.tensor([1.5 + layer]).double() for layer in range(2)}
    source = with_tensors(plain, **scalars)
    monkeypatch.setattr(stream_module, "skeleton_of", with_scalars)
    found, _ = checkpoint.merge(passthrough((source, 1, 2), (source, 0, 2)), tmp_path / "out", "r.yaml")
    tensors = stored(tmp_path / "out")
    assert [tensors[f"model.layers.{layer}.scalar"].item() for layer in range(3)] == [2.5, 1.5, 2.5]
    assert found == fingerprint({name: tensor for name, tensor in tensors.items() if "scalar" not in name})


def test_a_source_with_values_that_are_not_finite_is_refused(make_model, tmp_path):
    source = Path(make_model(LlamaConfig(**SMALL, num_hidden_layers=1)))
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(source)
    with pytest.raises(InputError, match=r"norm\.weight holds values that are not finite"):
        checkpoint.merge(passthrough((str(source), 0, 1)), tmp_path / "out", "r.yaml")
    assert not list(tmp_path.iterdir())
