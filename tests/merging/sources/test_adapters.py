"""Adapters merged on reading, beside PEFT's merge_and_unload; and what is refused."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from evomerge.config import files
from evomerge.errors import InputError, choices
from evomerge.events import unheard
from evomerge.export import checkpoint, choice
from evomerge.export import recipe as export
from evomerge.merging.naming import named_weights
from evomerge.merging.sources import located
from evomerge.merging.sources.references import ModelSource, find_source
from evomerge.merging.sources.weights import identity, load_tensors, tensor_table
from evomerge.recipe import Recipe, Source, linear, single
from evomerge.runs import directory as runs
from tests.architectures import family, shake
from tests.conftest import REPOSITORY
from tests.models import check_models, load_models

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ATTENTION = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    names = ("llama", "qwen2", "gemma2", "phi3", "gpt_neox", "gpt2")
    return {name: family(name, root / name, ("base",), layers=2)["base"] for name in names}


def tune(base: Path, folder: Path, kind: Any = AutoModelForCausalLM, **settings: Any) -> Path:
    """A LoRA whose every trained weight has moved, saved by PEFT."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(kind.from_pretrained(base), peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | settings))
        trained = torch.nn.ParameterList(weight for weight in tuned.parameters() if weight.requires_grad)
        shake(trained, 2, 0.1)
        tuned.save_pretrained(folder)
    return folder


def merged_by_peft(
    base: Path, adapter: Path, dtype: torch.dtype = torch.float32, kind: Any = AutoModelForCausalLM
) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind.from_pretrained(base, dtype=dtype)
        whole = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    named = named_weights(whole) if kind is AutoModelForCausalLM else dict(whole.named_parameters())
    return {name: weight.detach() for name, weight in named.items()}


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory) -> Path:
    return tune(bases["llama"], tmp_path_factory.mktemp("plain") / "adapter", target_modules=ATTENTION)


@pytest.fixture
def changed(plain, tmp_path) -> Callable[..., Path]:
    """A copy of the plain adapter with keys of its config and tensors replaced (None removes one)."""

    def change(tensors: dict[str, torch.Tensor | None] | None = None, **config: Any) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(plain, folder, dirs_exist_ok=True)
        document = json.loads((folder / CONFIG).read_text()) | config
        (folder / CONFIG).write_text(json.dumps(document))
        stored = load_file(folder / WEIGHTS) | (tensors or {})
        save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, folder / WEIGHTS)
        return folder

    return change


