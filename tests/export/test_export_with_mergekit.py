"""From a recipe to a checkpoint, beside mergekit on the same YAML; and that a merge is written whole or not at all."""

import shutil
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge import cli
from evomerge import recipe as recipes
from evomerge.config.base import GeneConfig
from evomerge.config.spaces import ParameterSpaceConfig
from evomerge.errors import InputError, WorkFailed
from evomerge.export import checkpoint
from evomerge.export import recipe as export
from evomerge.export.names import public_recipe
from evomerge.merging.building import load_model
from evomerge.merging.methods import METHODS
from evomerge.merging.resident.models import fingerprint
from evomerge.merging.sources import located
from evomerge.merging.sources.weights import tensor_table
from evomerge.merging.streamed import merge as stream
from evomerge.merging.streamed.shards import write_weights
from evomerge.recipe import Provenance, Recipe, Source
from evomerge.spaces.parameter import ParameterSpace

pytestmark = pytest.mark.slow  # mergekit merges every case too

THEIRS = {name: method for name, method in METHODS.items() if method.mergekit}
ALIKE = [name for name, method in THEIRS.items() if method.takes("weight") and not method.random and not method.most]
WEIGHTLESS = [name for name, method in THEIRS.items() if not method.takes("weight")]
RANDOM = [name for name, method in METHODS.items() if method.random]


@pytest.fixture(scope="module")
def paths(tiny_models) -> dict[str, str]:
    return {name: str(folder) for name, folder in tiny_models.items()}


@pytest.fixture(scope="module")
def decoded(paths, tiny_models) -> Callable[..., Recipe]:
    """The recipe of a random genome of a space with layer groups and filters.

    Weights are positive: where they cancel, two orders of the same sum differ by more than their results' last place.
    """

    def decode(method: str, seed: int = 0, **space: Any) -> Recipe:
        config = ParameterSpaceConfig(
            method=method,
            layer_groups=("0", "1-3"),
            filters=("mlp", "self_attn.q_proj"),
            weight=GeneConfig(low=0.1, high=1.5, step=0.3),
            lambda_=GeneConfig(low=0.5, high=1.5, step=0.1),
            **space,
        )
        models = {name: paths[name] for name in ("first", "second", "third")}
        made = ParameterSpace(config, paths["base"], models, tuple(tensor_table(tiny_models["base"])), seed)
        low, high = np.array([(gene.low, gene.high) for gene in made.genes]).T
        return made.decode(np.random.default_rng(seed).uniform(low, high))

    return decode


def merged_by_mergekit(recipe: Recipe, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    config = MergeConfiguration.model_validate(yaml.safe_load(recipe.to_yaml()))
    run_merge(
        config,
        str(out),
        MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, clone_tensors=True, **options),
    )
    return load_file(out / "model.safetensors")


