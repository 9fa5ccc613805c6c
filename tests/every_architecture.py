"""Tiny models of every architecture that transformers builds from a config, shrunk by rules on the names of keys.

The rules cover what most configs have in common. A small table says what single types need besides, and another why
some are left out.
"""

from typing import Any

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


def tiny_config(kind: type, **settings: Any) -> Any:
    """A config of a class, with small numbers by the names of its keys; `settings` go on top."""
    default = kind()
    parts = dict(getattr(default, "sub_configs", {}))
    known = {key: value for key, value in default.to_dict().items() if key not in parts}
    small = {key: _BY_KEY[key] for key, value in known.items() if key in _BY_KEY and isinstance(value, int)}
    small |= {key: value for key, value in _TOKENS.items() if key in known and known[key] is not None}
    small |= {key: 3 + index for index, key in enumerate(sorted(known)) if _special(key, known[key])}
    if "patch_size" in known and isinstance(known.get("image_size"), int):
        small |= _VISION
    if isinstance(known.get("layer_types"), list):
        kinds = list(dict.fromkeys(known["layer_types"]))
        small["layer_types"] = kinds if len(kinds) > 1 else kinds * LAYERS
        small["num_hidden_layers"] = len(small["layer_types"])
    small |= {name: _tiny_part(default, name, settings.pop(name, {})) for name in parts}
    return kind(**{key: value for key, value in small.items() if value is not None} | settings)


def _special(key: str, value: Any) -> bool:
    return isinstance(value, int) and key.endswith(("_token_id", "_token_index")) and key not in _TOKENS


def _tiny_part(default: Any, name: str, settings: dict[str, Any]) -> Any:
    part = getattr(default, name, None)
    return None if part is None else tiny_config(type(part), **settings)
