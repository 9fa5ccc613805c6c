"""Paths as views, as our checkpoints and as mergekit's, on tiny models of eight architectures."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mergekit.merge
import numpy as np
import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from evomerge.errors import InputError
from evomerge.export import checkpoint
from evomerge.layers import layer_index
from evomerge.merging.building import load_model
from evomerge.merging.resident.models import ResidentModels, fingerprint
from evomerge.recipe import Recipe, Slice, Source
from evomerge.spaces.layer_path import SCALE_RULES, Hop, LayerPath
from tests.architectures import build, family
from tests.models import load_models

LAYERS = 4
EIGHT = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2")
UNSCALED = ("gemma2", "gemma3")
IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=EIGHT)
def models(request, tmp_path_factory) -> tuple[str, ResidentModels, dict[str, str]]:
    """An architecture with its models in memory, and their references by name; layers are far from alike."""
    root = tmp_path_factory.mktemp(request.param)
    settings: dict[str, Any] = {}
    if request.param == "gemma3":  # by default its first layers all see a window
        settings["layer_types"] = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    folders = family(request.param, root, layers=LAYERS, **settings)
    references = {name: str(folder) for name, folder in folders.items()}
    return (
        request.param,
        load_models({str(f): f for f in folders.values()}, folders["base"], "cpu", "float32"),
        (references),
    )


def random_path(references: dict[str, str], seed: int, scaled: bool, scaling: str = "mlp") -> LayerPath:
    """Any layers of two models, some of them twice, with the ends of a third."""
    random = np.random.default_rng(seed)
    scales = random.uniform(0.6, 1.4, 7) if scaled else np.ones(7)
    hops = tuple(
        Hop(references[("first", "second")[random.integers(2)]], int(random.integers(LAYERS)), float(scale))
        for scale in scales
    )
    return LayerPath((*hops, hops[2], hops[2]), references["base"], references["base"], scaling)  # type: ignore[arg-type]


def recipe_of(path: LayerPath, models: ResidentModels, references: dict[str, str]) -> Recipe:
    return path.recipe(models.model.config.model_type, references["base"])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits  # type: ignore[no-any-return]


def generated(model: Any) -> list[list[int]]:
    written = model.generate(IDS[:, :9], max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None)
    return written.tolist()  # type: ignore[no-any-return]


@pytest.fixture
def by_mergekit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, torch.Tensor]]:
    """What mergekit makes of a recipe, under a config of our own.

    Its config leaves `layer_types` as long as before, which transformers 5 refuses to save.
    """
    made = mergekit.merge._model_out_config

    def without_layer_types(*arguments: Any, **options: Any) -> Any:
        config = made(*arguments, **options)
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = None
        return config

    monkeypatch.setattr(mergekit.merge, "_model_out_config", without_layer_types)

    def run(recipe: Recipe, out: Path, like: Path) -> dict[str, torch.Tensor]:
        config = MergeConfiguration.model_validate(yaml.safe_load(recipe.to_yaml()))
        options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, clone_tensors=True)
        mergekit.merge.run_merge(config, str(out), options)
        shutil.copyfile(like / "config.json", out / "config.json")
        return {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}

    return run


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_view_checkpoint_and_mergekit_s_model_think_and_write_alike(scaled, models, by_mergekit, tmp_path):
    architecture, resident, references = models
    path = random_path(references, 5 + scaled, scaled and architecture not in UNSCALED)
    recipe = recipe_of(path, resident, references)
    found = resident.materialize(recipe)
    view = resident.candidate
    expected, text = logits(view), generated(view)
    recorded = recipe.model_copy(update={"evomerge": recipe.evomerge.model_copy(update={"fingerprint": found})})
    assert checkpoint.merge(recorded, tmp_path / "ours", "recipe.yaml") == (found, True)
    ours = load_model(tmp_path / "ours", torch.float32)
    assert fingerprint(dict(ours.named_parameters())) == found
    assert torch.equal(logits(ours), expected)
    assert generated(ours) == text
    tensors = by_mergekit(recipe, tmp_path / "theirs", tmp_path / "ours")
    assert all(torch.equal(tensors[name], value) for name, value in view.named_parameters())
    theirs = load_model(tmp_path / "theirs", torch.float32)
    assert torch.equal(logits(theirs), expected)
    assert generated(theirs) == text


def test_views_share_their_weights_with_the_sources_and_leave_the_resident_model_alone(models):
    architecture, resident, references = models
    before = fingerprint(dict(resident.model.named_parameters()))
    path = random_path(references, 8, architecture not in UNSCALED)
    resident.materialize(recipe_of(path, resident, references))
    shared = {held.tensor.data_ptr() for table in resident._sources.values() for held in table.values()}
    copied = [name for name, tensor in resident.candidate.named_parameters() if tensor.data_ptr() not in shared]
    parts = SCALE_RULES[resident.model.config.model_type].mlp
    assert all(parts is not None and parts in name for name in copied)
    assert len(copied) == (0 if architecture in UNSCALED else len(path.hops))
    assert len({tensor.data_ptr() for _, tensor in resident.candidate.named_parameters()} - shared) == len(copied)
    numbers = [m.layer_idx for m in resident.candidate.modules() if hasattr(m, "layer_idx")]
    assert set(numbers) == set(range(len(path.hops)))
    assert fingerprint(dict(resident.model.named_parameters())) == before
    assert resident.model.config.num_hidden_layers == LAYERS


def hooked(resident: ResidentModels, path: LayerPath) -> torch.Tensor:
    """The logits of a path whose scales are applied while it runs, instead of folded into weights."""
    plain = LayerPath(tuple(Hop(hop.model, hop.layer) for hop in path.hops), path.embeddings, path.head)
    resident.materialize(plain.recipe(resident.model.config.model_type, path.embeddings))
    view = resident.candidate
    for layer, hop in zip(view.model.layers, path.hops, strict=True):
        if path.scaling == "stream":
            layer._forward_pre_hooks = type(layer._forward_pre_hooks)()
            layer._forward_pre_hooks_with_kwargs = type(layer._forward_pre_hooks_with_kwargs)()
            layer.register_forward_pre_hook(lambda _m, args, s=hop.scale: (args[0] * s, *args[1:]))
        else:
            end = getattr(layer, "post_feedforward_layernorm", layer.mlp)
            end._forward_hooks = type(end._forward_hooks)()
            end.register_forward_hook(lambda _m, _args, out, s=hop.scale: out * s)
    return logits(view)


@pytest.mark.parametrize("scaling", ["mlp", "stream"])
def test_folded_scales_do_what_scales_do_or_are_refused(scaling, models):
    architecture, resident, references = models
    path = random_path(references, 3, True, scaling)
    if architecture in UNSCALED:
        with pytest.raises(InputError, match="cannot take scales, since the norms"):
            recipe_of(path, resident, references)
        return
    expected = hooked(resident, path)
    resident.materialize(recipe_of(path, resident, references))
    difference = (logits(resident.candidate) - expected).abs().max() / expected.abs().max()
    assert difference < (1e-5 if scaling == "mlp" else 2e-3)  # the norms' epsilon is not scaled with the stream
    assert difference.isfinite()


def test_a_path_may_take_its_embeddings_and_head_from_models_without_layers_in_it(models):
    _, resident, references = models
    path = LayerPath((Hop(references["first"], 1),), references["second"], references["base"])
    resident.materialize(recipe_of(path, resident, references))
    found = dict(resident.candidate.named_parameters())
    for name, tensor in found.items():
        if layer_index(name) is None:
            model = "second" if "embed" in name else "base"
            assert torch.equal(tensor, resident._sources[references[model]][name].on(tensor.device))


def test_neighbors_in_one_model_with_one_scale_are_one_slice():
    hops = (Hop("a", 0), Hop("a", 1), Hop("a", 2, 0.5), Hop("a", 3, 0.5), Hop("b", 4), Hop("b", 4))
    recipe = LayerPath(hops, "a", "c").recipe("llama", "base")
    ranges = [(part.sources[0].model, part.sources[0].layer_range) for part in recipe.slices or ()]
    assert ranges == [("a", (0, 2)), ("a", (2, 4)), ("b", (4, 5)), ("b", (4, 5)), ("c", (0, 0))]


def test_scales_of_an_unknown_architecture_are_refused():
    with pytest.raises(InputError, match="how scales fold into the weights of a mamba model is not known"):
        LayerPath((Hop("a", 0, 0.5),), "a", "a").recipe("mamba", "a")


def test_a_view_of_48_layers_copies_no_weight(tmp_path):
    from evomerge.merging.resident.view import make_view

    model = build("llama", layers=24)
    templates = [number // 2 for number in range(48)]
    own = dict(model.named_parameters())
    parameters = {name: value for name, value in own.items() if layer_index(name) is None}
    for place, template in enumerate(templates):
        for name, value in own.items():
            if layer_index(name) == template:
                parameters[name.replace(f".{template}.", f".{place}.", 1)] = value
    view = make_view(model, parameters, templates)
    assert {id(p) for p in view.parameters()} == {id(p) for p in model.parameters()}
    assert len(view.model.layers) == view.config.num_hidden_layers == 48


def test_merged_layers_may_be_repeated_too(models):
    """As a hybrid search does: every output layer is merged where it stands."""
    _, resident, references = models

    def part(start: int, end: int) -> Slice:
        sources = tuple(
            Source(model=references[name], layer_range=(start, end), parameters={"weight": weight})
            for name, weight in (("first", 0.25), ("second", 0.75))
        )
        return Slice(sources=sources)

    recipe = Recipe(merge_method="linear", slices=(part(0, 3), part(1, 4)))
    resident.materialize(recipe)
    view = dict(resident.candidate.named_parameters())
    resident.materialize(Recipe(merge_method="linear", slices=(part(0, LAYERS),)))
    whole = dict(resident.model.named_parameters())
    for name, tensor in view.items():
        layer = layer_index(name)
        source = name if layer is None else name.replace(f".{layer}.", f".{[0, 1, 2, 1, 2, 3][layer]}.", 1)
        assert torch.equal(tensor, whole[source])