# Beside PEFT

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("llama", {"target_modules": ATTENTION}),
    "every linear layer": ("phi3", {"target_modules": "all-linear"}),
    "rank-stabilized": ("llama", {"target_modules": ATTENTION, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": [*ATTENTION, "up_proj"],
            "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.up_proj": 8},
            "alpha_pattern": {r"^model.layers.0.self_attn.q_proj": 20, "up_proj": 3},
            "use_rslora": True,
        },
    ),
    "some layers": ("qwen2", {"target_modules": ["up_proj"], "layers_to_transform": [1]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied embedding": ("gemma2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "modules saved whole": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]}),
    "all biases": ("qwen2", {"target_modules": ATTENTION, "bias": "all"}),
    "biases of changed layers": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "bias of the update": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "Conv1D untold": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "square Conv1D": ("gpt2", {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
    "square Linear told otherwise": ("llama", {"target_modules": ["q_proj"], "fan_in_fan_out": True}),
    "another prefix": ("gpt_neox", {"target_modules": ["query_key_value", "dense", "embed_in"]}),
    "a head with another name": ("gpt_neox", {"target_modules": ["lm_head"]}),
}


# what adapters do to the ends of a model that ties its head to its embedding, and whether they untie them
TIED: dict[str, tuple[str, dict[str, Any], bool]] = {
    "embedding saved whole": ("gemma2", {"modules_to_save": ["embed_tokens"]}, True),
    "head saved whole": ("gemma2", {"modules_to_save": ["lm_head"]}, True),
    "both saved whole": ("gemma2", {"modules_to_save": ["embed_tokens", "lm_head"]}, True),
    "both saved as one": (
        "gemma2",
        {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        False,
    ),
    "one end meant to stay tied": ("gpt2", {"modules_to_save": ["wte"], "ensure_weight_tying": True}, True),
    "LoRA on the head": ("gemma2", {"target_modules": ["q_proj", "lm_head"]}, False),
    "LoRA on both": ("gemma2", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, False),
    "LoRA on both as one": (
        "gemma2",
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "ensure_weight_tying": True},
        False,
    ),
    "LoRA on the head of Conv1D layers": ("gpt2", {"target_modules": ["c_attn", "lm_head"]}, False),
    "embedding saved whole and a LoRA on the head": (
        "gemma2",
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
        True,
    ),
}


@pytest.fixture(params=TIED)
def on_ends(request, bases, tmp_path) -> tuple[Path, Path, bool]:
    """A tied base, an adapter that touches its ends, and whether PEFT unties them."""
    name, settings, unties = TIED[request.param]
    target = "c_attn" if name == "gpt2" else "q_proj"
    return bases[name], tune(bases[name], tmp_path / "adapter", **{"target_modules": [target]} | settings), unties


def saved_by_peft(base: Path, adapter: Path, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)
    return folder


def test_a_tied_base_is_untied_where_peft_unties_it(on_ends, tmp_path):
    base, adapter, unties = on_ends
    theirs = saved_by_peft(base, adapter, tmp_path / "theirs")
    recipe = linear({f"{base}+{adapter}": 1.0})
    ours = tmp_path / "ours"
    checkpoint.merge(recipe, ours, "recipe.yaml")
    config = json.loads((ours / "config.json").read_text())
    assert config["tie_word_embeddings"] is (not unties)
    found, expected = (load_tensors(folder) for folder in (ours, theirs))
    assert found.keys() == expected.keys()
    assert ("lm_head.weight" in found) is unties
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    loaded, info = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.arange(3, 20)[None]
    other = AutoModelForCausalLM.from_pretrained(theirs)
    torch.testing.assert_close(loaded(tokens).logits, other(tokens).logits, rtol=1e-5, atol=1e-5)


def test_a_merge_with_the_base_unties_in_memory_as_on_disk(on_ends, tmp_path):
    base, adapter, unties = on_ends
    recipe = Recipe(
        merge_method="task_arithmetic",
        base_model=str(base),
        models=(Source(model=f"{base}+{adapter}", parameters={"weight": 0.7}),),
    )
    sources = {reference: find_source(reference, str(base)) for reference in recipe.references}
    resident = load_models(sources, base, "cpu", "float32")
    assert ("lm_head.weight" in named_weights(resident.model)) is unties
    rehearsal = load_models(sources, base, "cpu", "float32", rehearsal=True)
    rehearsal.rehearse(recipe)
    assert rehearsal.plan(recipe).tensors == resident.plan(recipe).tensors
    scored = resident.materialize(recipe)
    assert checkpoint.merge(recipe, tmp_path / "out", "recipe.yaml")[0] == scored
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(3, 20)[None]
    assert torch.equal(written(tokens).logits, resident.model(tokens).logits)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_merged_as_peft_merges_it(case, bases, tmp_path):
    name, settings = CASES[case]
    base = bases[name]
    adapter = tune(base, tmp_path / "adapter", **settings)
    check_models(str(base), {"models.mine": str(adapter)})
    found, expected = load_tensors(ModelSource(base, adapter)), merged_by_peft(base, adapter)
    assert found.keys() == expected.keys()
    untouched = load_tensors(base)
    assert any(not torch.equal(tensor, untouched[key]) for key, tensor in found.items())
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-6)


def test_a_square_layer_is_turned_by_its_kind_whatever_the_config_says(bases, tmp_path):
    adapter = tune(bases["gpt2"], tmp_path / "adapter", target_modules=["attn.c_proj"])
    config = json.loads((adapter / CONFIG).read_text()) | {"fan_in_fan_out": False}
    (adapter / CONFIG).write_text(json.dumps(config))
    found = load_tensors(ModelSource(bases["gpt2"], adapter))
    for name, tensor in merged_by_peft(bases["gpt2"], adapter).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_as_peft_does(dtype, bases, plain, tmp_path):
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=dtype).save_pretrained(half)
    found, expected = load_tensors(ModelSource(half, plain)), merged_by_peft(half, plain, dtype)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=torch.finfo(dtype).eps, atol=0)
        assert (found[key] != tensor).float().mean() < 0.01


def test_an_adapter_of_a_model_without_its_head_fits_the_whole_model(bases, tmp_path):
    adapter = tune(bases["gpt2"], tmp_path / "adapter", AutoModel, target_modules=["c_attn"], fan_in_fan_out=True)
    headless = merged_by_peft(bases["gpt2"], adapter, kind=AutoModel)
    found = load_tensors(ModelSource(bases["gpt2"], adapter))
    assert found.keys() == {f"transformer.{name}" for name in headless}
    for name, weight in headless.items():
        torch.testing.assert_close(found[f"transformer.{name}"], weight, rtol=1e-6, atol=1e-6)


# References


