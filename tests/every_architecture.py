"""Tiny models of every architecture that transformers builds from a config, shrunk by rules on the names of keys, and
what becomes of each when it is merged.

The rules cover what most configs have in common; a small table says what single types need besides.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from evomerge.merging.sources.models import find_models
from evomerge.merging.streamed.merge import StreamedMerge, stored_fingerprint
from evomerge.quiet import quiet
from evomerge.recipe import Parameters, Recipe, Source, linear
from tests.models import load_models

WIDTH, HEADS, HEAD, LAYERS, TOKENS, EXPERTS = 32, 4, 8, 2, 128, 4

_SMALL = [
    (
        WIDTH,
        "hidden_size d_model n_embd dim model_dim embed_dim emb_dim embedding_size width out_hidden_size hidden_dim "
        "projection_dim lm_embed_dim cross_attention_hidden_size decoder_hidden_size lru_width input_hidden_size",
    ),
    (
        48,
        "intermediate_size ffn_dim n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim d_ff moe_intermediate_size "
        "shared_expert_intermediate_size expert_ffn_hidden_size mlp_dim shared_intermediate_size intermediate_size_mlp "
        "prefix_intermediate_size block_ff_dim moe_shared_expert_intermediate_size dim_ff",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads mamba_n_heads "
        "linear_num_value_heads linear_num_key_heads n_attn_heads attention_heads",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads n_head_kv swa_num_key_value_heads n_group topk_group num_experts_per_tok "
        "num_experts_per_token moe_topk top_k_experts kv_n_heads n_groups mamba_expand moe_k",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth num_decoder_layers "
        "num_encoder_layers",
    ),
    (
        HEAD,
        "head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim d_kv global_head_dim kv_channels mamba_head_dim "
        "linear_key_head_dim linear_value_head_dim attention_head_dim swa_head_dim rotary_dim index_head_dim",
    ),
    (
        16,
        "q_lora_rank kv_lora_rank qk_head_dim state_size mamba_d_state mamba_state_dim ssm_state_size o_lora_rank "
        "sliding_window attention_chunk_size index_topk patch_embed_dim mamba_dt_rank time_step_rank mamba_d_head",
    ),
    (
        TOKENS,
        "vocab_size max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len max_target_positions "
        "max_source_positions vocab_size_per_layer_input context_length",
    ),
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts"),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace moe_layer_start_index"),
]
_BY_KEY = {key: value for value, keys in _SMALL for key in keys.split()}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_VISION = {"image_size": 32, "patch_size": 16}


# what single types need besides
_SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dots1": {"head_dim": HEAD, "n_group": 1, "topk_group": 1},
    "dots3_note": {"num_key_value_heads": HEADS},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "falcon_h1": {"mamba_d_ssm": WIDTH, "mamba_n_heads": HEADS, "mamba_d_head": HEAD},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": LAYERS},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "ministral": {"head_dim": HEAD},
    "nemotron": {"head_dim": HEAD},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SETTINGS |= {
    name: {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}}
    for name in (
        "qwen2_vl_text",
        "qwen2_5_vl_text",
        "qwen2_5_omni_text",
        "paddleocr_vl_text",
        "glm4v_text",
        "glm_ocr_text",
        "glmga_text",
    )
} | {"glm4v_moe_text": {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 0]}}}


def tiny_config(kind: type[PreTrainedConfig], **settings: Any) -> Any:
    """A config of a class, with small numbers by the names of its keys; `settings` go on top."""
    default = kind()
    parts = dict(getattr(default, "sub_configs", {}))
    known = {key: value for key, value in default.to_dict().items() if key not in parts}
    small: dict[str, Any] = {
        key: _BY_KEY[key] for key, value in known.items() if key in _BY_KEY and isinstance(value, int)
    }
    small |= {key: value for key, value in _TOKENS.items() if key in known and known[key] is not None}
    small |= {key: 3 + index for index, key in enumerate(sorted(known)) if _special(key, known[key])}
    if "patch_size" in known and isinstance(known.get("image_size"), int):
        small |= _VISION
    if isinstance(known.get("layer_types"), list):
        kinds = list(dict.fromkeys(known["layer_types"]))
        small["layer_types"] = kinds if len(kinds) > 1 else kinds * LAYERS
        small["num_hidden_layers"] = len(small["layer_types"])
    if "kv_lora_rank" in known and "num_key_value_heads" in small:
        small["num_key_value_heads"] = HEADS  # latent attention has a key for every query
    small |= _tiny_rope(known.get("rope_parameters"))
    small |= _SETTINGS.get(kind.model_type, {})
    small |= {name: _tiny_part(default, name, settings.pop(name, {})) for name in parts}
    return kind(**{key: value for key, value in small.items() if value is not None} | settings)


def _tiny_rope(rope: Any) -> dict[str, Any]:
    """Rotary embeddings in three sections, for heads of `HEAD`."""
    return (
        {"rope_parameters": rope | {"mrope_section": [2, 1, 1]}}
        if isinstance(rope, dict) and "mrope_section" in rope
        else {}
    )


def _special(key: str, value: Any) -> bool:
    return isinstance(value, int) and key.endswith(("_token_id", "_token_index")) and key not in _TOKENS


def _tiny_part(default: Any, name: str, settings: dict[str, Any]) -> Any:
    part = getattr(default, name, None)
    return None if part is None else tiny_config(type(part), **settings)


def architectures() -> dict[str, tuple[type[PreTrainedConfig], Any]]:
    """By model type the config class and the auto class: everything that is a causal language model, and what only
    exists as a model of images and text."""
    found = {kind.model_type: (kind, AutoModelForCausalLM) for kind in MODEL_FOR_CAUSAL_LM_MAPPING}
    both = {kind.model_type: (kind, AutoModelForImageTextToText) for kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING}
    return dict(sorted((both | found).items()))


class Unbuilt(Exception):
    """No tiny model of an architecture can be made here, which says nothing of merging it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an architecture. runs: whether the tiny model takes text alone and computes on a CPU."""

    runs: bool
    reason: str = ""


def try_merges(kind: str, folder: Path) -> Outcome:
    """Merges three tiny models of an architecture by `linear` and `ties`, from file to file and in memory, and reloads
    them. Raises Unbuilt where there is no such model, AssertionError or InputError where something is wrong."""
    config_class, auto = architectures()[kind]
    folders = _tiny_models(config_class, auto, folder)
    names = [str(each) for each in folders]
    drops: Parameters = {"weight": 0.5, "density": 0.6}
    ties = Recipe(
        merge_method="ties",
        base_model=names[0],
        models=tuple(Source(model=name, parameters=drops) for name in names[1:]),
    )
    resident = load_models(dict(zip(names, folders, strict=True)), folders[0], "cpu", "float32")
    for recipe in (linear(dict.fromkeys(names, 1.0)), ties):
        out = folder / recipe.merge_method
        out.mkdir()
        written = StreamedMerge(
            recipe, find_models(recipe.references[0], recipe.references), "recipe.yaml", "cpu", "float32"
        ).write(out, 10**9, tokenizer=False)
        assert stored_fingerprint(out) == written
        loaded = _reloaded(auto, out)
        assert resident.materialize(recipe) == written
        _assert_same(resident.model.state_dict(), loaded.state_dict())
        if recipe.merge_method == "linear":
            _assert_averages([_reloaded(auto, each) for each in folders], loaded)
    return _forward(resident.model, loaded)


def _tiny_models(config_class: type[PreTrainedConfig], auto: Any, folder: Path) -> list[Path]:
    try:
        with quiet():
            torch.manual_seed(0)
            model = auto.from_config(tiny_config(config_class))
    except Exception as error:
        raise Unbuilt(" ".join(f"{type(error).__name__}: {error}".split())[:160]) from None
    folders = []
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad(), quiet():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            folders.append(folder / f"model{number}")
            model.save_pretrained(folders[-1])
    return folders


def _reloaded(auto: Any, folder: Path) -> Any:
    with quiet():
        model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    assert not info["mismatched_keys"], info["mismatched_keys"]
    return model.eval()


def _assert_same(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


def _assert_averages(models: list[Any], merged: Any) -> None:
    """In memory too, where tensors may be fused: a plain average does not depend on that."""
    held = [model.state_dict() for model in models]
    parameters = {name for name, _ in merged.named_parameters(remove_duplicate=False)}
    for name, tensor in merged.state_dict().items():
        if name in parameters and tensor.is_floating_point():
            average = sum(each[name].double() for each in held) / len(held)
            torch.testing.assert_close(tensor.double(), average, rtol=1e-5, atol=1e-5)


def _forward(mine: Any, theirs: Any) -> Outcome:
    tokens = torch.arange(3, 12)[None]
    try:
        with torch.no_grad(), quiet():
            expected = theirs(input_ids=tokens, use_cache=False).logits
    except Exception as error:
        return Outcome(False, " ".join(f"{type(error).__name__}: {error}".split())[:160])
    with torch.no_grad(), quiet():
        found = mine.eval()(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    return Outcome(True)
