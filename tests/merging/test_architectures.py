"""Ten architectures through the whole merge: names, weights, checkpoint; and checkpoints that name them otherwise."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evomerge.errors import InputError
from evomerge.events import unheard
from evomerge.export import checkpoint, choice
from evomerge.export import recipe as export
from evomerge.layers import embedding_names, head_names, layer_count, layer_index
from evomerge.merging.building import load_model
from evomerge.merging.naming import named_weights
from evomerge.merging.resident.models import ResidentModels, fingerprint
from evomerge.merging.sources.weights import Weights, load_tensors, tensor_table
from evomerge.recipe import Recipe, Source, linear, single
from evomerge.runs import directory as runs
from tests.architectures import ARCHITECTURES, TIED, build, family, save
from tests.conftest import REPOSITORY
from tests.models import check_models, load_models

WEIGHTS = "model.safetensors"
NAMES = sorted(ARCHITECTURES)


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, dict[str, Path]]:
    root = tmp_path_factory.mktemp("architectures")
    return {name: family(name, root / name, layers=2) for name in NAMES}


def resident(folders: dict[str, Path], dtype: str = "float32") -> ResidentModels:
    return load_models(folders, folders["base"], "cpu", dtype)


def merged(models: ResidentModels, recipe: Recipe) -> dict[str, torch.Tensor]:
    models.materialize(recipe)
    return {name: weight.detach().clone() for name, weight in named_weights(models.model).items()}


def task_arithmetic(weights: dict[str, float]) -> Recipe:
    return Recipe(
        merge_method="task_arithmetic",
        base_model="base",
        models=tuple(Source(model=model, parameters={"weight": weight}) for model, weight in weights.items()),
    )


@pytest.mark.parametrize("name", NAMES)
def test_layers_embeddings_and_head_are_told_apart(name, families):
    names = list(tensor_table(families[name]["base"]))
    assert layer_count(names) == 2
    embeddings = {
        "gpt_neox": ["gpt_neox.embed_in.weight"],
        "gpt2": ["transformer.wpe.weight", "transformer.wte.weight"],
    }
    assert embedding_names(names) == embeddings.get(name, ["model.embed_tokens.weight"])
    heads = [head for head in head_names(names) if "norm" not in head and "ln_f" not in head]
    assert heads == ([] if name in TIED else ["embed_out.weight" if name == "gpt_neox" else "lm_head.weight"])
    assert {layer_index(each) for each in names} == {None, 0, 1}


@pytest.mark.parametrize("name", NAMES)
def test_a_merge_is_the_formula_on_the_stored_tensors(name, families):
    folders = {key: str(folder) for key, folder in families[name].items()}
    check_models(folders["base"], {key: folders[key] for key in ("first", "second")})
    stored = {key: load_file(Path(folder) / WEIGHTS) for key, folder in folders.items()}
    models = resident(families[name])
    average = merged(models, linear({"first": 1.0, "second": 3.0}))
    assert average.keys() == stored["base"].keys()
    for key, tensor in average.items():
        torch.testing.assert_close(tensor, (stored["first"][key] + 3 * stored["second"][key]) / 4, rtol=1e-6, atol=1e-7)
    for key, tensor in merged(models, task_arithmetic({"first": 0.5, "second": -0.25})).items():
        base = stored["base"][key]
        expected = base + 0.5 * (stored["first"][key] - base) - 0.25 * (stored["second"][key] - base)
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_models_merge_with_themselves_to_themselves(name, families):
    same = dict.fromkeys(("base", "first", "second"), families[name]["first"])
    alone = load_file(same["first"] / WEIGHTS)
    models = resident(same)
    for recipe in (linear({"first": 1.0, "second": 1.0}), task_arithmetic({"first": 0.3, "second": 0.9})):
        for key, tensor in merged(models, recipe).items():
            assert torch.equal(tensor, alone[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_reloads_to_the_same_weights_and_logits(name, families, tmp_path):
    recipe = linear({str(families[name]["first"]): 1.0, str(families[name]["second"]): 1.0})
    found, _ = checkpoint.merge(recipe, tmp_path / "out", "recipe.yaml")
    models = resident(families[name])
    assert models.materialize(linear({"first": 1.0, "second": 1.0})) == found
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert fingerprint(named_weights(loaded)) == found
    assert tensor_table(tmp_path / "out").keys() == tensor_table(families[name]["base"]).keys()
    tokens = torch.arange(3, 33).reshape(2, 15)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, models.model(tokens).logits)


# Checkpoints that name their tensors otherwise


def rewritten(
    folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], **config: object
) -> Path:
    """A copy of a model with its tensors changed, and keys of its config."""
    shutil.copytree(folder, out)
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(folder / WEIGHTS)).items()}
    save_file(tensors, out / WEIGHTS, {"format": "pt"})
    document = json.loads((out / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
    return out


@pytest.mark.parametrize("name", TIED)
def test_a_model_saved_without_its_head_is_read_by_the_whole_model_s_names(name, families, tmp_path):
    whole = load_model(families[name]["first"], torch.float32)
    headless = save(whole.base_model, tmp_path / "headless")
    assert not tensor_table(families[name]["first"]).keys() & load_file(headless / WEIGHTS).keys()
    check_models(str(families[name]["base"]), {"models.mine": str(headless)})
    for folder in (headless, families[name]["first"]):
        assert tensor_table(folder).keys() == tensor_table(families[name]["base"]).keys()
    models = resident({"base": headless, "first": families[name]["first"]})
    assert models.materialize(single("base")) == models.materialize(single("first"))


def test_an_untied_model_saved_without_its_head_is_refused(families, tmp_path):
    headless = save(load_model(families["llama"]["first"], torch.float32).base_model, tmp_path / "headless")
    with pytest.raises(InputError, match=r"^models\.mine lacks the tensor lm_head\.weight of the base"):
        check_models(str(families["llama"]["base"]), {"models.mine": str(headless)})
    with pytest.raises(InputError, match=r"lacks? lm_head\.weight"):
        resident({"base": headless})


BUFFERS = {
    "gpt2": {"transformer.h.0.attn.bias": (1, 1, 8, 8), "transformer.h.1.attn.masked_bias": ()},
    "gpt_neox": {
        "gpt_neox.layers.0.attention.bias": (1, 1, 8, 8),
        "gpt_neox.layers.0.attention.masked_bias": (),
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq": (4,),
    },
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)},
}


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_in_old_checkpoints_are_ignored(name, families, tmp_path):
    buffers = {key: torch.ones(shape) for key, shape in BUFFERS[name].items()}
    old = rewritten(families[name]["first"], tmp_path / "old", lambda tensors: tensors | buffers)
    assert tensor_table(old).keys() == tensor_table(families[name]["first"]).keys()
    check_models(str(families[name]["base"]), {"models.mine": str(old)})
    check_models(str(old), {"models.mine": str(families[name]["base"])})
    models = resident({"base": old, "first": families[name]["first"]})
    assert models.materialize(single("base")) == models.materialize(single("first"))


def test_a_head_stored_under_transformers_name_is_read_under_the_hub_s(families, tmp_path):
    moved = rewritten(
        families["gpt_neox"]["first"], tmp_path / "moved", lambda t: t | {"lm_head.weight": t.pop("embed_out.weight")}
    )
    assert "embed_out.weight" in tensor_table(moved)
    models = resident({"base": moved, "first": families["gpt_neox"]["first"]})
    assert models.materialize(single("base")) == models.materialize(single("first"))


# Tied and untied


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_that_is_stored_all_the_same_is_ignored(name, families, tmp_path):
    embedding = embedding_names(tensor_table(families[name]["base"]))[-1]
    for index, tied in enumerate((True, None)):  # None: left to the architecture's default
        full = rewritten(
            families[name]["first"],
            tmp_path / str(index),
            lambda tensors: tensors | {"lm_head.weight": tensors[embedding].clone()},
            tie_word_embeddings=tied,
        )
        check_models(str(families[name]["base"]), {"models.mine": str(full)})
        models = resident({"base": families[name]["base"], "full": full, "first": families[name]["first"]})
        assert models.materialize(single("full")) == models.materialize(single("first"))


def test_an_architecture_s_default_decides_where_the_config_is_silent(families, tmp_path):
    silent = rewritten(families["llama"]["first"], tmp_path / "silent", lambda t: t, tie_word_embeddings=None)
    assert "lm_head.weight" in tensor_table(silent)
    check_models(str(families["llama"]["base"]), {"models.mine": str(silent)})


def test_a_tied_model_merges_into_an_untied_base_with_its_embedding_for_a_head(families, tmp_path):
    tied = save(build("llama", layers=2, tie_word_embeddings=True), tmp_path / "tied")
    assert "lm_head.weight" not in tensor_table(tied)
    base = families["llama"]["base"]
    check_models(str(base), {"models.mine": str(tied)})
    stored, own = load_tensors(tied), load_tensors(base)
    result = merged(resident({"base": base, "tied": tied}), linear({"base": 1.0, "tied": 1.0}))
    expected = (own["lm_head.weight"] + stored["model.embed_tokens.weight"]) / 2
    torch.testing.assert_close(result["lm_head.weight"], expected, rtol=1e-6, atol=1e-7)


def test_an_untied_model_unties_a_tied_base_in_memory_and_on_disk(families, tmp_path):
    tied = save(build("llama", layers=2, tie_word_embeddings=True), tmp_path / "tied")
    untied = families["llama"]["first"]
    (warning,) = [each for each in check_models(str(tied), {"models.mine": str(untied)}) if "own" in each]
    assert "has a head of its own (lm_head.weight), which the base" in warning
    recipe = Recipe(
        merge_method="task_arithmetic",
        base_model=str(tied),
        models=(Source(model=str(untied), parameters={"weight": 0.25}),),
    )
    fingerprint, _ = checkpoint.merge(recipe, tmp_path / "out", "recipe.yaml")
    models = load_models({str(tied): tied, str(untied): untied}, tied, "cpu", "float32")
    assert models.materialize(recipe) == fingerprint
    stored, own, found = (load_tensors(folder) for folder in (tied, untied, tmp_path / "out"))
    expected = 0.75 * stored["model.embed_tokens.weight"] + 0.25 * own["lm_head.weight"]
    torch.testing.assert_close(found["lm_head.weight"], expected, rtol=1e-6, atol=1e-7)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_a_search_over_a_tied_base_and_an_untied_model_ships_what_it_scored_parents_too(tmp_path):
    """The parent that ties its head as well: in memory it has one, so that its checkpoint has one."""
    folders = {}
    for name, ties in (("base", True), ("tied", True), ("untied", False)):
        model = build("llama", seed=len(folders), layers=2, tie_word_embeddings=ties)
        folders[name] = save(model, tmp_path / name)
    document = {
        "base": str(folders["base"]),
        "models": {"tied": str(folders["tied"]), "untied": str(folders["untied"])},
        "tasks": {"paths": [str(REPOSITORY / "evals")]},
        "objectives": [{"task": "base_qa"}],
        "items": {"search": 8, "heldout": 8},
        "optimizer": {"evaluations": 4, "population": 4},
        "workers": {"pool": "local"},
    }
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(document))
    run = runs.start(tmp_path / "search.yaml", tmp_path / "run", (), None, unheard)
    assert any(gene.group == "head" for gene in run.prepared.space.genes)
    for name in ("g0000-00", "parent-tied", "parent-untied", "base", "uniform"):
        shared = export.shared_recipe(choice.choose(run.results, name, ()), run.results, run.prepared.models)
        again = Recipe.model_validate(yaml.safe_load(shared.to_yaml()))
        assert checkpoint.merge(again, tmp_path / f"merged-{name}", "recipe.yaml") == (
            shared.evomerge.fingerprint,
            True,
        )


def test_a_head_is_never_made_up_for_a_model_that_says_it_has_one(families, tmp_path):
    torn = rewritten(
        families["llama"]["first"],
        tmp_path / "torn",
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"},
    )
    with pytest.raises(InputError, match=r"the weights lack lm_head\.weight"):
        Weights(torn).read("lm_head.weight")


# Dtypes and shards


def test_dtypes_may_differ_between_models_and_within_one(families, tmp_path):
    folders = families["qwen3"]
    wide = load_file(folders["first"] / WEIGHTS)
    half = rewritten(
        folders["first"],
        tmp_path / "half",
        lambda tensors: {name: t.to(torch.bfloat16 if "mlp" in name else torch.float16) for name, t in tensors.items()},
    )
    check_models(str(folders["base"]), {"models.mine": str(half)})
    models = resident(folders | {"half": half})
    base = load_file(folders["base"] / WEIGHTS)
    for name, tensor in merged(models, linear({"base": 1.0, "half": 1.0})).items():
        rounded = wide[name].to(torch.bfloat16 if "mlp" in name else torch.float16).float()
        torch.testing.assert_close(tensor, (base[name] + rounded) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_shards_hold_the_same_model(name, families, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(families[name]["first"])
    sharded = save(model, tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole, parts = load_tensors(families[name]["first"]), load_tensors(sharded)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[key]) for key, tensor in whole.items())


# Configs under which equal tensors mean different things


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("llama", "hidden_act", "gelu"), ("gpt2", "activation_function", "relu"), ("gpt2", "n_head", 2)],
)
def test_another_activation_or_number_of_heads_is_refused(name, key, value, families, tmp_path):
    other = rewritten(families[name]["first"], tmp_path / "other", lambda tensors: tensors, **{key: value})
    with pytest.raises(InputError, match=rf"^models\.mine: {key} in config\.json is {value}, but the base"):
        check_models(str(families[name]["base"]), {"models.mine": str(other)})


def test_a_default_that_only_one_config_spells_out_is_no_difference(families, tmp_path):
    terse = rewritten(families["llama"]["first"], tmp_path / "terse", lambda t: t, head_dim=None, hidden_act=None)
    check_models(str(families["llama"]["base"]), {"models.mine": str(terse)})