def test_an_adapter_by_itself_changes_the_base_and_after_a_plus_what_stands_before_it(bases, plain, monkeypatch):
    base = str(bases["llama"])
    expected = ModelSource(bases["llama"], plain)
    assert find_source(str(plain), base) == find_source(f"{base}+{plain}", "zoo:base") == expected
    assert find_source(base, base) == ModelSource(bases["llama"])
    asked = []

    def download(identifier: str, revision: str | None, **_: Any) -> str:
        asked.append((identifier, revision))
        return str(plain if "lora" in identifier else bases["llama"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_source("owner/model@v1+owner/lora@refs/pr/2", base) == expected
    assert asked == [("owner/model", "v1"), ("owner/lora", "refs/pr/2")]


def test_a_folder_with_a_plus_in_its_name_is_one_model(bases, tmp_path):
    folder = Path(shutil.copytree(bases["llama"], tmp_path / "a+b"))
    assert find_source(str(folder), "zoo:base") == ModelSource(folder)


def test_a_search_file_s_relative_paths_are_anchored_on_both_sides_of_the_plus(search_file, tmp_path):
    for name in ("model", "adapter"):
        (tmp_path / name).mkdir()
    models = {"a": "model+adapter", "b": "zoo:math+./adapter", "c": "adapter", "d": "owner/name+owner/lora"}
    assert files.load(search_file(models=models)).models == {
        "a": f"{tmp_path}/model+{tmp_path}/adapter",
        "b": f"zoo:math+{tmp_path}/adapter",
        "c": f"{tmp_path}/adapter",
        "d": "owner/name+owner/lora",
    }


def test_a_list_of_models_is_named_by_adapters_and_without_revisions(search_file):
    models = ["zoo:math", "zoo:base+owner/lora@refs/pr/2", "owner/name@v1"]
    assert list(files.load(search_file(models=models)).models) == ["math", "lora", "name"]


@pytest.mark.parametrize("reference", ["+b", "a+", "a+b+c"])
def test_half_a_sum_is_refused(reference):
    with pytest.raises(InputError, match=r"expected MODEL\+ADAPTER, one of each"):
        find_source(reference, "zoo:base")


def test_an_adapter_for_a_base_and_a_model_for_an_adapter_are_refused(bases, plain):
    with pytest.raises(InputError, match=rf"is an adapter, not a model; name the model .*MODEL\+{plain}"):
        find_source(str(plain), str(plain))
    with pytest.raises(InputError, match=r"is an adapter, not a model"):
        find_source(f"{plain}+{plain}", str(bases["llama"]))
    with pytest.raises(InputError, match=r"is an adapter, and the base \(.*\) has one already; name the model"):
        find_source(str(plain), f"{bases['llama']}+{plain}")
    with pytest.raises(InputError, match=r"adapter_config\.json is missing; only a LoRA .* can follow a plus sign"):
        find_source(f"{bases['llama']}+{bases['llama']}", "zoo:base")


# In a merge


def test_a_recipe_with_an_adapter_merges_as_mergekit_merges_it(bases, plain, tmp_path):
    base = str(bases["llama"])
    recipe = Recipe(
        merge_method="task_arithmetic",
        base_model=base,
        models=(Source(model=f"{base}+{plain}", parameters={"weight": 0.5}),),
        dtype="float32",
    )
    checkpoint.merge(recipe, tmp_path / "ours", "recipe.yaml")
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, lora_merge_cache=str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_merge(
            MergeConfiguration.model_validate(yaml.safe_load(recipe.to_yaml())), str(tmp_path / "theirs"), options
        )
    ours, theirs = load_tensors(tmp_path / "ours"), load_tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6)


def test_a_search_over_an_adapter_exports_a_recipe_that_merges_to_what_was_scored(bases, plain, tmp_path):
    document = {
        "base": str(bases["llama"]),
        "models": {"tuned": str(plain)},
        "tasks": {"paths": [str(REPOSITORY / "evals")]},
        "objectives": [{"task": "base_qa"}],
        "items": {"search": 8, "heldout": 8},
        "optimizer": {"evaluations": 4, "population": 4},
        "workers": {"pool": "local"},
    }
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(document))
    run = runs.start(tmp_path / "search.yaml", tmp_path / "run", (), None, unheard)
    shared = export.shared_recipe(choice.choose(run.results, "g0000-00", ()), run.results, run.prepared.models)
    whole = f"{bases['llama']}+{plain}"
    assert shared.references == (str(bases["llama"]), whole)
    assert checkpoint.merge(shared, tmp_path / "out", "recipe.yaml") == (shared.evomerge.fingerprint, True)
    elsewhere = shared.renamed({whole: "/elsewhere/base+/elsewhere/adapter"})
    moved = elsewhere.evomerge.model_copy(update={"aliases": {"/elsewhere/base+/elsewhere/adapter": whole}})
    assert located.located(elsewhere.model_copy(update={"evomerge": moved})).references == shared.references