def assert_close(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        difference = (ours[name].double() - tensor.double()).abs().max().item()
        assert difference <= tolerance * tensor.abs().max().item(), name


# Beside mergekit


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("method", ALIKE)
def test_mergekit_makes_the_same_weights_from_a_search_s_recipe(method, normalize, seed, decoded, tmp_path):
    recipe = decoded(method, seed, normalize=normalize)
    checkpoint.merge(recipe, tmp_path / "ours", "recipe.yaml")
    theirs = merged_by_mergekit(recipe, tmp_path / "theirs")
    assert_close(load_file(tmp_path / "ours" / "model.safetensors"), theirs, 1e-6)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear"])
def test_mergekit_makes_the_same_weights_from_weights_by_tensor(method, decoded, tmp_path):
    recipe = decoded(method, 3, tensor_weights=True, normalize="auto")
    checkpoint.merge(recipe, tmp_path / "ours", "recipe.yaml")
    theirs = merged_by_mergekit(recipe, tmp_path / "theirs")
    assert_close(load_file(tmp_path / "ours" / "model.safetensors"), theirs, 1e-6)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("method", WEIGHTLESS)
def test_mergekit_makes_the_same_weights_from_a_search_over_a_method_s_own_parameters(method, seed, decoded, tmp_path):
    recipe = decoded(method, seed, participate=METHODS[method].most is None, normalize="auto")
    checkpoint.merge(recipe, tmp_path / "ours", "recipe.yaml")
    ours, theirs = load_file(tmp_path / "ours" / "model.safetensors"), merged_by_mergekit(recipe, tmp_path / "theirs")
    at_the_threshold = 1 if method == "arcee_fusion" else 0  # an element that mergekit's float32 puts on its other side
    for name, tensor in theirs.items():
        difference = (ours[name].double() - tensor.double()).abs()
        assert difference.gt(1e-6 * tensor.abs().max()).sum() <= at_the_threshold, name


@pytest.mark.parametrize("method", [*ALIKE, "nuslerp"])
def test_mergekit_makes_the_same_weights_from_gradients_and_filters(method, paths, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
        merge_method: {method}
        base_model: {paths["base"]}
        models:
          - model: {paths["first"]}
            parameters: {{weight: [0.2, 1e-1, 0.9], density: [1, 0.3]}}
          - model: {paths["second"]}
            parameters:
              weight: [{{filter: mlp, value: [0.5, 0.1]}}, {{filter: lm_head, value: 0.3}}, {{value: 0.4}}]
              density: 0.5
        parameters: {{weight: 0.25, normalize: true, lambda: 0.8}}
        """
    )
    checkpoint.merge(recipes.load(path), tmp_path / "ours", str(path))
    theirs = merged_by_mergekit(recipes.load(path), tmp_path / "theirs")
    assert_close(load_file(tmp_path / "ours" / "model.safetensors"), theirs, 1e-6)


# As mergekit's documentation and its users write them.
RECIPES = {
    "soup": """
        merge_method: linear
        models:
          - {model: FIRST, parameters: {weight: 0.3}}
          - {model: SECOND, parameters: {weight: 1}}
          - {model: THIRD, parameters: {weight: 0.5}}
        dtype: float32
        """,
    "slerp with a gradient and filters": """
        merge_method: slerp
        base_model: FIRST
        slices:
          - sources:
              - {model: FIRST, layer_range: [0, 4]}
              - {model: SECOND, layer_range: [0, 4]}
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - value: 0.5
        dtype: float32
        """,
    "slerp of models, the base last": """
        merge_method: slerp
        base_model: SECOND
        models: [{model: FIRST}, {model: SECOND}]
        parameters: {t: [0.2, 0.8]}
        """,
    "nuslerp": """
        merge_method: nuslerp
        models:
          - {model: FIRST, parameters: {weight: 0.3}}
          - {model: SECOND, parameters: {weight: [0.5, 1.5]}}
        """,
    "nuslerp of task vectors by rows": """
        merge_method: nuslerp
        base_model: BASE
        models:
          - {model: FIRST, parameters: {weight: 0.3}}
          - {model: SECOND, parameters: {weight: 0.7}}
        parameters: {nuslerp_flatten: false, nuslerp_row_wise: [{filter: mlp, value: true}, {value: false}]}
        """,
    "multislerp": """
        merge_method: multislerp
        models:
          - {model: FIRST, parameters: {weight: 0.3}}
          - {model: SECOND, parameters: {weight: 0.7}}
          - {model: THIRD, parameters: {weight: [0.1, 2]}}
        """,
    "multislerp of task vectors": """
        merge_method: multislerp
        base_model: BASE
        models:
          - {model: FIRST, parameters: {weight: 0.3}}
          - {model: SECOND, parameters: {weight: 0.7}}
        """,
    "karcher": """
        merge_method: karcher
        models: [{model: FIRST}, {model: SECOND}, {model: THIRD}]
        parameters: {max_iter: 10, tol: 1e-5}
        """,
    "karcher with a base, which takes part": """
        merge_method: karcher
        base_model: BASE
        models: [{model: FIRST}, {model: SECOND}]
        """,
    "breadcrumbs": """
        merge_method: breadcrumbs
        base_model: BASE
        models:
          - {model: FIRST, parameters: {weight: 0.5, density: 0.9, gamma: 0.01}}
          - {model: SECOND, parameters: {weight: 0.5, density: 0.7, gamma: [0.01, 0.1]}}
        parameters: {lambda: 0.9}
        """,
    "breadcrumbs_ties": """
        merge_method: breadcrumbs_ties
        base_model: BASE
        models:
          - {model: FIRST, parameters: {weight: 0.5, density: 0.5}}
          - {model: SECOND, parameters: {weight: 0.4, density: 0.6}}
        parameters: {normalize: true, rescale: true, int8_mask: true}
        """,
    "model_stock": """
        merge_method: model_stock
        base_model: BASE
        models: [{model: FIRST}, {model: SECOND}, {model: THIRD}]
        parameters: {filter_wise: false}
        """,
    "model_stock by filters": """
        merge_method: model_stock
        base_model: BASE
        models: [{model: FIRST}, {model: SECOND}]
        parameters: {filter_wise: true}
        """,
    "sce": """
        merge_method: sce
        base_model: BASE
        models: [{model: FIRST}, {model: SECOND}, {model: THIRD}]
        parameters: {select_topk: 0.4}
        """,
    "ram": """
        merge_method: ram
        base_model: BASE
        models: [{model: FIRST}, {model: SECOND}, {model: THIRD}]
        parameters: {epsilon: 1e-2}
        """,
    "ramplus_tl": """
        merge_method: ramplus_tl
        base_model: BASE
        models: [{model: FIRST}, {model: SECOND}, {model: THIRD}]
        parameters: {epsilon: 1e-2, r: 0.7, alpha: 3.0}
        """,
    "nearswap": """
        merge_method: nearswap
        base_model: BASE
        models: [{model: FIRST}]
        parameters: {t: 0.005}
        """,
    "passthrough of one model": """
        merge_method: passthrough
        models: [{model: FIRST}]
        """,
    "passthrough of slices with scales": """
        merge_method: passthrough
        slices:
          - sources: [{model: FIRST, layer_range: [0, 2]}]
          - sources:
              - model: SECOND
                layer_range: [2, 4]
                parameters:
                  scale:
                    - {filter: o_proj, value: 0.0}
                    - {filter: down_proj, value: [0.5, 0.25]}
                    - value: 1.0
        """,
    "a frankenmerge of overlapping layers with scales": """
        merge_method: passthrough
        slices:
          - sources: [{model: FIRST, layer_range: [0, 3]}]
          - sources:
              - model: SECOND
                layer_range: [1, 4]
                parameters:
                  scale:
                    - {filter: o_proj, value: 0.0}
                    - {filter: layers.2.mlp, value: 0.9}
                    - {filter: down_proj, value: [0.5, 0.25]}
                    - value: 1.0
          - sources: [{model: FIRST, layer_range: [2, 4]}]
        dtype: float32
        """,
    "layers dropped and in another order": """
        merge_method: passthrough
        slices:
          - sources: [{model: FIRST, layer_range: [2, 4]}]
          - sources: [{model: FIRST, layer_range: [0, 1]}]
        """,
    "slerp between different layers": """
        merge_method: slerp
        base_model: FIRST
        slices:
          - sources: [{model: FIRST, layer_range: [0, 3]}, {model: SECOND, layer_range: [1, 4]}]
          - sources: [{model: SECOND, layer_range: [3, 4]}, {model: FIRST, layer_range: [0, 1]}]
            base_model: SECOND
        parameters:
          t:
            - {filter: layers.1., value: 0.1}
            - {filter: self_attn, value: [0, 0.5, 1]}
            - value: 0.4
        """,
    "task vectors of layers that lie elsewhere": """
        merge_method: ties
        base_model: BASE
        slices:
          - sources:
              - {model: BASE, layer_range: [1, 3]}
              - {model: FIRST, layer_range: [0, 2], parameters: {weight: 0.7, density: 0.6}}
              - {model: SECOND, layer_range: [2, 4], parameters: {weight: [0.2, 0.5]}}
          - sources:
              - {model: BASE, layer_range: [0, 4]}
              - {model: FIRST, layer_range: [0, 4], parameters: {weight: 0.7}}
              - {model: THIRD, layer_range: [0, 4], parameters: {weight: 0.4, density: 0.9}}
        """,
    "an average of two parts of one depth": """
        merge_method: linear
        slices:
          - sources:
              - {model: FIRST, layer_range: [0, 2], parameters: {weight: 0.7}}
              - {model: SECOND, layer_range: [2, 4], parameters: {weight: 0.2}}
        out_dtype: float32
        """,
}


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES.keys())
def test_mergekit_makes_the_same_weights_from_recipes_as_people_write_them(text, paths, tmp_path):
    for name in ("base", "first", "second", "third"):
        text = text.replace(name.upper(), paths[name])
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    ours = recipes.load(path)
    checkpoint.merge(ours, tmp_path / "ours", str(path))
    theirs = merged_by_mergekit(ours, tmp_path / "theirs")
    assert_close(load_file(tmp_path / "ours" / "model.safetensors"), theirs, 1e-6)


# As people write them who never read mergekit's documentation: each is read by both as it stands.
HABITS = {
    "references as mappings": """
        base_model: {model: {path: BASE}}
        models:
          - {model: {model: {path: FIRST, revision: main}, lora: null}, parameters: {weight: 0.5}}
          - {model: {model: SECOND, override_architecture: null}, parameters: {weight: [0.2, "0.4"]}}
        merge_method: task_arithmetic
        tokenizer_source: {model: {path: BASE}}
        dtype: torch.float32
        """,
    "keys of other programs": """
        name: my-merge
        allow_negative_weights: true
        merge_method: ties
        base_model: BASE
        models:
          - {model: FIRST, layer_range: [0, 2], comment: good, parameters: {weight: 0.5, density: 0.5}}
          - {model: SECOND, layer_range: [0, 4], parameters: {weight: 1, wieght: 3, normalize: false}}
        """,
    "keys with nothing behind them": """
        merge_method: linear
        base_model:
        modules: null
        slices:
        tokenizer:
        tokenizer_source: ~
        chat_template:
        models:
          - {model: FIRST, parameters: {weight: [{value: 0.25, filter: null}]}}
          - {model: SECOND, parameters: }
        parameters: {weight: {value: 0.75}}
        dtype:
        """,
    "one module with models": """
        merge_method: task_arithmetic
        base_model: BASE
        parameters: {weight: [{filter: mlp, value: 0.2}, {value: 0.9}], lambda: 3}
        modules:
          default:
            parameters: {weight: [{filter: q_proj, value: 0.6}], lambda: 0.5}
            models:
              - {model: FIRST, parameters: {weight: [{filter: up_proj, value: 0.1}]}}
              - {model: SECOND}
        """,
    "one module with slices": """
        merge_method: slerp
        base_model: FIRST
        parameters: {t: 0.9}
        modules:
          default:
            parameters: {t: {filter: mlp, value: [0, 1]}}
            slices:
              - sources: [{model: FIRST, layer_range: [0, 4]}, {model: SECOND, layer_range: [0, 4]}]
        """,
    "slices with all of it": """
        merge_method: slerp
        base_model: {model: {path: FIRST}}
        slices:
          - residual_weight: 0.5
            parameters:
            sources:
              - {model: {model: FIRST}, layer_range: [0.0, 4], parameters: }
              - {model: SECOND, layer_range: ["0", 4], note: x}
        parameters: {t: [{filter: mlp, value: "5e-1", note: x}, {value: [0, 1]}]}
        """,
}


@pytest.mark.parametrize("text", HABITS.values(), ids=HABITS.keys())
def test_mergekit_makes_the_same_weights_from_the_file_itself_as_people_write_it(text, paths, tmp_path):
    for name in ("base", "first", "second"):
        text = text.replace(name.upper(), paths[name])
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    checkpoint.merge(located.load(path), tmp_path / "ours", str(path))
    command = CliRunner().invoke(mergekit_yaml, ["--quiet", str(path), str(tmp_path / "theirs")])
    assert command.exit_code == 0, command.exception
    ours, theirs = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert_close(ours, theirs, 1e-6)


@pytest.mark.parametrize("method", sorted({*METHODS} - {"nuslerp"}))  # which takes two models, not three
def test_a_search_s_recipe_says_nothing_in_vain(method, decoded, tmp_path):
    export.write_recipe(decoded(method, normalize="auto"), tmp_path / "recipe.yaml")
    located.load(tmp_path / "recipe.yaml", pytest.fail)


def test_parameters_that_a_method_does_not_read_are_named(paths, tmp_path):
    path, told = tmp_path / "recipe.yaml", []
    path.write_text(
        f"""
        merge_method: ties
        base_model: {paths["base"]}
        parameters: {{densty: 0.5, normalize: true}}
        slices:
          - parameters: {{t: 0.5}}
            sources:
              - {{model: {paths["base"]}, layer_range: [0, 4]}}
              - {{model: {paths["first"]}, layer_range: [0, 4], parameters: {{weight: 1, lambda: 2}}}}
        """
    )
    located.load(path, told.append)
    assert told == [
        f"{path}: parameters.densty is ignored, since merge_method ties has no such parameter; did you mean 'density'?",
        f"{path}: slices[0].parameters.t is ignored, since merge_method ties has no such parameter.",
        f"{path}: slices[0].sources[1].parameters.lambda is ignored, since all models share it; write it below the "
        "recipe's parameters.",
    ]


def test_arcee_fusion_is_mergekit_s_but_for_elements_at_the_threshold(paths, tmp_path):
    """Its importance is a difference of nearly equal logarithms, which mergekit takes in float32."""
    recipe = Recipe(merge_method="arcee_fusion", base_model=paths["base"], models=(Source(model=paths["first"]),))
    checkpoint.merge(recipe, tmp_path / "ours", "recipe.yaml")
    theirs, ours = merged_by_mergekit(recipe, tmp_path / "theirs"), load_file(tmp_path / "ours" / "model.safetensors")
    differing = sum(((ours[name] - tensor).abs() > 1e-6).sum().item() for name, tensor in theirs.items())
    assert differing <= 1e-3 * sum(tensor.numel() for tensor in theirs.values())


@pytest.mark.parametrize("method", ALIKE)
def test_mergekit_rounds_to_the_same_bfloat16_where_it_too_computes_in_float32(method, decoded, tmp_path):
    recipe = decoded(method).model_copy(update={"dtype": "float32", "out_dtype": "bfloat16"})
    checkpoint.merge(recipe, tmp_path / "ours", "recipe.yaml")
    ours, theirs = load_file(tmp_path / "ours" / "model.safetensors"), merged_by_mergekit(recipe, tmp_path / "theirs")
    assert_close(ours, theirs, 2**-8)  # where a float32 lies next to the middle, one bfloat16 step
    different = sum((ours[name] != tensor).sum().item() for name, tensor in theirs.items())
    assert different <= 1e-3 * sum(tensor.numel() for tensor in theirs.values())


@pytest.mark.parametrize("method", RANDOM)
def test_mergekit_accepts_a_random_recipe(method, decoded, tmp_path):
    """Its masks are its own, so only the shape of the result is the same."""
    recipe = decoded(method).model_copy(update={"evomerge": Provenance(seed=3, rescale="l1")})
    checkpoint.merge(recipe, tmp_path / "ours", "recipe.yaml")
    theirs = merged_by_mergekit(recipe, tmp_path / "theirs", random_seed=0)
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert all(tensor.isfinite().all() for tensor in theirs.values())


def test_the_mergekit_command_reads_a_recipe_with_its_provenance(decoded, paths, tmp_path):
    recipe = decoded("task_arithmetic")
    scored = Provenance(
        candidate="g0-c0", scores={"task": 0.5}, aliases={paths["first"]: "zoo:math"}, versions={"a": "1"}
    )
    export.write_recipe(recipe.model_copy(update={"evomerge": scored}), tmp_path / "recipe.yaml")
    command = CliRunner().invoke(mergekit_yaml, ["--quiet", str(tmp_path / "recipe.yaml"), str(tmp_path / "theirs")])
    assert command.exit_code == 0, command.output
    checkpoint.merge(recipe, tmp_path / "ours", "recipe.yaml")
    ours, theirs = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert_close(ours, theirs, 1e-6)


# What is written


@pytest.fixture(scope="module")
def written(decoded, paths, tmp_path_factory) -> Path:
    recipe = decoded("dare_ties", seed=4)
    provenance = recipe.evomerge.model_copy(
        update={"scores": {"task": 0.625}, "heldout": {"task": 0.5}, "aliases": {paths["first"]: "zoo:math"}}
    )
    out = tmp_path_factory.mktemp("written") / "model"
    checkpoint.merge(recipe.model_copy(update={"evomerge": provenance}), out, "recipe.yaml")
    return out


def test_transformers_loads_what_was_written(written):
    model = AutoModelForCausalLM.from_pretrained(written)
    tokenizer = AutoTokenizer.from_pretrained(written)
    tokens = tokenizer("1 + 2 =", return_tensors="pt")
    assert model(**tokens).logits.isfinite().all()


def test_the_folder_holds_a_plain_checkpoint_with_its_recipe_and_a_card(written):
    names = {file.name for file in written.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert {"README.md", "evomerge_recipe.yaml"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".py")) or name.startswith(".")]


def test_the_recipe_beside_a_checkpoint_makes_it_again(written, tmp_path):
    recipe = recipes.load(written / "evomerge_recipe.yaml")
    found, compared = checkpoint.merge(recipe, tmp_path / "again", "evomerge_recipe.yaml")
    assert compared
    assert found == fingerprint(load_file(written / "model.safetensors"))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (written / "model.safetensors").read_bytes()


def test_the_card_names_models_scores_fingerprint_and_recipe(written, paths):
    card = (written / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    last = {name: Path(path).name for name, path in paths.items()}
    assert yaml.safe_load(front)["base_model"] == [last["base"], "zoo:math", last["second"], last["third"]]
    assert fingerprint(load_file(written / "model.safetensors")) in body
    assert "| task | 0.6250 |" in body
    assert "| task | 0.5000 |" in body
    assert public_recipe(recipes.load(written / "evomerge_recipe.yaml")).to_yaml().strip() in body


def test_everyone_may_read_what_was_written(written):
    """safetensors writes files that only their owner reads."""
    assert {stat.S_IMODE(file.stat().st_mode) for file in written.iterdir()} == {0o644}
    assert stat.S_IMODE(written.stat().st_mode) == 0o755


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_written_in_the_recipe_s_dtype(dtype, decoded, tmp_path):
    recipe = decoded("task_arithmetic").model_copy(update={"dtype": dtype})
    found, _ = checkpoint.merge(recipe, tmp_path / "out", "recipe.yaml")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert fingerprint(tensors) == found
    assert fingerprint(dict(load_model(tmp_path / "out", getattr(torch, dtype)).named_parameters())) == found


def test_a_model_merged_alone_is_written_with_its_own_weights(paths, tiny_models, tmp_path):
    checkpoint.merge(recipes.single(paths["second"]), tmp_path / "out", "recipe.yaml")
    ours, source = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(tiny_models["second"] / "model.safetensors"),
    )
    assert_close(ours, source, 0.0)


def test_a_recipe_made_elsewhere_is_merged_from_what_its_paths_stood_for(paths, tmp_path):
    models = (Source(model="/elsewhere/math", parameters={"weight": 0.5}),)
    provenance = Provenance(aliases={"/elsewhere/math": "zoo:math", "/elsewhere/base": "zoo:base"})
    recipe = Recipe(merge_method="task_arithmetic", base_model="/elsewhere/base", models=models, evomerge=provenance)
    here = recipe.renamed(provenance.aliases)
    assert checkpoint.merge(recipe, tmp_path / "a", "recipe.yaml") == checkpoint.merge(
        here, tmp_path / "b", "recipe.yaml"
    )
    with pytest.raises(InputError, match=r"^/elsewhere/base: no such model folder"):
        checkpoint.merge(recipe.model_copy(update={"evomerge": Provenance()}), tmp_path / "c", "recipe.yaml")


# Whole or not at all


@pytest.fixture
def empty(tmp_path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_a_recorded_fingerprint_is_compared(decoded, empty):
    recipe = decoded("dare_ties")
    found, compared = checkpoint.merge(recipe, empty / "first", "recipe.yaml")
    assert not compared
    recorded = recipe.evomerge.model_copy(update={"fingerprint": found})
    recipe = recipe.model_copy(update={"evomerge": recorded})
    assert checkpoint.merge(recipe, empty / "second", "recipe.yaml") == (found, True)


def test_another_fingerprint_than_the_recorded_one_fails_and_leaves_nothing(decoded, empty):
    recipe = decoded("ties")
    provenance = Provenance(fingerprint="0123456789abcdef", versions={"torch": "0.1"})
    recipe = recipe.model_copy(update={"evomerge": provenance})
    with pytest.raises(
        WorkFailed, match=r"^my\.yaml: .* but 0123456789abcdef was scored \(versions changed: torch 0\.1 →"
    ):
        checkpoint.merge(recipe, empty / "deep" / "out", "my.yaml")
    assert not list(empty.iterdir())


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(28, "No space left on device"), SystemExit(143)])
@pytest.mark.parametrize("moment", ["write_weights", "copyfile", "stored_fingerprint"])
def test_an_interrupted_write_leaves_nothing(moment, stop, paths, empty, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        assert [path.name.startswith(".out-") for path in empty.iterdir()] == [True]
        raise stop

    monkeypatch.setattr(f"{'shutil' if moment == 'copyfile' else stream.__name__}.{moment}", fail)
    with pytest.raises(WorkFailed if isinstance(stop, OSError) else type(stop)):
        checkpoint.merge(recipes.single(paths["first"]), empty / "out", "recipe.yaml")
    assert not list(empty.iterdir())


def test_weights_that_read_back_otherwise_are_not_kept(paths, empty, monkeypatch):
    def tamper(folder: Path, *arguments: Any) -> None:
        write_weights(folder, *arguments)
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"?")

    monkeypatch.setattr(stream, "write_weights", tamper)
    with pytest.raises(WorkFailed, match=r"the written weights have fingerprint [0-9a-f]{16}, expected [0-9a-f]{16}"):
        checkpoint.merge(recipes.single(paths["first"]), empty / "out", "recipe.yaml")
    assert not list(empty.iterdir())


def test_an_existing_folder_that_is_not_empty_is_refused_and_left_alone(paths, empty):
    (empty / "out").mkdir()
    (empty / "out" / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="exists and is not empty; choose a new folder"):
        checkpoint.merge(recipes.single(paths["first"]), empty / "out", "recipe.yaml")
    assert (empty / "out" / "mine.txt").read_text() == "keep me"
    assert [file.name for file in empty.rglob("*")] == ["out", "mine.txt"]


def test_an_existing_empty_folder_is_filled(paths, empty):
    checkpoint.merge(recipes.single(paths["first"]), empty, "recipe.yaml")
    assert (empty / "config.json").exists()


def test_a_file_in_the_way_is_an_input_error(paths, empty):
    (empty / "file").write_text("")
    for out in (empty / "file", empty / "file" / "out"):
        with pytest.raises(InputError, match=r"file: exists and is not empty|is a file; choose a path"):
            checkpoint.merge(recipes.single(paths["first"]), out, "recipe.yaml")


def test_what_cannot_be_merged_is_refused_before_anything_is_written(paths, tiny_models, empty, tmp_path):
    other = Path(shutil.copytree(tiny_models["first"], tmp_path / "other"))
    (other / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        checkpoint.merge(recipes.linear({paths["base"]: 1.0, str(other): 1.0}), empty / "out", "my.yaml")
    with pytest.raises(InputError, match=r"^my\.yaml: merge_method is 'slurp', no known merge method"):
        checkpoint.merge(
            recipes.single(paths["base"]).model_copy(update={"merge_method": "slurp"}), empty / "out", "my.yaml"
        )
    assert not list(empty.iterdir())


def test_the_merge_command_takes_mergekit_s_options(paths, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text(recipes.single(paths["first"]).to_yaml())
    options = ["--out-shard-size", "10K", "--no-copy-tokenizer", "--no-write-model-card"]
    monkeypatch.setattr(
        sys, "argv", ["evomerge", "merge", *map(str, [tmp_path / "recipe.yaml", tmp_path / "out"]), *options]
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    assert "license of" in capsys.readouterr().err
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors.index.json", "evomerge_recipe.yaml"} <= names
    assert not [name for name in names if name.startswith(("README", "tokenizer", "chat_template"))]