def test_resident_models_hold_the_adapted_weights(bases, plain):
    sources = {"base": ModelSource(bases["llama"]), "tuned": ModelSource(bases["llama"], plain)}
    models = load_models(sources, bases["llama"], "cpu", "float32")
    tuned = models.materialize(single("tuned"))
    expected = load_tensors(sources["tuned"])
    assert all(torch.equal(weight, expected[name]) for name, weight in named_weights(models.model).items())
    assert models.materialize(linear({"tuned": 1.0, "base": 1.0})) != tuned != models.materialize(single("base"))


# What is refused


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("use_qalora", True),
        ("target_parameters", ["mlp.experts.down_proj"]),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("alora_invocation_tokens", [3]),
    ],
)
def test_variants_whose_merge_is_another_are_refused_by_name(key, value, bases, changed):
    with pytest.raises(InputError, match=rf"^/.*/{CONFIG}: {key} is set, .* with PEFT"):
        check_models(str(bases["llama"]), {"models.mine": str(changed(**{key: value}))})


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_starts_that_change_the_base_are_refused(start, bases, changed):
    with pytest.raises(InputError, match=rf"init_lora_weights is {start}, which changes the base"):
        tensor_table(ModelSource(bases["llama"], changed(init_lora_weights=start)))


@pytest.mark.parametrize("kind", ["LOHA", "IA3", "PROMPT_TUNING"])
def test_other_kinds_of_adapters_are_refused(kind, bases, changed):
    with pytest.raises(InputError, match=rf"peft_type is {kind}; only LORA"):
        tensor_table(ModelSource(bases["llama"], changed(peft_type=kind)))


@pytest.mark.parametrize("kind", ["IA3", "LOKR", "PREFIX_TUNING", "VERA", "SOMETHING_NEW"])
def test_another_kind_is_told_before_the_keys_that_a_lora_would_have(kind, bases, changed):
    folder = changed()
    (folder / CONFIG).write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(InputError, match=rf"^{folder}/{CONFIG}: peft_type is {kind}; only LORA .* with PEFT"):
        tensor_table(ModelSource(bases["llama"], folder))


def test_of_many_valid_names_only_the_few_closest_are_told():
    names = [f"model.layers.{number}.self_attn.q_proj.weight" for number in range(300)]
    told = choices("model.layers.7.self_attn.q_project.weight", names)
    assert 1 <= sum(f"'{name}'" in told for name in names) <= 3
    assert told.endswith("there are 300 valid names")


def test_shapes_and_ranks_that_do_not_fit_are_named(bases, changed):
    module = "base_model.model.model.layers.0.self_attn.v_proj"
    adapter = ModelSource(bases["llama"], changed({f"{module}.lora_B.weight": torch.zeros(32, 4)}))
    with pytest.raises(InputError, match=r"v_proj changes a weight of shape \[32, 32\], but .* has \[16, 32\] \(the"):
        tensor_table(adapter)
    changed({f"{module}.lora_B.weight": torch.zeros(16, 5)})
    with pytest.raises(InputError, match=r"lora_B \[16, 5\], but adapter_config\.json says rank 4"):
        tensor_table(adapter)
    changed({f"{module}.lora_B.weight": None})
    with pytest.raises(InputError, match=r"v_proj lacks lora_B"):
        tensor_table(adapter)


def test_a_bias_that_does_not_fit_is_named(bases, tmp_path):
    adapter = tune(bases["qwen2"], tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.bias"
    save_file(load_file(adapter / WEIGHTS) | {key: torch.zeros(5)}, adapter / WEIGHTS)
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj changes a bias of shape \[5\], but .* has \["):
        tensor_table(ModelSource(bases["qwen2"], adapter))


def test_an_adapter_that_resizes_the_vocabulary_is_refused_where_sizes_must_agree(bases, changed):
    folder = changed({"base_model.model.model.embed_tokens.weight": torch.zeros(130, 32)})
    with pytest.raises(
        InputError,
        match=r"^models\.mine: the adapter resized .* model\.embed_tokens\.weight has 130 rows, but .* has \d+;",
    ):
        check_models(str(bases["llama"]), {"models.mine": str(folder)})


# Identity


def test_an_identity_follows_every_file_of_a_source(bases, changed, tmp_path):
    folder, adapter = Path(shutil.copytree(bases["llama"], tmp_path / "model")), changed()
    source = ModelSource(folder, adapter)
    seen = {identity(ModelSource(folder)), identity(source)}
    assert identity(source) == identity(ModelSource(Path(shutil.copytree(folder, tmp_path / "copy")), adapter))
    for file in (folder / "model.safetensors", folder / "config.json", adapter / CONFIG, adapter / WEIGHTS):
        content = bytearray(file.read_bytes())
        content[-2] ^= 1
        file.write_bytes(content)
        seen.add(identity(source))
    assert len(seen) == 6
